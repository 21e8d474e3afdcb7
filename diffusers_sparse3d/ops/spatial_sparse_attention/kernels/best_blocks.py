"""The choice of the best selection blocks of every query, from the sums of weights of the compressed keys."""

from __future__ import annotations

import triton
import triton.language as tl


# Of the float32 2^-58.
_SMALLEST_SCORE_BITS = tl.constexpr((127 - 58) << 23)


@triton.jit
def from_register_order(sums, SLOTS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """`[SLOTS, ROWS]` as `compressed_attention._store_sums` has put them in memory, in the order of the rows."""
    REPEATS: tl.constexpr = ROWS // (16 * WARPS)
    sums = tl.permute(tl.reshape(sums, (SLOTS, WARPS, 8, REPEATS, 2)), (0, 3, 1, 4, 2))
    return tl.reshape(sums, (SLOTS, ROWS))


@triton.jit
def add_heads(
    sums,
    maxima,
    slot_tiles,
    scores,
    log_sums,
    largest,
    num_slots,
    most_slots,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BOUNDED: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Divides the sums by those of all weights, and adds up the heads of each token: scores `[TOKENS, slots]`."""
    TOKENS: tl.constexpr = ROWS // GROUP
    rows, tokens = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    factors = tl.exp2(largest - log_sums)
    # With a number of stages, loads are sent off before they are needed, where they do not need others before.
    for begin in tl.range(0, num_slots, SLOTS, num_stages=3 if BOUNDED else 1):
        slots = begin + tl.arange(0, SLOTS)
        is_slot = slots < num_slots
        # Read once, and not by the cache that the other data is in.
        parts = tl.load(
            sums + slots[:, None] * ROWS + rows[None, :], mask=is_slot[:, None], other=0.0, cache_modifier=".cg"
        )
        parts = from_register_order(parts, SLOTS, ROWS, WARPS).to(tl.float32)
        if BOUNDED:
            parts *= factors[None, :]
        else:
            tiles = tl.load(slot_tiles + slots, mask=is_slot, other=0)
            largest_of_tile = tl.load(maxima + tiles[:, None] * ROWS + rows[None, :])
            parts *= tl.exp2(largest_of_tile - log_sums[None, :])
        total = tl.sum(tl.reshape(parts, (SLOTS, TOKENS, GROUP)), 2)
        tl.store(scores + tokens[None, :] * most_slots + slots[:, None], total, mask=is_slot[:, None])


@triton.jit
def _sortable(scores, rank, INDEX_BITS: tl.constexpr, dtype: tl.constexpr):
    """Non-negative integers in the order of float32 scores, and of equals, of the rank.

    Where int32 will do, they have six bits of the exponent (from 2^-58 on, less counts as that) and what fits of the
    mantissa, then the rank.
    """
    bits = scores.to(tl.int32, bitcast=True)
    if dtype == tl.int32:
        bits = tl.maximum(bits - _SMALLEST_SCORE_BITS, 0) >> (INDEX_BITS - 2)
    return (bits.to(dtype) << INDEX_BITS) | rank


@triton.jit
def best_blocks(
    scores,
    block_slots,
    first_block,
    end_block,
    most_slots,
    k,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    K: tl.constexpr,
    dtype: tl.constexpr,
):
    """The `k` best blocks of the tokens whose scores `[STEP, slots]` start at the pointer, in any order.

    Returns `[STEP, K]` block numbers, -1 for none, and which place among the best each has.
    """
    tokens, numbers = tl.arange(0, STEP)[:, None], tl.arange(0, K)[None, :]
    first_slot = tl.load(block_slots + first_block)
    last_rank: tl.constexpr = (1 << INDEX_BITS) - 1
    most: tl.constexpr = (1 << (63 if dtype == tl.int64 else 31)) - 1
    none: tl.constexpr = -most - 1
    # All different: what is replaced is one at a time. Those from k on never are.
    best = tl.where(numbers < k, tl.zeros((STEP, K), dtype) - 1 - numbers, most)
    smallest = tl.min(best, 1)
    for begin in range(first_block, end_block, BLOCKS):
        blocks = begin + tl.arange(0, BLOCKS)
        exists = blocks < end_block
        start = tl.load(block_slots + blocks, mask=exists, other=0)
        end = tl.load(block_slots + blocks + 1, mask=exists, other=0)
        total = tl.zeros((STEP, BLOCKS), tl.float32)
        for number in tl.static_range(BLOCK_SLOTS):
            slots = start + number
            pointers = scores + tokens * most_slots + (slots - first_slot)[None, :]
            total += tl.load(pointers, mask=(slots < end)[None, :], other=0.0)
        # Of equals, the first block.
        ranks = (last_rank - (blocks - first_block))[None, :]
        candidates = tl.where(exists[None, :], _sortable(total, ranks, INDEX_BITS, dtype), none)
        largest = tl.max(candidates, 1)
        while tl.max((largest > smallest).to(tl.int32), 0) > 0:
            place = (best == smallest[:, None]) & (largest > smallest)[:, None]
            best = tl.where(place, largest[:, None], best)
            candidates = tl.where(candidates == largest[:, None], none, candidates)
            smallest, largest = tl.min(best, 1), tl.max(candidates, 1)
    best = tl.where(numbers < k, best, none)
    places = tl.sum((best[:, None, :] > best[:, :, None]).to(tl.int32), 2)
    return tl.where(best >= 0, first_block + last_rank - (best & last_rank).to(tl.int32), -1), places
