"""The public function of the adaptive filter."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_floating
from ..runtime.dispatch import runs_kernels
from .reference import NUM_TAPS, adaptive_filter_reference


def adaptive_filter(hidden_states: Tensor, taps: Tensor) -> Tensor:
    """The weighted mean of the 27 neighbours of every voxel of dense patches, by weights of its own.

    `output[p] = sum_t taps[t, p] * hidden_states[p + offset_t] / sum_t |taps[t, p]|`, computed in float32 or better.
    Tap `9 (dx + 1) + 3 (dy + 1) + dz + 1` belongs to the neighbour at (dx, dy, dz). Voxels beyond the patch count as
    zeros. Because the taps are divided by the sum of their magnitudes, the filter never amplifies.

    float16, bfloat16 and float32 on a GPU run Triton kernels, forward and backward, if the package triton is
    installed; everything else runs the reference. Both are differentiable, the kernels once.

    Args:
        hidden_states: `[B, C, X, Y, Z]` floating point. The memory format `torch.channels_last_3d` saves a copy.
        taps: `[B, 27, X, Y, Z]` in the same dtype; likewise.

    Returns:
        `[B, C, X, Y, Z]` in the dtype of `hidden_states`.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if a shape or dtype does not fit.
    """
    check_floating(hidden_states=hidden_states, taps=taps)
    expected = (hidden_states.shape[0], NUM_TAPS, *hidden_states.shape[2:])
    if hidden_states.ndim != 5 or taps.shape != expected:
        raise ValueError(
            f"`taps` must have shape {list(expected)} for `hidden_states` of shape [B, C, X, Y, Z], got"
            f" {list(taps.shape)} and {list(hidden_states.shape)}"
        )
    if taps.dtype != hidden_states.dtype:
        raise ValueError(f"`taps` must have the dtype of `hidden_states`, {hidden_states.dtype}, got {taps.dtype}")
    if runs_kernels(hidden_states) and hidden_states.numel():
        from .operator import filter_patches

        return filter_patches(hidden_states, taps)
    return adaptive_filter_reference(hidden_states, taps)
