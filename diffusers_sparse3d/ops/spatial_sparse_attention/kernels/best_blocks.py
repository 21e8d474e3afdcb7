"""The choice of the best selection blocks of each query, from their scores."""

from __future__ import annotations

import triton
import triton.language as tl


# The bits of the float32 2^-58: smaller scores count as this one where keys have 32 bits.
_SMALLEST_SCORE_BITS = tl.constexpr((127 - 58) << 23)


@triton.jit
def _sortable(scores, order, INDEX_BITS: tl.constexpr, dtype: tl.constexpr):
    """Non-negative integers that order float32 scores, and equal scores by `order`, the lowest `INDEX_BITS` bits.

    Integers of 32 bits hold six bits of the exponent (of scores from 2^-58 on) and as much of the mantissa as fits.
    """
    bits = scores.to(tl.int32, bitcast=True)
    if dtype == tl.int32:
        bits = tl.maximum(bits - _SMALLEST_SCORE_BITS, 0) >> (INDEX_BITS - 2)
    return (bits.to(dtype) << INDEX_BITS) | order


@triton.jit
def best_blocks(scores, block_slots, first_block, end_block, most_slots, k, choice, dtype: tl.constexpr):
    """The `k` best blocks of some tokens, in any order, and the rank of each.

    Args:
        scores: pointer to `[STEP, most_slots]` float32, the scores of slots, summed over the heads of a group.
        block_slots: `[num_blocks + 1]` int32, the first slot of each block.
        first_block, end_block: the first block of the sample, and the block after its last one.
        most_slots: slots of a row of `scores`.
        k: blocks to choose, at most `K`.
        choice: `ChoiceConstants`.
        dtype: of the integers that scores are compared as, int32 or int64.

    Returns:
        `[STEP, K]` block numbers, -1 where there are no more, and `[STEP, K]` ranks.
    """
    STEP: tl.constexpr = choice.STEP
    BLOCKS: tl.constexpr = choice.BLOCKS
    K: tl.constexpr = choice.K
    LAST: tl.constexpr = 2**choice.INDEX_BITS - 1
    MOST: tl.constexpr = (1 << (63 if dtype == tl.int64 else 31)) - 1
    NONE: tl.constexpr = -MOST - 1
    tokens, numbers = tl.arange(0, STEP)[:, None], tl.arange(0, K)[None, :]
    first_slot = tl.load(block_slots + first_block)
    # All different, so that one at a time is replaced. The places from k on hold the largest integer: they never are.
    # [STEP, K]
    best = tl.where(numbers < k, tl.zeros((STEP, K), dtype) - 1 - numbers, MOST)
    # [STEP]
    smallest = tl.min(best, 1)
    for begin in range(first_block, end_block, BLOCKS):
        # [BLOCKS]
        blocks = begin + tl.arange(0, BLOCKS)
        exists = blocks < end_block
        start = tl.load(block_slots + blocks, mask=exists, other=0)
        end = tl.load(block_slots + blocks + 1, mask=exists, other=0)
        # [STEP, BLOCKS]
        total = tl.zeros((STEP, BLOCKS), tl.float32)
        for number in tl.static_range(choice.BLOCK_SLOTS):
            slots = start + number
            pointers = scores + tokens * most_slots + (slots - first_slot)[None, :]
            total += tl.load(pointers, mask=(slots < end)[None, :], other=0.0)
        # Among equal scores, the first block is the best.
        order = (first_block - blocks + LAST)[None, :]
        candidates = tl.where(exists[None, :], _sortable(total, order, choice.INDEX_BITS, dtype), NONE)
        # [STEP]
        largest = tl.max(candidates, 1)
        while tl.max((largest > smallest).to(tl.int32), 0) > 0:
            # [STEP, K]
            place = (best == smallest[:, None]) & (largest > smallest)[:, None]
            best = tl.where(place, largest[:, None], best)
            # [STEP, BLOCKS]
            candidates = tl.where(candidates == largest[:, None], NONE, candidates)
            smallest, largest = tl.min(best, 1), tl.max(candidates, 1)
    best = tl.where(numbers < k, best, NONE)
    # [STEP, K, K] -> [STEP, K]
    ranks = tl.sum((best[:, None, :] > best[:, :, None]).to(tl.int32), 2)
    return tl.where(best >= 0, first_block + LAST - (best & LAST).to(tl.int32), -1), ranks
