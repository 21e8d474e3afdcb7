"""Neighbour maps by lookup in a hash table.

Bytes a voxel: the coordinates (16) and their keys (8, written and read), 16 to 32 of the table, filled once, and the
map itself, 27 x 4, written once; keys and table are read up to 26 times more, mostly from caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel
from ..voxels import encode_coords
from .hash_table import AXIS_BITS, find_slots, load_coords, make_table


_TILE_ROWS = 32


@Kernel
@triton.jit
def _find_kernel(coords, keys, table, neighbours, num_rows, num_lines, ROWS: tl.constexpr, OFFSETS: tl.constexpr):
    """Find the neighbours of a tile of voxels.

    Args:
        coords: `[N, 4]` int32.
        keys: `[N]` int64, as `encode_coords` makes them.
        table: as `make_table` makes it.
        neighbours: `[27, N]` int32, written: rows, N where there is none.
        num_rows: N.
        num_lines: lines of the table.
        ROWS: voxels of a tile.
        OFFSETS: 32, the offsets padded to a power of two.
    """
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    x, y, z, batch = load_coords(coords, rows.to(tl.int64), valid)
    # [OFFSETS, 1]
    offsets = tl.arange(0, OFFSETS)[:, None]
    dx, dy, dz = offsets % 3 - 1, offsets // 3 % 3 - 1, offsets // 9 - 1
    # [OFFSETS, ROWS]
    wanted = valid[None, :] & (offsets < 27)
    key = tl.load(keys + rows, mask=valid, other=0)[None, :]
    key += ((dx.to(tl.int64) << AXIS_BITS) + dy << AXIS_BITS) + dz
    x, y, z = x[None, :] + dx, y[None, :] + dy, z[None, :] + dz
    found = tl.zeros((OFFSETS, ROWS), tl.int32) + num_rows
    pending = wanted
    attempt = tl.zeros((OFFSETS, ROWS), tl.int64)
    # A free slot says that the voxel does not exist; a slot with another voxel's row sends on to the next attempt.
    while tl.max(tl.max(pending.to(tl.int32), 1), 0) > 0:
        slots = find_slots(x, y, z, batch[None, :], attempt, num_lines)
        row = tl.load(table + slots, mask=pending, other=-1)
        pending = pending & (row >= 0)
        same = pending & (tl.load(keys + row, mask=pending, other=0) == key)
        found = tl.where(same, row, found)
        pending = pending & (same == 0)
        attempt += 1
    places = offsets.to(tl.int64) * num_rows + rows[None, :]
    tl.store(neighbours + places, found, mask=wanted)


@on_device_of_first_argument
def neighbour_map(coords: Tensor) -> Tensor:
    """See `ops.coordinates.neighbour_map`."""
    num_rows = len(coords)
    neighbours = torch.empty(27, num_rows, dtype=torch.int32, device=coords.device)
    if num_rows:
        coords = coords.contiguous()
        table, num_lines = make_table(coords)
        _find_kernel[(cdiv(num_rows, _TILE_ROWS),)](
            coords, encode_coords(coords), table, neighbours, num_rows, num_lines, ROWS=_TILE_ROWS, OFFSETS=32
        )
    return neighbours
