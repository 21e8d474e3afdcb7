"""
Slots of samples in the active blocks of a grid, and values around samples, in one launch each.

The host launches nothing else and does not wait. Bytes a sample: 12 of its coordinates and 8 of its slot; the table of
blocks and the values around a sample come mostly from caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.runtime.dispatch import cdiv, on_device_of_first_argument
from ...ops.runtime.launch import Kernel


# Samples of a program.
_LANES = 256
# Numbers that kernels are not compiled anew for.
_NUMBERS = ("blocks_per_axis", "num_samples", "num_slots", "resolution")


@triton.jit
def _load_coords(coords, samples, valid):
    """x, y and z of some rows of `coords [N, 3]`, int32; -1 where not `valid`."""
    place = coords + samples.to(tl.int64) * 3
    x = tl.load(place, mask=valid, other=-1).to(tl.int32)
    y = tl.load(place + 1, mask=valid, other=-1).to(tl.int32)
    z = tl.load(place + 2, mask=valid, other=-1).to(tl.int32)
    return x, y, z


@triton.jit
def _find_slots(x, y, z, table, resolution, blocks_per_axis, num_slots, BITS: tl.constexpr):
    """The slots of samples, int64; `num_slots` for those outside the active blocks or the grid."""
    last: tl.constexpr = (1 << BITS) - 1
    in_grid = (x >= 0) & (x < resolution) & (y >= 0) & (y < resolution) & (z >= 0) & (z < resolution)
    block = ((x >> BITS) * blocks_per_axis + (y >> BITS)) * blocks_per_axis + (z >> BITS)
    row = tl.load(table + block, mask=in_grid, other=-1).to(tl.int64)
    inside = ((x & last) << 2 * BITS) + ((y & last) << BITS) + (z & last)
    return tl.where(row >= 0, (row << 3 * BITS) + inside, num_slots)


@Kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _slots_kernel(
    coords,
    table,
    slots,
    num_samples,
    resolution,
    blocks_per_axis,
    num_slots,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Find the slots of samples.

    Args:
        coords: `[num_samples, 3]` integers, samples, in the grid or not.
        table: `[B, B, B]` int32, the row of each block, -1 for inactive ones.
        slots: `[num_samples]` int64, written.
        num_samples: number of samples.
        resolution: samples per axis.
        blocks_per_axis: B.
        num_slots: samples of the active blocks.
        BITS: binary logarithm of the samples per block and axis.
        LANES: samples of a program.
    """
    # [LANES]
    samples = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = samples < num_samples
    x, y, z = _load_coords(coords, samples, valid)
    found = _find_slots(x, y, z, table, resolution, blocks_per_axis, num_slots, BITS)
    tl.store(slots + samples, found, mask=valid)


@Kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _bits_kernel(
    values,
    coords,
    table,
    bits,
    num_samples,
    resolution,
    blocks_per_axis,
    num_slots,
    START: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Join the values of a cube of samples by the bitwise or.

    Args:
        values: `[num_slots + 1]` uint8, the value of each slot.
        coords: `[num_samples, 3]` integers, samples.
        table: `[B, B, B]` int32, the row of each block, -1 for inactive ones.
        bits: `[num_samples]` uint8, written.
        num_samples: number of samples.
        resolution: samples per axis.
        blocks_per_axis: B.
        num_slots: samples of the active blocks.
        START: steps from a sample to the lowest one of its cube, along each axis.
        STEPS: samples of a cube per axis.
        BITS: binary logarithm of the samples per block and axis.
        LANES: samples of a program.
    """
    # [LANES]
    samples = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = samples < num_samples
    x, y, z = _load_coords(coords, samples, valid)
    found = tl.zeros((LANES,), tl.uint8)
    for step in range(STEPS * STEPS * STEPS):
        dx, dy, dz = START + step // (STEPS * STEPS), START + step // STEPS % STEPS, START + step % STEPS
        slots = _find_slots(x + dx, y + dy, z + dz, table, resolution, blocks_per_axis, num_slots, BITS)
        found = found | tl.load(values + slots, mask=valid, other=0)
    tl.store(bits + samples, found, mask=valid)


@on_device_of_first_argument
def find_slots(coords: Tensor, table: Tensor, block_size: int, num_slots: int) -> Tensor:
    """See `BlockGrid.slots`, of a grid with this `table`, `block_size` and `num_slots` slots."""
    slots = torch.empty(len(coords), dtype=torch.int64, device=coords.device)
    if len(coords):
        numbers = len(coords), len(table) * block_size, len(table), num_slots
        _slots_kernel[(cdiv(len(coords), _LANES),)](
            coords.contiguous(), table, slots, *numbers, BITS=block_size.bit_length() - 1, LANES=_LANES
        )
    return slots


@on_device_of_first_argument
def bits_around(values: Tensor, coords: Tensor, table: Tensor, block_size: int, span: range) -> Tensor:
    """See `BlockGrid.bits_around`, of a grid with this `table` and `block_size`."""
    bits = torch.empty(len(coords), dtype=torch.uint8, device=coords.device)
    if len(coords):
        numbers = len(coords), len(table) * block_size, len(table), len(values) - 1
        constants = {"START": span.start, "STEPS": len(span), "BITS": block_size.bit_length() - 1, "LANES": _LANES}
        _bits_kernel[(cdiv(len(coords), _LANES),)](values, coords.contiguous(), table, bits, *numbers, **constants)
    return bits
