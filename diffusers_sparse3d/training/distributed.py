"""The accelerator of a training: what the launcher and the configuration say, and how models are prepared by it."""

import copy
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from .configuration import TrainingConfig
from .deepspeed_state import uses_deepspeed
from .output_folder import OutputFolder
from .shards import clean_name, share, whole
from .task import Task


logger = logging.getLogger(__name__)

# Parameters of the smallest model that FSDP2 shards block by block. Smaller ones are gathered at once: a block would
# be done before the host has gathered the next one.
SHARDED_IN_BLOCKS = 100_000_000
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Result = TypeVar("Result")


class TrainingAccelerator(Accelerator):
    """An accelerator with the output folder of its training.

    Attributes:
        output_folder: The folder, in the main process; None in the others.
    """

    output_folder: OutputFolder | None = None

    def end_training(self) -> None:
        """Ends the training and lets other runs have its output folder."""
        super().end_training()
        if self.output_folder is not None:
            self.output_folder.release()


def make_accelerator(config: TrainingConfig) -> TrainingAccelerator:
    """Makes the accelerator of a training and sets all seeds, alike in all processes so that initial weights agree.

    Settings that the configuration leaves out are those of the launcher.

    Raises:
        ValueError: if the output folder cannot be used, see `OutputFolder`, or the launcher asks for FSDP1 or for
            DeepSpeed on the CPU.
    """
    if config.cpu and _launcher_asks_for("DEEPSPEED"):
        # Accelerate would train as if nobody had asked for DeepSpeed.
        raise ValueError(
            "`cpu` must be false under DeepSpeed, which needs GPUs, got true: train on the CPU without"
            " `--use_deepspeed`, in one process, in several (DDP) or with FSDP2"
        )
    plugin = GradientAccumulationPlugin(
        num_steps=launched(config, "gradient_accumulation_steps", int, 1),
        # Training is an endless stream of batches, without ends of epochs at which gradients would be synchronised.
        sync_with_dataloader=False,
    )
    accelerator = TrainingAccelerator(
        cpu=config.cpu,
        mixed_precision=launched(config, "mixed_precision", str, None),
        gradient_accumulation_plugin=plugin,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.process_timeout_minutes)),
            # Gradients are where they are averaged: none is held twice, and none copied there and back.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if _launcher_asks_for("FSDP"):
        _set_up_fsdp(accelerator, config)
    if uses_deepspeed(accelerator) and config.gradient_accumulation_steps is None:
        follow_deepspeed(accelerator)
    accelerator.output_folder = on_main_process(
        accelerator, lambda: OutputFolder(Path(config.output_dir), config.resume_from_checkpoint)
    )
    set_seed(config.seed)
    return accelerator


def launched(config: TrainingConfig, name: str, kind: Callable[[str], Result], default: Result | None) -> Any:
    """Returns a setting of the configuration or, if it is None, of the launcher; says so if both differ."""
    text = os.environ.get(f"ACCELERATE_{name.upper()}")
    from_launcher = default if text is None else kind(text)
    value = getattr(config, name)
    if value is None:
        return from_launcher
    if text is not None and value != from_launcher and int(os.environ.get("RANK", 0)) == 0:
        message = "`%s` is %s, as the configuration says, not %s, as the launcher says."
        logger.warning(message, name, value, from_launcher)
    return value


