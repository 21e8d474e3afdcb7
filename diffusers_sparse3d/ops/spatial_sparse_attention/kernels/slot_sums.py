"""Sums of weights over slots, written to a scratch buffer from the registers of the matrix unit, and read back.

Of each 16 rows and 8 columns of a product, thread 4 r + c of a warp holds the rows r and r + 8 and the columns 2 c and
2 c + 1. Sums are stored in the order in which threads hold them, so that they do not pass through shared memory. If a
compiler has them in other threads, the result is the same, and only slower.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_slot_sums(
    sums, values, first_slot, end_slot, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr
):
    """Stores sums of the slots of one tile of keys.

    Args:
        sums: `[slots, ROWS]`, the buffer, whose rows are in the order of the registers.
        values: `[ROWS, COLUMNS]`, sums of the slots from the first one of the tile on.
        first_slot, end_slot: the first slot of the tile and the slot after its last one.
        ROWS: query rows.
        COLUMNS: slots of a tile at most.
        WARPS: warps along the rows of the product.
    """
    REPEATS: tl.constexpr = ROWS // (16 * WARPS)
    values = tl.reshape(values, (REPEATS, WARPS, 2, 8, COLUMNS // 8, 4, 2))
    # A store has its threads along the last dimension, then from the first on.
    # [4, 8, WARPS, 2, COLUMNS / 8, REPEATS * 2]
    values = tl.reshape(tl.permute(values, (5, 3, 1, 6, 4, 0, 2)), (4, 8, WARPS, 2, COLUMNS // 8, REPEATS * 2))
    slots = 2 * tl.arange(0, 4)[:, None, None, None, None, None]
    slots += tl.arange(0, 2)[None, None, None, :, None, None]
    slots += 8 * tl.arange(0, COLUMNS // 8)[None, None, None, None, :, None]
    rows = 2 * REPEATS * tl.arange(0, 8)[None, :, None, None, None, None]
    rows += 16 * REPEATS * tl.arange(0, WARPS)[None, None, :, None, None, None]
    rows += tl.arange(0, REPEATS * 2)[None, None, None, None, None, :]
    sums += first_slot * ROWS
    tl.store(sums + (slots * ROWS + rows), values.to(sums.dtype.element_ty), mask=slots < end_slot - first_slot)


@triton.jit
def from_register_order(sums, SLOTS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """`[SLOTS, ROWS]`, loaded as `store_slot_sums` stored it, with rows in the order of the tile of queries."""
    REPEATS: tl.constexpr = ROWS // (16 * WARPS)
    sums = tl.permute(tl.reshape(sums, (SLOTS, WARPS, 8, REPEATS, 2)), (0, 3, 1, 4, 2))
    return tl.reshape(sums, (SLOTS, ROWS))
