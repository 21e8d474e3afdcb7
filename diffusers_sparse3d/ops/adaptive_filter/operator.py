"""The adaptive filter as a differentiable operator of PyTorch, opaque to `torch.compile`. Needs the package triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..runtime.operators import operator
from .kernels.gradients import filter_gradients
from .kernels.neighbour_sum import neighbour_sum


@operator(
    "diffusers_sparse3d::adaptive_filter", mutates_args=(), schema="(Tensor hidden_states, Tensor taps) -> Tensor"
)
def filter_patches(hidden_states: Tensor, taps: Tensor) -> Tensor:
    """The result of `ops.adaptive_filter.adaptive_filter` in the memory format `torch.channels_last_3d`."""
    return neighbour_sum(hidden_states, taps)


@filter_patches.register_fake
def _(hidden_states: Tensor, taps: Tensor) -> Tensor:
    batch_size, channels, *sizes = hidden_states.shape
    return hidden_states.new_empty(batch_size, *sizes, channels).movedim(-1, 1)


@operator(
    "diffusers_sparse3d::adaptive_filter_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor hidden_states, Tensor taps, Tensor output) -> (Tensor, Tensor)",
)
def _filter_backward(
    grad_output: Tensor, hidden_states: Tensor, taps: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `hidden_states` and `taps`, from that of the result and what the operator took and returned."""
    return filter_gradients(grad_output, hidden_states, taps, output)


@_filter_backward.register_fake
def _(grad_output: Tensor, hidden_states: Tensor, taps: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    grad_hidden_states, grad_taps = (
        tensor.new_empty(tensor.shape[0], *tensor.shape[2:], tensor.shape[1]).movedim(-1, 1)
        for tensor in (hidden_states, taps)
    )
    return grad_hidden_states, grad_taps


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    return _filter_backward(grad_output, *ctx.saved_tensors)


filter_patches.register_autograd(_gradients, setup_context=_keep)
