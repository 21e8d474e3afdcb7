"""The kernel of the adaptive filter as an operator of PyTorch, opaque to `torch.compile`. Needs the package triton."""

from __future__ import annotations

from torch import Tensor

from ..runtime.operators import operator
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
