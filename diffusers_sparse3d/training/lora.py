"""Fine-tunes the transformers of a pipeline on a user's meshes: LoRA, DoRA, or all weights.

The base weights are frozen; adapters alone are trained, averaged and written in checkpoints. `lora_options` has the
command line.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from .. import DenseDiT, DenseVAE, Direct3DS2Pipeline, SparseDiT
from ..checks import check_packages
from ..loaders.lora import LORA_COMPONENTS
from .configuration import check_training_support
from .dataset import SparseSDFDataset, check_dense_resolution
from .distributed import TrainingAccelerator, make_accelerator, on_main_process
from .dit import DiTConfig, load_transformer, make_trainer
from .files import complete_folder
from .lora_card import push_to_hub, write_card
from .lora_data import check_preparation_support, is_dataset, prepare_meshes
from .lora_options import parse_arguments
from .lora_trainer import FineTuner, ValidationImages, find_trackers, start_trackers


ADAPTER = "default"
# Stage, VAE and scheduler of each transformer.
PARTS = {
    "transformer": ("sparse", "vae", "scheduler"),
    "dense_transformer": ("dense", "dense_vae", "dense_scheduler"),
    "transformer_1024": ("sparse", "vae_1024", "scheduler_1024"),
}


class LoraWeights:
    """The trained adapters of a pipeline's transformers: weights and settings by the name of the transformer."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.settings: dict[str, dict[str, Any]] = {}

    def add(self, name: str, transformer: Any) -> None:
        """Takes the adapter of a transformer, on the CPU."""
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
        self.layers[name] = {key: value.detach().cpu() for key, value in layers.items()}
        self.settings[name] = transformer.peft_config[ADAPTER].to_dict()

    def save(self, folder: Path) -> None:
        """Writes the file that `load_lora_weights` loads."""
        layers = {f"{name}_lora_layers": value for name, value in self.layers.items()}
        settings = {f"{name}_lora_adapter_metadata": value for name, value in self.settings.items()}
        # Untyped, as diffusers' top level hides the types of its pipelines.
        pipeline: Any = Direct3DS2Pipeline
        pipeline.save_lora_weights(folder, **layers, **settings)


def find_pipeline(name: str, revision: str | None, components: Sequence[str]) -> Path:
    """Returns the folder of a pipeline, downloaded if it is on the hub, without pickled files.

    Raises:
        ValueError: if it is no pipeline or lacks one of the transformers.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`pretrained_model_name_or_path` must be a pipeline, {folder} has no model_index.json")
    parts = [part for component in components for part in (component, *PARTS[component][1:])]
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise ValueError(f"`components` must be of the pipeline {name}, which has no {', '.join(missing)}")
    return folder


def pipeline_resolutions(folder: Path, components: Sequence[str]) -> list[int]:
    """Returns the resolutions of the SDFs that the training of some transformers needs, in samples per axis."""
    sizes = [
        DenseVAE.load_config(folder / "dense_vae")["sample_size"]
        if PARTS[name][0] == "dense"
        else SparseDiT.load_config(folder / name)["sample_size"]
        for name in components
    ]
    return sorted({8 * size for size in sizes})


def data_folder(args: argparse.Namespace) -> Path:
    """Returns the folder of the dataset, which the meshes are prepared in if they are none yet."""
    return args.instance_data_dir if is_dataset(args.instance_data_dir) else args.output_dir / "data"


def prepare_data(args: argparse.Namespace, folder: Path) -> None:
    """Prepares the meshes, unless they are a dataset already, and checks that the pipeline can be trained on them.

    Raises:
        ValueError: if the dataset is of other resolutions than the pipeline, or there is no mesh.
    """
    resolutions = pipeline_resolutions(folder, args.components)
    if not is_dataset(args.instance_data_dir):
        encoder = AutoConfig.from_pretrained(folder / "image_encoder")
        dense = folder / "dense_transformer"
        aligned = dense.is_dir() and DenseDiT.load_config(dense).get("pixel_aligned", False)
        prepare_meshes(args, resolutions, encoder.image_size, exact=aligned)
    dataset = SparseSDFDataset(data_folder(args), "train", resolutions)
    if "dense_transformer" in args.components:
        size = DenseVAE.load_config(folder / "dense_vae")["sample_size"]
        check_dense_resolution(dataset, size, "instance_data_dir")


def component_config(args: argparse.Namespace, folder: Path, name: str) -> DiTConfig:
    """Returns the configuration of the training of one transformer."""
    stage, vae, scheduler = PARTS[name]
    output = args.output_dir / name
    resume = args.resume_from_checkpoint
    # A checkpoint is of one transformer; those before it are finished, and the others are new.
    if resume not in (None, "latest"):
        resume = resume if Path(resume).resolve().parent == output.resolve() else "latest"
    same = (
        "seed", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps",
        "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "mixed_precision", "ema_decay",
        "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "num_pictures",
        "logging_steps", "cpu", "conditioning_dropout", "face_camera", "mirror", "color_jitter", "max_tokens",
    )  # fmt: skip
    return DiTConfig(
        data=str(data_folder(args)),
        output_dir=str(output),
        stage=stage,
        vae=str(folder / vae),
        pretrained=str(folder / name),
        image_encoder=str(folder / "image_encoder"),
        cache_dir=str(args.output_dir / "cache"),
        latents_dir=str(args.output_dir / "cache" / vae),
        batch_size=args.train_batch_size,
        weight_decay=args.adam_weight_decay,
        sigma_sampling=args.weighting_scheme,
        shift=FlowMatchEulerDiscreteScheduler.load_config(folder / scheduler)["shift"],
        sample_posterior=False,
        num_workers=args.dataloader_num_workers,
        encode_batch_size=args.train_batch_size,
        resume_from_checkpoint=resume,
        **{key: getattr(args, key) for key in same},
    )


def add_adapter(transformer: DenseDiT | SparseDiT, args: argparse.Namespace) -> None:
    """Freezes a transformer and adds the adapter that is trained.

    Raises:
        ValueError: if no layer has one of the names.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    if not any(name.endswith(f".{layer}") for name, _ in transformer.named_modules() for layer in args.lora_layers):
        raise ValueError(f"`lora_layers` must name layers of {type(transformer).__name__}, got {args.lora_layers}")
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_layers),
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
    )
    transformer.add_adapter(config, ADAPTER)