def follow_deepspeed(accelerator: Accelerator) -> None:
    """Takes the forward passes of a step from a file of DeepSpeed's settings, where the launcher gives no others."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    passes = settings.get("gradient_accumulation_steps", "auto")
    if passes != "auto" and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ:
        accelerator.gradient_accumulation_steps = int(passes)


def _launcher_asks_for(library: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{library}", "false").lower() == "true"


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result | None:
    """Calls a function in the main process; returns its result there and None elsewhere.

    Raises:
        Exception: that of the function, in the main process, and one with its message in all others, so that none
            waits for the others for ever.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except Exception as caught:
            error = caught
    message = share(None if error is None else str(error))
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"The main process stopped: {message}")
    return result


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The precision of forward passes, the same whatever way the model is distributed.

    FSDP2 and DeepSpeed cast parameters alone; what the model makes by itself, such as embeddings of coordinates, is
    float32.
    """
    dtype = DTYPES[accelerator.mixed_precision]
    return torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are sharded, so that all processes must take part in every forward pass."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare(
    accelerator: Accelerator, task: Task, optimizer: Optimizer, config: TrainingConfig
) -> tuple[nn.Module, Optimizer]:
    """Wraps a task and its optimizer as the launcher says, and returns both.

    The parameters of the task are others afterwards where they are sharded.
    """
    if uses_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        if settings.get("zero_optimization", {}).get("stage", 0) > 2 or config.optimizer != "adamw":
            raise ValueError(
                "`zero_stage` must be at most 2 and `optimizer` 'adamw' under DeepSpeed, got"
                f" {settings.get('zero_optimization')} and {config.optimizer!r}: FSDP2 shards weights, and takes Muon"
            )
        _complete_deepspeed(settings, config, accelerator.gradient_accumulation_steps)
    # Block classes of the models, which FSDP2 shards one by one, and computes again if the launcher asks for it.
    computes_again = is_sharded(accelerator) and accelerator.state.fsdp_plugin.activation_checkpointing
    smallest = 0 if computes_again else SHARDED_IN_BLOCKS
    task._no_split_modules = sorted({name for module in task.modules() for name in _block_names(module, smallest)})
    model, prepared = accelerator.prepare(task, optimizer)
    if is_sharded(accelerator):
        from torch.distributed.fsdp import register_fsdp_forward_method

        # Pictures are drawn without `forward`.
        register_fsdp_forward_method(task, "pictures")
    return model, prepared


def _complete_deepspeed(settings: dict[str, Any], config: TrainingConfig, num_passes: int) -> None:
    """Writes the forward passes of a step, and what the launcher leaves open, into the settings of DeepSpeed.

    Accelerate would take the passes from there, and the batches of the steps have been made for those of the training.
    """
    settings["gradient_accumulation_steps"] = num_passes
    for name, value in (
        ("train_micro_batch_size_per_gpu", config.batch_size),
        ("gradient_clipping", config.max_grad_norm),
    ):
        if settings.get(name, "auto") == "auto":
            settings[name] = value


def unsharded_copy(task: Task) -> dict[str, nn.Module]:
    """Returns copies of the submodules of a task without memory for their parameters, from before it is sharded."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in task.parameters()
    }
    return {name: copy.deepcopy(module, dict(empty)) for name, module in task.named_children()}


def use_unsharded(task: Task, copies: dict[str, nn.Module], values: dict[str, Tensor]) -> None:
    """Puts whole submodules in the place of sharded ones, in all processes together.

    Args:
        task: The task, whose submodules are sharded unless this was called before.
        copies: The submodules of `unsharded_copy`.
        values: Values of parameters by their names, in the place of the current ones.
    """
    current = {clean_name(name): parameter for name, parameter in task.named_parameters()}
    for child, module in copies.items():
        for name, parameter in list(module.named_parameters()):
            place = f"{child}.{name}"
            value = whole(values.get(place, current[place]).detach()).to(parameter.dtype, copy=True)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, nn.Parameter(value, parameter.requires_grad))
        setattr(task, child, module)


def _block_names(module: nn.Module, smallest: int) -> list[str]:
    """The classes that a model of at least `smallest` parameters says must not be split and has, by their names."""
    names = set(getattr(module, "_no_split_modules", None) or ())
    if names and sum(parameter.numel() for parameter in module.parameters()) < smallest:
        return []
    return [name for name in names if any(type(part).__name__ == name for part in module.modules())]


def _set_up_fsdp(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Checks the launcher's settings of FSDP and makes its precision that of `autocast`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("`fsdp_version` must be 2 in the configuration of the launcher, got 1")
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate would train on CPUs as if nobody had asked for FSDP.
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if state.distributed_type != DistributedType.FSDP:
        return
    if config.optimizer == "adamw_8bit":
        raise ValueError(
            "`optimizer` must be 'adamw' or 'muon' under FSDP2, got 'adamw_8bit', which cannot be sharded"
        )
    plugin = state.fsdp_plugin
    if accelerator.mixed_precision != "no":
        dtype = DTYPES[accelerator.mixed_precision]
        # Inputs and outputs stay as they are: losses, coordinates and timesteps in half precision would be wrong.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
    if config.gradient_checkpointing and plugin.activation_checkpointing:
        plugin.activation_checkpointing = False
        logger.warning("Activations are computed again by the model, not by FSDP2: both do the same.")
