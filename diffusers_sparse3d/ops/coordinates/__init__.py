"""Operators on voxel coordinates; `[N, 4]` int32 rows (batch, x, y, z), 0 <= x, y, z < 2048."""

from .api import neighbour_map, subdivide_neighbour_map
from .partition import Partition, cumulative, invert_permutation, partition_coords
from .reference import offset_index
from .voxels import (
    MAX_RESOLUTION,
    MAX_SAMPLES,
    check_coords,
    check_voxel_rows,
    decode_coords,
    downsample_coords,
    encode_coords,
    subdivide_coords,
    unique_coords,
)


__all__ = [
    "MAX_RESOLUTION",
    "MAX_SAMPLES",
    "Partition",
    "check_coords",
    "check_voxel_rows",
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
