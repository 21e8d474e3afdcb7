"""Pooling of packed voxel features: Triton kernels on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..runtime.dispatch import runs_kernels
from .reference import sparse_mean_pool_reference


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


__all__ = ["plan_sparse_mean_pool", "sparse_mean_pool"]


def plan_sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int) -> None:
    """Derive all from the coordinates that `sparse_mean_pool` needs; `cache` keeps it.

    `sparse_mean_pool` would do so at its first call. After this, it does not wait for the GPU, may be captured in a
    CUDA graph, and is traced by `torch.compile(fullgraph=True)`.

    Args:
        feats: `[*, C]`; only dtype and device are looked at.
        cache: of the coordinates of the voxels.
        factor: how much coarser the grid is.
    """
    cache.downsample(factor)
    if runs_kernels(feats) and cache.coords.shape[0]:
        from . import kernels

        kernels.plan_pooling(cache, factor)


def sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int, exact_mean: bool = False) -> Tensor:
    """Average the features of the voxels that share a voxel of a coarser grid, accumulating in float32 or better.

    Differentiable (once) in `feats`. float16, bfloat16 and float32 on a GPU run Triton kernels if the package triton
    is installed; everything else runs the reference.

    Args:
        feats: `[N, C]` floating point.
        cache: of the coordinates of the N voxels.
        factor: how much coarser the grid is.
        exact_mean: divide by the number of children. The published operator, which the checkpoints were trained
            with, divides by that number plus one.

    Returns:
        `[M, C]` in the dtype of `feats`, on the voxels of `cache.downsample(factor)`.
    """
    if runs_kernels(feats) and feats.shape[0]:
        from . import kernels

        return kernels.sparse_mean_pool(feats, cache, factor, exact_mean)
    coarse, parents = cache.downsample(factor)
    return sparse_mean_pool_reference(feats, parents, coarse.coords.shape[0], exact_mean)
