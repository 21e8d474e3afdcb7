"""The sections of the pages of figures: which file each shows, who writes the file, and where the section stands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from report_claims import attentions_table, formats_table, volume_table
from report_data import data_tables, loader_wait_table, preparation_table
from report_plan import plan_table
from report_tables import (
    attention_tables,
    cards_table,
    context_parallel_table,
    convolution_table,
    evaluation_table,
    first_call_table,
    first_step_table,
    geometry_table,
    lora_sentence,
    mutants_sentence,
    no_table,
    offload_sentence,
    offloading_table,
    optimizers_table,
    pipeline_table,
    quantization_table,
    recipes_table,
    refiner_table,
    scaling_table,
    selection_sentence,
    soak_sentence,
    step_floors_table,
    tests_sentence,
    vae_table,
)


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
# Other pages that have sections, each at a place between two marks.
RECIPES_PAGE = ROOT / "docs" / "speed_and_memory.md"
TRAINING_PAGE = ROOT / "docs" / "training.md"
FAQ_PAGE = ROOT / "docs" / "faq.md"
CONTRIBUTING_PAGE = ROOT / "CONTRIBUTING.md"
LOADING_PAGE = ROOT / "docs" / "loading.md"
CLAIMS_PAGE = ROOT / "docs" / "claims.md"
DATA_PAGE = ROOT / "docs" / "data.md"
MODEL_CARD = ROOT / "checkpoints" / "direct3d-s2-small" / "README.md"
# By the name in the marks.
PLACES = {
    "recipes": RECIPES_PAGE,
    "parallel": RECIPES_PAGE,
    "offloading": RECIPES_PAGE,
    "quantization": RECIPES_PAGE,
    "steps": TRAINING_PAGE,
    "optimizers": TRAINING_PAGE,
    "first step": TRAINING_PAGE,
    "cards": TRAINING_PAGE,
    "plan": TRAINING_PAGE,
    "refiners": TRAINING_PAGE,
    "vae 1024": TRAINING_PAGE,
    "soak": FAQ_PAGE,
    "first call": FAQ_PAGE,
    "mutants": CONTRIBUTING_PAGE,
    "selection": LOADING_PAGE,
    "evaluation": MODEL_CARD,
    "claims": CLAIMS_PAGE,
    "preparing": DATA_PAGE,
    "reading": DATA_PAGE,
}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the section; without one, it goes on with the section before it.
        command: that writes its file.
        text: what is in the table.
        render: from its files to the lines of the table.
        place: of the section on another page, one of `PLACES`.
        counted_from: the name of the file that it is counted from, if it has none of its own.
        beside: names of files that its table takes too, after its own.
    """

    title: str
    command: str
    text: str
    render: Callable[..., list[str]]
    place: str = ""
    counted_from: str = ""
    beside: tuple[str, ...] = ()

    @property
    def page(self) -> Path:
        """The page that has the section."""
        return PLACES.get(self.place, PAGE)


