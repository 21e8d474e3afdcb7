"""Neighbour maps of subdivided voxels, from the maps of their parents."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel


_TILE_ROWS = 512


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _subdivide_kernel(parents, neighbours, num_parents, ROWS: tl.constexpr):
    """The neighbours of a tile of children.

    Args:
        parents: `[27, N]` int32, the map of the parents, N where there is none.
        neighbours: `[27, 8 N]` int32, written.
        num_parents: N.
        ROWS: children of a tile.
    """
    num_rows = num_parents * 8
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    child = rows & 7
    for offset in range(27):
        # Measured from the first child of the own parent, shifted by one parent to be positive: 1..4.
        x = (child >> 2 & 1) + offset % 3 + 1
        y = (child >> 1 & 1) + offset // 3 % 3 + 1
        z = (child & 1) + offset // 9 + 1
        parent_offset = (x >> 1) + 3 * (y >> 1) + 9 * (z >> 1)
        places = parent_offset.to(tl.int64) * num_parents + (rows >> 3)
        parent = tl.load(parents + places, mask=valid, other=0)
        found = parent * 8 + ((x & 1) * 4 + (y & 1) * 2 + (z & 1))
        tl.store(neighbours + rows, tl.where(parent < num_parents, found, num_rows), mask=valid)
        neighbours += num_rows


@on_device_of_first_argument
def subdivide_neighbour_map(neighbours: Tensor) -> Tensor:
    """See `ops.coordinates.subdivide_neighbour_map`."""
    num_parents = neighbours.shape[1]
    subdivided = neighbours.new_empty(27, 8 * num_parents)
    if num_parents:
        programs = cdiv(8 * num_parents, _TILE_ROWS)
        _subdivide_kernel[(programs,)](neighbours.contiguous(), subdivided, num_parents, ROWS=_TILE_ROWS)
    return subdivided
