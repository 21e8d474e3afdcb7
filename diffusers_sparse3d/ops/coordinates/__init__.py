"""Operators on voxel coordinates; `[N, 4]` int32 rows (batch, x, y, z), 0 <= x, y, z < 2048."""

from .reference import (
    MAX_RESOLUTION,
    Partition,
    check_coords,
    cumulative,
    decode_coords,
    downsample_coords,
    encode_coords,
    invert_permutation,
    neighbour_map,
    offset_index,
    partition_coords,
    subdivide_coords,
    subdivide_neighbour_map,
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