SECTIONS = {
    "ssa": Section(
        "Spatial Sparse Attention",
        "python benchmarks/ssa.py",
        "Forward / backward. Dense attention is `scaled_dot_product_attention` with PyTorch's FlashAttention backend"
        " at 32 heads x 32, the model's own heads, and with cuDNN at 16 heads x 64, the same width in heads that suit"
        " it better. GiB is the additional peak, forward / with backward.",
        attention_tables,
    ),
    "sparse_conv": Section(
        "Submanifold convolution, 3x3x3",
        "python benchmarks/sparse_conv.py",
        "Milliseconds. A case is grid and channels of a spherical shell of voxels.",
        convolution_table,
    ),
    "vae": Section(
        "SparseVAE of the published size",
        "python benchmarks/vae.py",
        "Seconds / peak GiB.",
        vae_table,
    ),
    "geometry": Section(
        "Mesh to sparse SDF and back",
        "python benchmarks/geometry.py",
        "Seconds / MiB of memory. Steps that name a device ran there, the others on the processor.",
        geometry_table,
    ),
    "full_size": Section(
        "An image to a mesh of 1024^3 with models of the published sizes",
        "python benchmarks/full_size.py --work DIR",
        "The weights are random; the sparse stages get the cells of tori. After a first call of one step a stage. The"
        " floor counts products, convolutions and attention (`benchmarks/floors.py`). An estimate is the floor of that"
        " GPU over the share that is reached here; nothing ran there.",
        pipeline_table,
    ),
    "first_call": Section(
        "",
        "python benchmarks/first_call.py --work DIR",
        "New processes, calls of one step a stage with models of the published sizes:",
        first_call_table,
        "first call",
    ),
    "first_step": Section(
        "",
        "python benchmarks/first_step.py",
        "New processes that train the small sparse transformer, from their start on:",
        first_step_table,
        "first step",
    ),
    "full_size_offload": Section(
        "",
        "python benchmarks/full_size.py --work DIR --offload",
        "",
        offload_sentence,
    ),
    "full_size_low_memory": Section(
        "",
        "python benchmarks/full_size.py --work DIR --recipe low_memory",
        "",
        offload_sentence,
    ),
    "cache_recipes": Section(
        "",
        "python benchmarks/cache_recipes.py --steps 50 30",
        "The small pipeline, with the steps of published weights: means over photos and seeds. F1 at 0.05 and the"
        " Chamfer distance, in model space [-1, 1]^3, compare a mesh with that of the exact run for the same photo and"
        " seed.",
        recipes_table,
        "recipes",
    ),
    "cache_recipes_full_size": Section(
        "",
        "python benchmarks/cache_recipes.py --work DIR",
        "At the published sizes, with random weights:",
        recipes_table,
        "recipes",
    ),
    "context_parallel": Section(
        "",
        "torchrun --nproc_per_node 2 benchmarks/context_parallel.py",
        "A call of SparseDiT of the published size, on cells at 1024^3; memory is that beside the weights. The"
        " difference is over the largest value.",
        context_parallel_table,
        "parallel",
    ),
    "context_parallel_float32": Section(
        "",
        "torchrun --nproc_per_node 2 benchmarks/context_parallel.py --dtype float32 --cases 2x43700 --calls 2",
        "In float32, beside the difference that the last bit of the latents makes on one GPU: other tiles round"
        " otherwise, and nearly equal blocks change places in the selection. The GPUs did other work, too: times are"
        " not those of a call alone.",
        context_parallel_table,
        "parallel",
    ),
    "offloading": Section(
        "",
        "python benchmarks/offloading.py --work DIR",
        "A call to 512^3 in few steps, models of the published sizes without refiners, 16 bits. Difference: the"
        " largest of what the stages give, over its largest value; the first row is compared with its own first call."
        " Rows that load single layers call them in place of fused kernels, which round differently.",
        offloading_table,
        "offloading",
    ),
    "offloading_balanced": Section(
        "",
        "python benchmarks/offloading.py --work DIR --rows 'device_map=\"balanced\"'",
        "The same on two GPUs, in a run of its own. A device map hooks every layer, and so fuses none either.",
        offloading_table,
        "offloading",
    ),
    "offloading_float32": Section(
        "",
        "python benchmarks/offloading.py --work DIR --dtype float32 --rows sequential",
        "In float32, where a GPU has no fused kernel that single layers could leave out:",
        offloading_table,
        "offloading",
    ),
    "offloading_rounding": Section(
        "",
        "python benchmarks/offloading.py --work DIR --rows 'group, leaf level, stream' model",
        "In 16 bits beside the same weights in float32: the differences above are rounding, which random weights"
        " amplify in the signed distances.",
        offloading_table,
        "offloading",
    ),
    "quantization": Section(
        "",
        "python benchmarks/quantization.py",
        "Both transformers of the small pipeline: means over photos and seeds; F1 at 0.05 and the Chamfer distance to"
        " the mesh without quantisation.",
        quantization_table,
        "quantization",
    ),
    "scaling_cards": Section(
        "",
        "python benchmarks/scaling.py --gpus 1 --models dit_24gb dit_16gb",
        "Steps of the recipes for one card, taken by an H200 in a process that is limited to the memory of such a card"
        " without 1 GiB, which CUDA and the display need. The seconds, of a single step, are those of the H200."
        " Forward passes of more tokens, which `max_tokens` allows, take more memory and were not run.",
        cards_table,
        "cards",
    ),
    "scaling": Section(
        "",
        "python benchmarks/scaling.py --gpus 1 2",
        "One and two GPUs in one run: SparseDiT with two samples of 46,000 tokens a GPU, SparseVAE with one sample of"
        " 46,000 cells. Efficiency: tokens a second of a GPU over those of one GPU alone. Communication: the share of"
        " a step in which a GPU runs kernels that communicate, beside others too.",
        scaling_table,
        "steps",
        beside=("step_floors",),
    ),
    "scaling_vae_again": Section(
        "",
        "python benchmarks/scaling.py --gpus 1 2 --models vae",
        "SparseVAE again:",
        scaling_table,
        "steps",
        beside=("step_floors",),
    ),
    "scaling_vae_before": Section(
        "",
        "python benchmarks/scaling.py --gpus 1 --models vae",
        "SparseVAE on one GPU of another machine:",
        scaling_table,
        "steps",
        beside=("step_floors",),
    ),
    "scaling_vae": Section(
        "",
        "python benchmarks/scaling.py --gpus 1 2 --models vae --repeats 3",
        "There, with a shorter step (fewer waits for the GPU and fewer kernels), each row three times in turn. Seconds"
        " are the medians:",
        scaling_table,
        "steps",
        beside=("step_floors",),
    ),
    "scaling_dit_keep": Section(
        "",
        "python benchmarks/scaling.py --models dit --keep_attention",
        "SparseDiT on one GPU, with `checkpointing_keeps_attention: true`, in a run of its own:",
        scaling_table,
        "steps",
        beside=("step_floors",),
    ),
    "step_floors": Section(
        "",
        "python benchmarks/step_floors.py",
        "The floor of a step on one GPU, which the tables above are compared with. Counted, not measured: operations"
        " of linear layers, convolutions and attention, forward, backward twice as many, and those of the blocks again"
        " for gradient checkpointing, at the rate of bfloat16 products (`benchmarks/floors.py`: the H200's is"
        " measured, the others are estimated). Memory traffic and the optimizer count as nothing.",
        step_floors_table,
        "steps",
    ),
    "optimizers": Section(
        "",
        "python benchmarks/optimizers.py",
        "Steps of `small/dit_dense` with each optimizer, one after the other, on random latents and without"
        " compilation. What the host does for an optimizer may run beside the GPU's backward pass.",
        optimizers_table,
        "optimizers",
    ),
    "plan": Section(
        "",
        "python benchmarks/report.py",
        "A plan, not measured: steps at 1024^3 on more GPUs, with the same batch a GPU as above: two samples of"
        " SparseDiT, one of SparseVAE. Of two seconds a step, the first has all communication hidden behind"
        " computation, the second none of it (formulae: `benchmarks/report_plan.py`). The rows of SparseVAE are"
        " counted from the first table: from its longer step, and as uncertain as its efficiencies in it.",
        plan_table,
        "plan",
        "scaling",
    ),
    "preparation": Section(
        "",
        "python benchmarks/preparation.py",
        "Meshes a second that `prepare` makes records of, without pictures, in processes that share one machine. Where"
        " two faces are equally near, processor and GPU may take different ones, and a few samples differ.",
        preparation_table,
        "preparing",
    ),
    "data": Section(
        "",
        "python benchmarks/data.py",
        "Random blocks in the numbers of a surface, read by the loader of the trainings; nothing of them is in memory"
        " before. The wait is the share of the time that a step of SparseVAE of the published size on one H200 would"
        " wait.",
        data_tables,
        "reading",
    ),
    "loader_wait": Section(
        "",
        "python benchmarks/loader_wait.py",
        "A training of SparseVAE of the published size, of samples of 46,000 cells at 1024^3, none of them in memory"
        " before: the time between two steps is an upper bound of the wait for data.",
        loader_wait_table,
        "reading",
    ),
    "claims_formats": Section(
        "2. One sparse format, measured",
        "python -m benchmarks.claims.formats --data DIR",
        "Means over seeds. Spread: the deviation of the validation loss between seeds over its mean. Roughness: the"
        " deviation of the changes of the logarithm of the training loss, in the second half.",
        formats_table,
        "claims",
    ),
    "claims_volume": Section(
        "3. Training at 1024^3, measured",
        "python -m benchmarks.claims.volume",
        "GPUs: as many as process the shapes of 8 with SparseDiT and SSA in the same time.",
        volume_table,
        "claims",
    ),
    "claims_attentions": Section(
        "4. Attentions in the sparse stage, measured",
        "python -m benchmarks.claims.attentions --data DIR --vae DIR --image_encoder DIR",
        "Spread and roughness as above.",
        attentions_table,
        "claims",
    ),
    "selection": Section("", "python benchmarks/selection.py --data DIR", "", selection_sentence, "selection"),
    "generation": Section(
        "",
        "python benchmarks/evaluation.py --data data/small --every 8",
        "One picture of each of some validation meshes, evenly over all sources, people, animals and buildings too,"
        " compared with the surfaces of their SDFs after alignment in yaw and size (`metrics.align_meshes`):",
        evaluation_table,
        "evaluation",
    ),
    "reconstruction": Section(
        "",
        "python benchmarks/evaluation.py --data data/small --mode reconstruction",
        "Reconstruction by the sparse VAE at level 0:",
        evaluation_table,
        "evaluation",
    ),
    "reconstruction_refined": Section(
        "",
        "python benchmarks/evaluation.py --data data/small --mode reconstruction --refiner DIR",
        "What a refiner of `small/refiner`, trained for five minutes on one H200 with `latent_noise=0.0` and 1,000"
        " shapes, makes of reconstructions of the small pipeline's VAE on validation shapes:",
        refiner_table,
        "refiners",
        beside=("reconstruction_unrefined",),
    ),
    "reconstruction_unrefined": Section(
        "",
        "python benchmarks/evaluation.py --data data/small --mode reconstruction",
        "",
        no_table,
        "refiners",
    ),
    "reconstruction_1024": Section(
        "",
        "python benchmarks/evaluation.py --mode reconstruction --resolution 1024 --model DIR --meshes FILE",
        "Reconstructions of validation meshes, compared with the outer surfaces of the meshes themselves, in model"
        " space [-1, 1]^3; 419 meshes to train on:",
        evaluation_table,
        "vae 1024",
    ),
    "lora": Section("", "python benchmarks/lora.py --work DIR", "", lora_sentence),
    "soak": Section("", "python benchmarks/soak.py", "", soak_sentence, "soak"),
    "mutants": Section("", "make mutants", "", mutants_sentence, "mutants"),
    "test_gpu": Section("", "make test-gpu", "", tests_sentence),
}
