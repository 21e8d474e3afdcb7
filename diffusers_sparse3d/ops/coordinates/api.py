"""Neighbour maps: by Triton kernels on a GPU, in plain PyTorch elsewhere."""

from __future__ import annotations

from torch import Tensor

from ..runtime.dispatch import runs_kernels
from . import reference
from .voxels import check_voxel_rows


def neighbour_map(coords: Tensor) -> Tensor:
    """Rows of the 3x3x3 neighbours of every voxel: by a hash table on a GPU with triton, else by sorted search.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z), distinct, in any order.

    Returns:
        `[27, N]` int32: entry (k, i) is the row of voxel i plus offset k = (k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1) in
        (x, y, z), or N where that voxel does not exist.

    Raises:
        TypeError, ValueError: if `coords` is no tensor of integers of this shape.
    """
    check_voxel_rows(coords)
    if runs_kernels(coords):
        from .kernels import neighbour_map as kernels

        return kernels.neighbour_map(coords)
    return reference.neighbour_map(coords)


def subdivide_neighbour_map(neighbours: Tensor) -> Tensor:
    """The neighbour map of `subdivide_coords(coords)`, from that of `coords`, without a search.

    Args:
        neighbours: `[27, N]` int32.

    Returns:
        `[27, 8 N]` int32.
    """
    if runs_kernels(neighbours):
        from .kernels import subdivided_map

        return subdivided_map.subdivide_neighbour_map(neighbours)
    return reference.subdivide_neighbour_map(neighbours)
