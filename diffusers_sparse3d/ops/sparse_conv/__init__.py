"""Submanifold sparse convolution on packed voxel features."""

from __future__ import annotations

from torch import Tensor

from .reference import sparse_conv3d_reference, sparse_subdivide_conv3d_reference


__all__ = ["sparse_conv3d", "sparse_subdivide_conv3d"]


def sparse_conv3d(
    feats: Tensor, weight: Tensor, bias: Tensor | None = None, neighbours: Tensor | None = None
) -> Tensor:
    """Submanifold convolution of kernel size 3 or 1: out[p] = bias + sum_k in[p + offset_k] @ weight[k].

    Voxels that do not exist count as zeros. Differentiable (once) in `feats`, `weight` and `bias`. Under autocast it
    runs in the autocast dtype, as the dense convolutions do.

    Args:
        feats: `[N, Cin]` floating point.
        weight: `[27, Cin, Cout]`, offset k = (k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1) in (x, y, z); `[Cin, Cout]` for
            kernel size 1.
        bias: `[Cout]` or None.
        neighbours: `[27, N]` int64 from `CoordinateCache.neighbour_map()`; None for kernel size 1.

    Returns:
        `[N, Cout]`.
    """
    return sparse_conv3d_reference(feats, weight, bias, neighbours)


def sparse_subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """Split every voxel into its eight children, which take over its features, then convolve the children.

    The same as `sparse_conv3d(feats.repeat_interleave(8, 0), weight, bias, cache.subdivide().neighbour_map())`, but
    computed from the parents: an eighth of the gathers, and no neighbour map of the children.

    Args:
        feats: `[N, Cin]` features of the parents.
        weight: `[27, Cin, Cout]` of the convolution on the children.
        bias: `[Cout]` or None.
        neighbours: `[27, N]` int64 neighbour map of the parents.

    Returns:
        `[8 N, Cout]`: the children of voxel i are rows 8 i .. 8 i + 7 in the order of `subdivide_coords`.
    """
    return sparse_subdivide_conv3d_reference(feats, weight, bias, neighbours)
