"""Operators on voxel coordinates; `[N, 4]` int32 rows (batch, x, y, z), 0 <= x, y, z < 2048."""

from __future__ import annotations

from torch import Tensor

from ..runtime.dispatch import runs_kernels
from . import reference
from .reference import (
    MAX_RESOLUTION,
    Partition,
    check_coords,
    cumulative,
    decode_coords,
    downsample_coords,
    encode_coords,
    invert_permutation,
    offset_index,
    partition_coords,
    subdivide_coords,
    unique_coords,
)


__all__ = [
    "MAX_RESOLUTION",
    "Partition",
    "check_coords",
    "cumulative",
    "decode_coords",
    "downsample_coords",
    "encode_coords",
    "invert_permutation",
    "neighbour_map",
    "offset_index",
    "partition_coords",
    "subdivide_coords",
    "subdivide_neighbour_map",
    "unique_coords",
]


def neighbour_map(coords: Tensor) -> Tensor:
    """Rows of the 3x3x3 neighbours of every voxel: by a hash table on a GPU with triton, else by sorted search.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z), distinct, in any order.

    Returns:
        `[27, N]` int32: entry (k, i) is the row of voxel i plus offset k = (k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1) in
        (x, y, z), or N where that voxel does not exist.
    """
    if runs_kernels(coords):
        from . import kernels

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
        from . import kernels

        return kernels.subdivide_neighbour_map(neighbours)
    return reference.subdivide_neighbour_map(neighbours)
