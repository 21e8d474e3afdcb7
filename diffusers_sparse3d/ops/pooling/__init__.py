"""Pooling of packed voxel features."""

from __future__ import annotations

from torch import Tensor

from .reference import sparse_mean_pool_reference


__all__ = ["sparse_mean_pool"]


def sparse_mean_pool(feats: Tensor, parents: Tensor, num_parents: int, exact_mean: bool = False) -> Tensor:
    """Average the features of the voxels that share a parent, accumulating in float32 or better.

    Args:
        feats: `[N, C]` floating point.
        parents: `[N]` int64, row of the parent of each voxel, as `CoordinateCache.downsample` gives it.
        num_parents: M, number of parents.
        exact_mean: divide by the number of children. The published operator, which the checkpoints were trained
            with, divides by that number plus one.

    Returns:
        `[M, C]` in the dtype of `feats`.
    """
    return sparse_mean_pool_reference(feats, parents, num_parents, exact_mean)
