"""Group normalisation of packed voxel features."""

from __future__ import annotations

from torch import Tensor

from .reference import sparse_group_norm_reference


__all__ = ["sparse_group_norm"]


def sparse_group_norm(
    feats: Tensor,
    batch_index: Tensor,
    batch_size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each sample over its voxels and the channels of each group, computed in float32 or better.

    Differentiable (once) in `feats`, `weight` and `bias`.

    Args:
        feats: `[N, C]` floating point.
        batch_index: `[N]` integer, the sample of each row, in any order.
        batch_size: number of samples; empty ones are fine.
        num_groups: a divisor of C.
        weight: `[C]` scale.
        bias: `[C]` shift.
        eps: added to the (biased) variance.

    Returns:
        `[N, C]` in the dtype of `feats`.
    """
    return sparse_group_norm_reference(feats, batch_index, batch_size, num_groups, weight, bias, eps)
