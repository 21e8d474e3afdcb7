"""Neighbour maps as Triton kernels: a hash table of rows, no sort, no synchronisation with the host.

The table holds row numbers. The slot of a voxel keeps what is near in space near in memory: cubes of 4^3 voxels are
hashed to lines of 64 slots, and inside its line a voxel's place is its place in the cube, exclusive-or a number that
the cube is hashed to. A taken slot sends a voxel to another line. With at most a quarter of the slots taken, two
accesses find most neighbours or their absence.

Bytes a voxel: the coordinates (16) and their keys (8, written and read), 16 to 32 of the table, filled once, and the
map itself, 27 x 4, written once; keys and table are read up to 26 times more, mostly from caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ..runtime.launch import Kernel
from . import reference


_AXIS_BITS = tl.constexpr(reference.AXIS_BITS)
_LINE_BITS = tl.constexpr(6)
_INSERT_ROWS = 128
_FIND_ROWS = 32
_SUBDIVIDE_ROWS = 512


@triton.jit
def _slots(x, y, z, batch, attempt, num_lines):
    """Where in the table a voxel is looked for at its n-th attempt."""
    cube = (((batch << _AXIS_BITS) + (x >> 2) << _AXIS_BITS) + (y >> 2) << _AXIS_BITS) + (z >> 2)
    # Multiplicative hashing; the upper half of the product is well mixed.
    mixed = (cube + attempt * 7046029288634856825) * 2654435769497230397
    inside = (x & 3) * 16 + (y & 3) * 4 + (z & 3)
    line = mixed >> 32 & (num_lines - 1)
    return (line << _LINE_BITS) + (inside ^ (mixed >> 26 & 63))


@triton.jit
def _load_coords(coords, rows, valid):
    batch = tl.load(coords + rows * 4, mask=valid, other=0).to(tl.int64)
    x = tl.load(coords + rows * 4 + 1, mask=valid, other=0).to(tl.int64)
    y = tl.load(coords + rows * 4 + 2, mask=valid, other=0).to(tl.int64)
    z = tl.load(coords + rows * 4 + 3, mask=valid, other=0).to(tl.int64)
    return x, y, z, batch


@Kernel
@triton.jit
def _insert_kernel(coords, table, num_rows, num_lines, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    x, y, z, batch = _load_coords(coords, rows.to(tl.int64), valid)
    pending = valid
    attempt = tl.zeros((ROWS,), tl.int64)
    while tl.max(pending.to(tl.int32), 0) > 0:
        slots = _slots(x, y, z, batch, attempt, num_lines)
        # Exchanges have no mask: rows that have their slot expect what no slot holds.
        expected = tl.where(pending, -1, -2)
        found = tl.atomic_cas(table + slots, expected, rows)
        pending = pending & (found != -1)
        attempt += pending.to(tl.int64)


@Kernel
@triton.jit
def _find_kernel(coords, keys, table, neighbours, num_rows, num_lines, ROWS: tl.constexpr, OFFSETS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    x, y, z, batch = _load_coords(coords, rows.to(tl.int64), valid)
    offsets = tl.arange(0, OFFSETS)[:, None]
    dx, dy, dz = offsets % 3 - 1, offsets // 3 % 3 - 1, offsets // 9 - 1
    wanted = valid[None, :] & (offsets < 27)
    key = tl.load(keys + rows, mask=valid, other=0)[None, :]
    key += ((dx.to(tl.int64) << _AXIS_BITS) + dy << _AXIS_BITS) + dz
    x, y, z = x[None, :] + dx, y[None, :] + dy, z[None, :] + dz
    found = tl.zeros((OFFSETS, ROWS), tl.int32) + num_rows
    pending = wanted
    attempt = tl.zeros((OFFSETS, ROWS), tl.int64)
    while tl.max(tl.max(pending.to(tl.int32), 1), 0) > 0:
        slots = _slots(x, y, z, batch[None, :], attempt, num_lines)
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
    """See `ops.coordinates.reference.neighbour_map`."""
    num_rows = coords.shape[0]
    neighbours = torch.empty(27, num_rows, dtype=torch.int32, device=coords.device)
    if num_rows == 0:
        return neighbours
    coords = coords.contiguous()
    line = 1 << _LINE_BITS.value
    num_lines = next_power_of_2(cdiv(4 * num_rows, line))
    table = torch.full((num_lines * line,), -1, dtype=torch.int32, device=coords.device)
    _insert_kernel[(cdiv(num_rows, _INSERT_ROWS),)](coords, table, num_rows, num_lines, _INSERT_ROWS)
    _find_kernel[(cdiv(num_rows, _FIND_ROWS),)](
        coords, reference.encode_coords(coords), table, neighbours, num_rows, num_lines, _FIND_ROWS, 32
    )
    return neighbours


@Kernel
@triton.jit
def _subdivide_kernel(parents, neighbours, num_parents, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_rows = num_parents * 8
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
    """See `ops.coordinates.reference.subdivide_neighbour_map`."""
    num_parents = neighbours.shape[1]
    subdivided = neighbours.new_empty(27, 8 * num_parents)
    if num_parents:
        programs = cdiv(8 * num_parents, _SUBDIVIDE_ROWS)
        _subdivide_kernel[(programs,)](neighbours.contiguous(), subdivided, num_parents, _SUBDIVIDE_ROWS)
    return subdivided
