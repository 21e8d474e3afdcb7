"""Attention to the compressed keys of a sample, and the choice of the best selection blocks of each query.

The score of a block is the probability of its compressed keys, summed over them and over the heads of a group. A
probability is a weight divided by the sum of all weights of the head, which is known only after the last key. So that
no exponential is computed twice, a program stores the sums of the weights of each slot, before this division, in a
scratch buffer of its own. After the last key it divides, adds up the heads, and takes out the best blocks. As many
programs run as the GPU has room for, and each fetches its next tile of queries when it is done: one program chooses
while others attend.

Compressed keys are grouped by block, and a tile of them may end inside a block: the keys that a tile has of a block
are a slot. Sums over slots are products with a matrix of zeros and ones.

Floor: one exponential per query head and compressed key (8.7 ms on an H200 at 131,072 tokens of 32 heads and 8,644
compressed keys). The sums are written and read once, 2 bytes per query head and slot (11 GB each way at 131,072 tokens
and 1,342 slots, 2.7 ms at 4.2 TB/s), while other programs compute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .arguments import LOG2_E, ChoiceScratch, HeadShape, ScoreBounds, choice_constants
from .best_blocks import best_blocks
from .common import head_rows, load_matrix, store_matrix
from .compression_plan import CompressionPlan
from .score_bounds import NO_BOUNDS, has_work, largest_scores, variants
from .slot_sums import from_register_order, store_slot_sums
from .tiles import SUM_WIDTH, column_sums, divide_rows, end_of_full_tiles, softmax_weights


# Programs that a multiprocessor may run at once; each has scratch buffers.
_PROGRAMS_OF_MULTIPROCESSOR = 3
# Bytes of the sums of all programs, unless one program takes more.
_BUFFER_BYTES = 1 << 29
# Scores of blocks that a program compares at once, and of how many tokens.
_MOST_SCORES = 4096
_MOST_TOKENS = 8
# Slots whose heads are added up together.
_SLOTS = 32
# Tiles of queries of a round.
_ROUND = tl.constexpr(64)


@triton.jit
def _serve_tile(
    number,  # of the tile and key/value head
    query,  # [N, H, dim]
    key,  # [M, H_kv, dim], compressed keys grouped by selection block
    value,  # [M, H_kv, value_dim], likewise
    output,  # [N, H, value_dim], written
    log_sum,  # [N, H] float32, written: log-sum-exp in base 2
    chosen,  # [N, H_kv, k] int32, written: the chosen blocks
    bounds,  # ScoreBounds
    scratch,  # ChoiceScratch
    order,  # [N] int64, the queries grouped by sample; None if they are
    tiles,  # [num_tiles, 3] int32: sample, first place in `order`, place after the last
    layout,  # CompressedKeys
    k,  # blocks to choose
    scale,  # factor of the scores, times log2(e)
    heads,  # HeadConstants
    tile,  # TileConstants
    choice,  # ChoiceConstants
    BOUNDED: tl.constexpr,  # as in `_forward_kernel`
):
    """Attends from one tile of queries to the compressed keys of its sample, and chooses the blocks of its tokens."""
    ROWS: tl.constexpr = tile.ROWS
    KEYS: tl.constexpr = tile.KEYS
    TOKENS: tl.constexpr = ROWS // heads.GROUP
    SLOTS: tl.constexpr = choice.SLOTS
    # Scores that come from half-precision queries are compared with no more bits than an int32 has.
    dtype: tl.constexpr = tl.int64 if query.dtype.element_ty == tl.float32 else tl.int32
    program = tl.program_id(0).to(tl.int64)
    # [most_slots, ROWS], [most_tiles, ROWS], [TOKENS, most_slots], those of this program
    sums = scratch.sums + program * scratch.most_slots * ROWS
    maxima = scratch.maxima + program * scratch.most_tiles * ROWS
    scores_of_slots = scratch.scores + program * scratch.most_slots * TOKENS
    kv_head, this_tile = number % heads.num_kv_heads, tiles + 3 * (number // heads.num_kv_heads)
    sample, start, end = tl.load(this_tile), tl.load(this_tile + 1), tl.load(this_tile + 2)
    # [ROWS]
    rows, valid = head_rows(order, start, end, kv_head, heads, ROWS)
    # [ROWS, DIM]
    queries = load_matrix(query, rows, valid, heads.dim, heads.DIM)
    first_key = tl.load(layout.cu_keys + sample).to(tl.int64)
    num_keys = (tl.load(layout.cu_keys + sample + 1) - first_key).to(tl.int32)
    key_slots = layout.key_slots + first_key

    # 1. Attention to the compressed keys of the sample, as in `tiles.attend_to_keys`, and the sum of weights of each
    # slot. Sums refer to the largest score up to their tile of keys, or to the bound.
    keys_of_head = key + (first_key * heads.num_kv_heads + kv_head) * heads.dim
    values_of_head = value + (first_key * heads.num_kv_heads + kv_head) * heads.value_dim
    members_of_sample = layout.members + first_key * choice.COLUMNS
    # [ROWS]
    largest = largest_scores(bounds, kv_head, scale, ROWS, BOUNDED)
    # [ROWS, SUM_WIDTH], [ROWS, VALUE_DIM]
    total = tl.zeros((ROWS, SUM_WIDTH), tl.float32)
    attended = tl.zeros((ROWS, heads.VALUE_DIM), tl.float32)
    slot = tl.load(key_slots)
    sums_of_sample = sums - slot.to(tl.int64) * ROWS
    end_full = end_of_full_tiles(num_keys, KEYS, queries.dtype)
    for MASKED in tl.static_range(2):
        for begin in range(end_full if MASKED else 0, num_keys if MASKED else end_full, KEYS):
            end_slot = tl.load(key_slots + tl.minimum(begin + KEYS, num_keys))
            # [KEYS]
            places = begin + tl.arange(0, KEYS)
            is_key = places < num_keys if MASKED else places >= 0
            # [KEYS, DIM], [KEYS, VALUE_DIM], [KEYS, COLUMNS]
            keys = load_matrix(keys_of_head, places * heads.num_kv_heads, is_key, heads.dim, heads.DIM)
            values = load_matrix(
                values_of_head,
                places * heads.num_kv_heads,
                is_key,
                heads.value_dim,
                heads.VALUE_DIM,
            )
            members = load_matrix(members_of_sample, places, is_key, choice.COLUMNS, choice.COLUMNS)
            # [ROWS, KEYS]
            scores = tl.dot(queries, tl.trans(keys), input_precision=heads.PRECISION)
            if MASKED:
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            weights, largest, correction = softmax_weights(scores, largest, scale, BOUNDED)
            if not BOUNDED:
                total = total * correction[:, None]
                attended = attended * correction[:, None]
            weights = weights.to(values.dtype)
            # [ROWS, VALUE_DIM], [ROWS, COLUMNS]
            attended = tl.dot(weights, values, attended, input_precision=heads.PRECISION)
            slot_sums = tl.dot(weights, members, input_precision=heads.PRECISION)
            # Every key is a member of one slot.
            total += column_sums(slot_sums)
            store_slot_sums(sums_of_sample, slot_sums, slot, end_slot, ROWS, choice.COLUMNS, choice.WARPS)
            if not BOUNDED:
                tl.store(maxima + begin // KEYS * ROWS + tl.arange(0, ROWS), largest)
            slot = end_slot
    # [ROWS]
    all_weights = tl.sum(total, 1)
    log_sums = largest + tl.log2(all_weights)
    store_matrix(output, rows, valid, divide_rows(attended, all_weights), heads.value_dim, heads.VALUE_DIM)
    tl.store(log_sum + rows, log_sums, mask=valid)

    # 2. Sums of slots divided by the sum of all weights, and added up over the heads of a token. Threads read what
    # others have written in the step before, hence the barriers.
    tl.debug_barrier()
    first_slot = tl.load(key_slots)
    num_slots = tl.load(key_slots + num_keys) - first_slot
    # Rows that are not valid get the weight 0.
    log_sums = tl.where(valid, log_sums, float("inf"))
    factors = tl.exp2(largest - log_sums)
    # Several stages send loads off before they are needed, if these do not wait for other loads.
    for begin in tl.range(0, num_slots, SLOTS, num_stages=3 if BOUNDED else 1):
        # [SLOTS]
        slots = begin + tl.arange(0, SLOTS)
        is_slot = slots < num_slots
        # [SLOTS, ROWS], read once, hence past the first-level cache
        pointers = sums + slots[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        probabilities = tl.load(pointers, mask=is_slot[:, None], other=0.0, cache_modifier=".cg")
        probabilities = from_register_order(probabilities, SLOTS, ROWS, choice.WARPS).to(tl.float32)
        if BOUNDED:
            probabilities *= factors[None, :]
        else:
            key_tiles = tl.load(layout.slot_tiles + first_slot + slots, mask=is_slot, other=0)
            largest_of_tile = tl.load(maxima + key_tiles[:, None] * ROWS + tl.arange(0, ROWS)[None, :])
            probabilities *= tl.exp2(largest_of_tile - log_sums[None, :])
        # [SLOTS, TOKENS, GROUP] -> [SLOTS, TOKENS]
        probabilities = tl.sum(tl.reshape(probabilities, (SLOTS, TOKENS, heads.GROUP)), 2)
        pointers = scores_of_slots + tl.arange(0, TOKENS)[None, :] * scratch.most_slots + slots[:, None]
        tl.store(pointers, probabilities, mask=is_slot[:, None])

    # 3. The best blocks of each token.
    tl.debug_barrier()
    first_block, end_block = tl.load(layout.cu_blocks + sample), tl.load(layout.cu_blocks + sample + 1)
    for first in range(0, TOKENS, choice.STEP):
        # [STEP, K]
        blocks, ranks = best_blocks(
            scores_of_slots + first * scratch.most_slots,
            layout.block_slots,
            first_block,
            end_block,
            scratch.most_slots,
            k,
            choice,
            dtype,
        )
        # [STEP]
        places = start + first + tl.arange(0, choice.STEP)
        exists = places < end
        tokens = (places if order is None else tl.load(order + places, mask=exists, other=0)).to(tl.int64)
        # [STEP, K]
        pointers = chosen + ((tokens * heads.num_kv_heads + kv_head) * k)[:, None] + ranks
        tl.store(pointers, blocks, mask=exists[:, None] & (ranks < k))
    tl.debug_barrier()


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    query,  # [N, H, D]
    key,  # [M, H_kv, D], the compressed keys, grouped by selection block
    value,  # [M, H_kv, D_v], the compressed values, grouped by selection block
    output,  # [N, H, D_v], written
    log_sum,  # [N, H] float32, written: the log-sum-exp of the scores, in base 2
    chosen,  # [N, H_kv, k] int32, written: the numbers of the best blocks, then -1
    bounds,  # ScoreBounds
    scratch,  # ChoiceScratch
    next_tile,  # [1] int32, zero: the number of the next tile and key/value head that no program has
    order,  # [N] int64, the queries grouped by sample; None if they are
    tiles,  # [num_tiles, 3] int32: sample, first place in `order`, place after the last
    layout,  # CompressedKeys
    num_tiles,  # tiles of queries
    k,  # blocks to choose
    scale,  # factor of the scores, times log2(e)
    heads,  # HeadConstants
    tile,  # TileConstants
    choice,  # ChoiceConstants
    BOUNDED: tl.constexpr,  # whether this variant takes a bound of the scores in place of a running maximum
):
    """A program fetches tiles of queries until none is left; for each it attends, adds up heads and chooses blocks."""
    if has_work(bounds, scale, heads.num_kv_heads, BOUNDED):
        number, end_number = tl.atomic_add(next_tile, 1, sem="relaxed"), num_tiles * heads.num_kv_heads
        # Rounds stand for a while loop, in which the compiler of triton 3.3 fails at matrix products on Hopper.
        for _ in range(0, end_number, _ROUND):
            if number < end_number:
                for _ in range(_ROUND):
                    if number < end_number:
                        _serve_tile(
                            number,
                            query,
                            key,
                            value,
                            output,
                            log_sum,
                            chosen,
                            bounds,
                            scratch,
                            order,
                            tiles,
                            layout,
                            k,
                            scale,
                            heads,
                            tile,
                            choice,
                            BOUNDED,
                        )
                        number = tl.atomic_add(next_tile, 1, sem="relaxed")


def _most_registers(heads: HeadShape, dtype: torch.dtype) -> int | None:
    """The largest number of registers of a thread; None leaves it to the compiler.

    With 168 registers a multiprocessor has room for three programs instead of two. For narrow heads this costs 64 to
    128 bytes of spilled registers, outside the loop over keys.
    """
    return 168 if dtype != torch.float32 and max(heads.dim, heads.value_dim) <= 32 else None


@on_device_of_first_argument
def attend_and_select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: CompressionPlan,
    topk: int,
    scale: float,
    bounds: ScoreBounds = NO_BOUNDS,
    query_chunk_size: int = 0,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the compressed keys, and the best blocks of each query and key/value head.

    In half precision, weights are rounded to the dtype of the query before they are summed over a slot, and these sums
    before they are summed over heads. At least 13 bits of a score are compared (with up to 4,096 blocks a sample; one
    bit less whenever that number doubles). Blocks whose scores differ by less, 2^-7 of a score in bfloat16 and 2^-10
    in float16, may be exchanged.

    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, H_kv, D]`, contiguous: the compressed keys, grouped by selection block.
        value: `[M, H_kv, D_v]`, contiguous.
        plan: the keys and blocks. A sample with queries has keys.
        topk: blocks per query and key/value head.
        scale: factor of the scores, positive.
        bounds: of the scores, if they are known.
        query_chunk_size: queries whose sums are in the scratch buffer at once; 0 for a fixed budget.
        counter: `[1]` int32, zero, which the kernel changes; made if None.

    Returns:
        The output `[N, H, D_v]`, the log-sum-exp in base 2 `[N, H]` float32, and `[N, H_kv, min(topk,
        plan.most_blocks)]` int32 block numbers, best first, -1 where there are no more; rows as in `query`.
    """
    heads, shape = HeadShape.of(query, key, value), plan.shape
    tokens, k = heads.tokens(shape.rows), min(topk, plan.most_blocks)
    output = value.new_empty(*query.shape[:2], heads.value_dim)
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
    num_tokens, num_tiles = query.shape[0], plan.tiles.shape[0]
    chosen = torch.empty(num_tokens, heads.num_kv_heads, k, dtype=torch.int32, device=query.device)
    if not num_tokens:
        return output, log_sum, chosen
    # Multiples of 16, which triton compiles for: other coordinates need no other kernel.
    most_slots, most_tiles = (16 * cdiv(number, 16) for number in (plan.most_slots, cdiv(plan.most_keys, shape.keys)))
    programs = num_tiles * heads.num_kv_heads
    if query_chunk_size:
        most_programs = cdiv(query_chunk_size, tokens) * heads.num_kv_heads
    else:
        most_programs = _BUFFER_BYTES // max(1, most_slots * shape.rows * query.itemsize)
    programs = max(1, min(programs, most_programs, _PROGRAMS_OF_MULTIPROCESSOR * num_multiprocessors(query.device)))
    scratch = ChoiceScratch(
        sums=query.new_empty(programs, most_slots, shape.rows),
        maxima=log_sum.new_empty(programs, most_tiles, shape.rows),
        scores=log_sum.new_empty(programs, tokens, most_slots),
        most_slots=most_slots,
        most_tiles=most_tiles,
    )
    step = min(_MOST_TOKENS, tokens)
    choice = choice_constants(
        COLUMNS=plan.members.shape[1],
        WARPS=min(shape.num_warps, shape.rows // 16),
        SLOTS=_SLOTS,
        STEP=step,
        BLOCKS=min(next_power_of_2(plan.most_blocks), _MOST_SCORES // step),
        BLOCK_SLOTS=plan.most_block_slots,
        INDEX_BITS=max(12, (plan.most_blocks - 1).bit_length()),
        # A warp holds all chosen blocks of a token, as it holds all candidates.
        K=max(32, next_power_of_2(k)),
    )
    # Two variants share the counter: only one of them counts.
    counter = chosen.new_zeros(1) if counter is None else counter
    for bounded in variants(bounds):
        _forward_kernel[(programs,)](
            query,
            key,
            value,
            output,
            log_sum,
            chosen,
            bounds,
            scratch,
            counter,
            plan.order,
            plan.tiles,
            plan.pointers,
            num_tiles,
            k,
            scale * LOG2_E,
            heads.constants(query.dtype),
            shape.constants,
            choice,
            BOUNDED=bounded,
            maxnreg=_most_registers(heads, query.dtype),
            **shape.launch,
        )
    return output, log_sum, chosen
