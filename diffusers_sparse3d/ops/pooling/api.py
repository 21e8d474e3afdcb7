"""Public functions of the pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..checks import check_at_least, check_floating, check_rows, check_shape
from ..runtime.dispatch import runs_kernels
from .plan import plan_pooling
from .reference import sparse_mean_pool_reference


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


def plan_sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int) -> None:
    """Make the coarser grid and the tables that `sparse_mean_pool` needs; `cache` keeps them.

    Without this, the first call of `sparse_mean_pool` makes them. After this, it does not wait for the GPU, may be
    captured in a CUDA graph, and is traced by `torch.compile(fullgraph=True)`.

    Args:
        feats: `[*, C]`; only dtype and device matter.
        cache: of the coordinates of the voxels.
        factor: how much coarser the grid is.
    """
    cache.downsample(factor)
    if runs_kernels(feats) and cache.coords.shape[0]:
        plan_pooling(cache, factor)


def sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int, exact_mean: bool = False) -> Tensor:
    """Average the features of the voxels that share a voxel of a coarser grid, accumulating in float32 or better.

    Differentiable (once) in `feats`. float16, bfloat16 and float32 on a GPU run Triton kernels if the package triton
    is installed; everything else runs the reference.

    Args:
        feats: `[N, C]` floating point.
        cache: of the coordinates of the N voxels.
        factor: how much coarser the grid is.
        exact_mean: whether to divide by the number of children. The published operator, which the checkpoints were
            trained with, divides by that number plus one.

    Returns:
        `[M, C]` in the dtype of `feats`, on the voxels of `cache.downsample(factor)`.

    Raises:
        TypeError, ValueError: if an argument has another type, dtype or shape, or `factor` is not positive.
    """
    check_floating(feats=feats)
    check_shape("feats", feats, "N", "C")
    check_rows("feats", feats, cache)
    check_at_least(1, factor=factor)
    if runs_kernels(feats) and feats.shape[0]:
        from . import operator

        return operator.sparse_mean_pool(feats, cache, factor, exact_mean)
    coarse, parents = cache.downsample(factor)
    return sparse_mean_pool_reference(feats, parents, coarse.coords.shape[0], exact_mean)
