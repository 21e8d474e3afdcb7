"""Weights and moments of AdamW under DeepSpeed's ZeRO, whole and by the names of parameters, as checkpoints hold them.

DeepSpeed keeps both in flat partitions, and saves them as pickles of one number of processes; this reads and writes
them through its interface for single parameters. All processes must call each function together.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer


MOMENTS = ("exp_avg", "exp_avg_sq")


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def master_weights(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the float32 weights that the optimizer works on; those of the model may have half precision."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}


def set_master_weights(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Sets the weights that the optimizer works on, and those of the model, to whole float32 tensors."""
    from deepspeed.utils import safe_set_full_fp32_param

    with torch.no_grad():
        for name, parameter in parameters.items():
            safe_set_full_fp32_param(parameter, values[name])
            parameter.copy_(values[name])


def moments(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns AdamW's moments and steps by PARAMETER/KEY, nothing before the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    steps = [state["step"] for state in _base(optimizer).state.values() if "step" in state]
    if not steps:
        return {}
    tensors = {}
    for name, parameter in parameters.items():
        for key in MOMENTS:
            tensors[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
        tensors[f"{name}/step"] = torch.as_tensor(steps[0], dtype=torch.float32).clone()
    return tensors


def set_moments(parameters: dict[str, nn.Parameter], optimizer: Optimizer, values: dict[str, Tensor]) -> None:
    """Sets AdamW's moments and steps to those of `moments`."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if not values:
        return
    _make_moments(optimizer, next(value for name, value in values.items() if name.endswith("/step")))
    for name, parameter in parameters.items():
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[f"{name}/{key}"], key)


def _make_moments(optimizer: Any, step: Tensor) -> None:
    """Makes the moments of flat partitions, zeros, which DeepSpeed otherwise does at the first step."""
    base = _base(optimizer)
    for group in base.param_groups:
        for partition in group["params"]:
            zeros = {key: torch.zeros_like(partition) for key in MOMENTS}
            device = partition.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
            base.state[partition] = {"step": step.to(device), **zeros}
    # What each parameter has of the partitions.
    optimizer.optimizer._lazy_init_hp_params_optimizer_state()


def _base(optimizer: Any) -> Optimizer:
    """The optimizer inside of Accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
