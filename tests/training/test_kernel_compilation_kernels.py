"""The kernels that a training compiles ahead are those that its steps launch. On a CPU, where nothing is compiled."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from diffusers_sparse3d.models.checkpointing import checkpoint_keeping_attention
from diffusers_sparse3d.models.kernel_examples import sphere_cells
from diffusers_sparse3d.ops.runtime import compile_ahead
from diffusers_sparse3d.training import kernel_compilation
from diffusers_sparse3d.training.kernel_compilation import ModelExample, compile_model_examples
from tests.ops.kernel_testing import compiled_names, needs_gpu, run_kernels_on_the_cpu, without_gpu
from tests.ops.watched_launches import watched  # noqa: F401 - a fixture

from .process_worker import make_trainer


CPU = torch.device("cpu")
# Of the cells of a sample and of the example.
_RESOLUTION = 5


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """The precision and the device of an accelerator are those of the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def of_a_sphere(image) -> dict[str, torch.Tensor]:
    """A sample with as many tokens as an object has. Attention to a few is by other kernels."""
    cells = sphere_cells(_RESOLUTION, 1, CPU)[1:, 1:]
    mean = torch.randn(len(cells), 4).half()
    resolution = torch.tensor(8 * _RESOLUTION)
    return {
        "coords": cells,
        "mean": mean,
        "logvar": torch.full_like(mean, -2.0),
        "image": image,
        "resolution": resolution,
    }


def compiled_ahead(trainer, watched) -> list[str]:  # noqa: F811
    """Compile the kernels of a trainer ahead; their names."""
    examples = trainer.task.kernel_examples(trainer.validation is not None)
    result = compile_ahead.compile_ahead([example.under(trainer.accelerator) for example in examples], CPU)
    assert result.errors == [] and watched.launched == set()
    assert all(parameter.grad is None for parameter in trainer.task.parameters())
    return [name for name, *_ in watched.ahead]


@without_gpu
@pytest.mark.parametrize("kind", ["dit", "vae", "camera"])
def test_steps_launch_what_was_compiled_ahead(kind, watched, tmp_path):  # noqa: F811
    one = dict.fromkeys(("gradient_accumulation_steps", "batch_size", "num_validation_samples", "max_train_steps"), 1)
    trainer = make_trainer(kind, tmp_path, **one)
    items = trainer.dataset.items
    # The smallest sample alone, for the interpreter.
    item = items[0]
    if kind == "dit":
        # To decode so many tokens takes the interpreter minutes.
        item, trainer.validation = of_a_sphere(item["image"]), None
        trainer.task.transformer.register_to_config(sample_size=_RESOLUTION)
    items[:] = [item] * len(items)
    compiled_ahead(trainer, watched)
    trainer.train()
    assert len(watched.launched) > 3 and not (missing := watched.launched - watched.ahead), missing


@without_gpu
@pytest.mark.parametrize("kind", ["lora", "dense_vae", "refiner"])
def test_examples_of_other_trainings_have_gradients(kind, watched, tmp_path):  # noqa: F811
    trainer = make_trainer(kind, tmp_path, gradient_accumulation_steps=1, max_train_steps=1)
    backward = [name for name in compiled_ahead(trainer, watched) if "backward" in name or "gradient" in name]
    # A dense VAE of this size has no kernels of ours.
    assert bool(backward) == (kind != "dense_vae")


@without_gpu
@pytest.mark.parametrize("checkpoint", [None, checkpoint_keeping_attention])
def test_examples_are_as_the_training_is(checkpoint, watched, tmp_path, monkeypatch):  # noqa: F811
    """With its gradient checkpointing, and in its precision."""
    dtypes, original = set(), compile_ahead._without_values

    def without_values(arguments):
        dtypes.update(argument.dtype for argument in arguments if isinstance(argument, torch.Tensor))
        return original(arguments)

    monkeypatch.setattr(compile_ahead, "_without_values", without_values)
    in_half = {"mixed_precision": "bf16", "gradient_accumulation_steps": 1, "max_train_steps": 1}
    trainer = make_trainer("dit", tmp_path, **in_half)
    trainer.task.transformer.enable_gradient_checkpointing(checkpoint)
    run_kernels_on_the_cpu(monkeypatch, (torch.bfloat16, torch.float32, torch.int32))
    assert any("backward" in name for name in compiled_ahead(trainer, watched))
    assert torch.bfloat16 in dtypes


