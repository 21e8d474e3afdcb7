"""The public function of the RMS norm of heads."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_floating
from ..runtime.dispatch import next_power_of_2, runs_kernels
from .reference import head_rms_norm_reference


# Values of a token, padded to powers of two, that a kernel has in registers at once, at most.
MOST_VALUES = 8192


def head_rms_norm(hidden_states: Tensor, gamma: Tensor) -> Tensor:
    """Every head of a token divided by its root mean square, times `gamma`: the published q/k RMS norm.

    Differentiable (once). float16, bfloat16 and float32 on a GPU run Triton kernels if the package triton is
    installed, in one pass and computed in float32; everything else runs the reference.

    Args:
        hidden_states: `[..., H, D]` queries or keys; rows of a wider tensor cost no copy.
        gamma: `[H, D]`.

    Returns:
        A tensor of the shape and dtype of `hidden_states`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape or dtype does not fit.
    """
    check_floating(hidden_states=hidden_states, gamma=gamma)
    if hidden_states.ndim < 3 or gamma.shape != hidden_states.shape[-2:]:
        raise ValueError(
            f"`gamma` must have shape [H, D] of the [..., H, D] of `hidden_states`, got {list(gamma.shape)} and"
            f" {list(hidden_states.shape)}"
        )
    heads, dim = gamma.shape
    padded = next_power_of_2(heads) * next_power_of_2(dim)
    if not runs_kernels(hidden_states) or not hidden_states.numel() or padded > MOST_VALUES:
        return head_rms_norm_reference(hidden_states, gamma)
    from .operator import normalize_heads

    return normalize_heads(hidden_states.flatten(0, -3), gamma).view(hidden_states.shape)