def fine_tune(
    args: argparse.Namespace, config: DiTConfig, accelerator: TrainingAccelerator, images: ValidationImages
) -> DenseDiT | SparseDiT:
    """Trains one transformer, or adapters of it, and returns it with the averaged weights."""
    transformer = load_transformer(config)
    if not args.full:
        add_adapter(transformer, args)
    trainer: Any = make_trainer(config, accelerator, transformer, FineTuner)
    trainer.images = images
    trainer.train()
    return trainer.task.transformer


def save_pipeline(folder: Path, transformers: dict[str, Any], output: Path) -> None:
    """Saves a pipeline with other transformers, in the dtype of the files that it was loaded from.

    The folder is complete or as it was.
    """
    name = next(iter(transformers))
    with safe_open(next((folder / name).glob("*.safetensors")), "pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    pipeline = DiffusionPipeline.from_pretrained(folder, **transformers).to(dtype)
    with complete_folder(output) as partial:
        pipeline.save_pretrained(partial)


def check_support(args: argparse.Namespace) -> None:
    """Raises an ImportError that says what to install if a package is missing that a fine-tuning needs, even late."""
    check_training_support(args.optimizer)
    if not args.full:
        check_packages("LoRA", "peft")
    if args.validation_image:
        check_packages("`--validation_image`", "embreex")
    find_trackers(args)
    check_preparation_support(args)


def train(args: argparse.Namespace) -> None:
    """Fine-tunes the transformers that `lora_options.parse_arguments` names and saves the result in OUTPUT_DIR.

    Raises:
        ImportError: if a package is missing, before any work; where meshes were prepared before, one that further
            meshes need, when they are prepared.
        ValueError: if the arguments do not fit the pipeline, or the meshes cannot be used.
    """
    check_support(args)
    names = [name for name in LORA_COMPONENTS if name in args.components]
    folder = find_pipeline(args.pretrained_model_name_or_path, args.revision, names)
    weights, trained = LoraWeights(), dict[str, Any]()
    for name in names:
        config = component_config(args, folder, name)
        accelerator = make_accelerator(config)
        start_trackers(accelerator, args)
        if name == names[0]:
            on_main_process(accelerator, lambda: prepare_data(args, folder))
        images = ValidationImages(args.validation_image or [], folder, name, trained, args.seed)
        trained[name] = fine_tune(args, config, accelerator, images).to("cpu")
        if not args.full:
            weights.add(name, trained[name])
        if name != names[-1]:
            close(accelerator)
    on_main_process(accelerator, lambda: save_result(args, folder, weights, trained))
    accelerator.end_training()


def close(accelerator: TrainingAccelerator) -> None:
    """Ends what an accelerator does for one transformer; `end_training` would part the processes for good."""
    for tracker in accelerator.trackers:
        tracker.finish()
    if accelerator.output_folder is not None:
        accelerator.output_folder.release()
    accelerator.free_memory()


def save_result(args: argparse.Namespace, folder: Path, weights: LoraWeights, trained: dict[str, Any]) -> None:
    """Saves the weights with their card, or the pipeline, and uploads them with `--push_to_hub`."""
    if args.full:
        save_pipeline(folder, trained, args.output_dir / "pipeline")
    else:
        weights.save(args.output_dir)
        write_card(args)
    if args.push_to_hub:
        push_to_hub(args)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `train`."""
    train(parse_arguments(arguments, prog))