def test_which_models_are_compiled_for(monkeypatch, tmp_path):
    trainer, seen = make_trainer("dit", tmp_path, gradient_accumulation_steps=1, max_train_steps=1), []

    def compile_seen(description, examples, device, show_progress):
        seen.append((description, len(examples())))
        return True

    monkeypatch.setattr(kernel_compilation, "compile_examples", compile_seen)
    task, accelerator = trainer.task, trainer.accelerator
    for validates in (True, False, False):
        compile_model_examples(task.kernel_examples(validates), accelerator)
    # A module of somebody else's has neither a device nor a configuration.
    compile_model_examples([ModelExample("linear", torch.nn.Linear(2, 2), lambda: lambda: None)], accelerator)
    # Attention is another one, other weights are trained, activations are computed again, and last the model does
    # something else as well.
    task.transformer.set_attn_processor("window")
    compile_model_examples(task.kernel_examples(False), accelerator)
    task.transformer.proj_out.requires_grad_(False)
    compile_model_examples(task.kernel_examples(False), accelerator)
    task.transformer.enable_gradient_checkpointing()
    compile_model_examples(task.kernel_examples(False), accelerator)
    task.transformer.register_forward_hook(lambda *_: None)
    compile_model_examples(task.kernel_examples(True), accelerator)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
    compile_model_examples(task.kernel_examples(True), accelerator)
    assert [count for _, count in seen] == [3, 1, 1, 1, 1, 1, 1]
    descriptions = [description for description, _ in seen]
    assert descriptions[1] == descriptions[2] and len(set(descriptions)) == 6


@needs_gpu
def test_a_training_on_a_gpu_compiles_little_more(monkeypatch, tmp_path):
    names = compiled_names(monkeypatch)
    half = {"cpu": False, "mixed_precision": "bf16"}
    trainer = make_trainer("dit", tmp_path, gradient_accumulation_steps=1, max_train_steps=3, **half)
    trainer.task.transformer.register_to_config(sample_size=_RESOLUTION)
    items = trainer.dataset.items
    items[:] = [of_a_sphere(items[0]["image"])] * len(items)
    compile_model_examples(trainer.task.kernel_examples(validates=True), trainer.accelerator)
    ahead = len(names)
    trainer.train()
    assert ahead > 20 and len(names) - ahead <= ahead // 5, names[ahead:]


@without_gpu
def test_gradients_are_of_the_thread_that_collects(tmp_path):
    """On a GPU, autograd has threads of its own. What a backward pass needs is planned with gradients enabled."""
    trainer, seen = make_trainer("dit", tmp_path, gradient_accumulation_steps=1, max_train_steps=1), []
    model = torch.nn.Linear(3, 2)

    def make():
        seen.append(torch.is_grad_enabled())

        def call():
            output = model(torch.ones(4, 3))
            if output.requires_grad:
                output.register_hook(lambda _: seen.append(torch._C._is_multithreading_enabled()))
            return SimpleNamespace(sample=output)

        return call

    examples = [ModelExample("linear", model, make, (), trains) for trains in (True, False)]
    result = compile_ahead.compile_ahead([example.under(trainer.accelerator) for example in examples[:1]], CPU)
    assert result.errors == [] and seen == [True, False] and torch._C._is_multithreading_enabled()
    result = compile_ahead.compile_ahead([example.under(trainer.accelerator) for example in examples[1:]], CPU)
    assert result.errors == [] and seen == [True, False, False]
