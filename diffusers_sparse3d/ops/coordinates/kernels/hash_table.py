"""A hash table of voxels, made without a sort and without synchronisation with the host.

The table holds row numbers. The slot of a voxel keeps what is near in space near in memory: cubes of 4^3 voxels are
hashed to lines of 64 slots, and inside its line a voxel's place is its place in the cube, exclusive-or a number that
the cube is hashed to. A taken slot sends a voxel to another line. With at most a quarter of the slots taken, two
accesses find most neighbours or their absence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .. import voxels


AXIS_BITS = tl.constexpr(voxels.AXIS_BITS)
_LINE_BITS = tl.constexpr(6)
_TILE_ROWS = 128


@triton.jit
def find_slots(x, y, z, batch, attempt, num_lines):
    """The slots in which voxels are looked for at their n-th attempt.

    Args:
        x, y, z, batch: int64 coordinates, of one shape.
        attempt: n, in the same shape.
        num_lines: lines of the table, a power of two.

    Returns:
        int64 slots in the same shape.
    """
    cube = (((batch << AXIS_BITS) + (x >> 2) << AXIS_BITS) + (y >> 2) << AXIS_BITS) + (z >> 2)
    # Multiplicative hashing; the upper half of the product is well mixed.
    mixed = (cube + attempt * 7046029288634856825) * 2654435769497230397
    inside = (x & 3) * 16 + (y & 3) * 4 + (z & 3)
    line = mixed >> 32 & (num_lines - 1)
    return (line << _LINE_BITS) + (inside ^ (mixed >> 26 & 63))


@triton.jit
def load_coords(coords, rows, valid):
    """x, y, z and batch of some rows of `coords [N, 4]`, int64, zeros where not `valid`."""
    batch = tl.load(coords + rows * 4, mask=valid, other=0).to(tl.int64)
    x = tl.load(coords + rows * 4 + 1, mask=valid, other=0).to(tl.int64)
    y = tl.load(coords + rows * 4 + 2, mask=valid, other=0).to(tl.int64)
    z = tl.load(coords + rows * 4 + 3, mask=valid, other=0).to(tl.int64)
    return x, y, z, batch


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _insert_kernel(coords, table, num_rows, num_lines, ROWS: tl.constexpr):
    """Enter a tile of voxels.

    Args:
        coords: `[N, 4]` int32, distinct.
        table: `[num_lines * 64]` int32, row numbers, -1 in slots that are free.
        num_rows: N.
        num_lines: lines of the table, a power of two.
        ROWS: voxels of a tile.
    """
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    x, y, z, batch = load_coords(coords, rows.to(tl.int64), valid)
    pending = valid
    attempt = tl.zeros((ROWS,), tl.int64)
    while tl.max(pending.to(tl.int32), 0) > 0:
        slots = find_slots(x, y, z, batch, attempt, num_lines)
        # Exchanges have no mask: rows that have their slot expect a value that no slot holds.
        expected = tl.where(pending, -1, -2)
        found = tl.atomic_cas(table + slots, expected, rows)
        pending = pending & (found != -1)
        attempt += pending.to(tl.int64)


@on_device_of_first_argument
def make_table(coords: Tensor) -> tuple[Tensor, int]:
    """`[N, 4]` int32 coordinates, contiguous, N > 0 -> the table, and the number of its lines."""
    num_rows, line = len(coords), 1 << _LINE_BITS.value
    num_lines = next_power_of_2(cdiv(4 * num_rows, line))
    table = torch.full((num_lines * line,), -1, dtype=torch.int32, device=coords.device)
    _insert_kernel[(cdiv(num_rows, _TILE_ROWS),)](coords, table, num_rows, num_lines, ROWS=_TILE_ROWS)
    return table, num_lines
