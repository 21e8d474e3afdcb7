"""Attention to the compressed keys of a sample, and the choice of the selection blocks that follows from it.

A block's score for a query is the softmax weight of its compressed keys, summed over them and over the heads of a
group. The sum of all weights of a head is known only after the last key; so that no exponential is computed twice, a
program keeps for its tile of queries what the keys of each block sum up to before that division, in a scratch buffer
of its own. After the last key it divides, adds up the heads, and takes out the best blocks one by one, each in one
integer of score and number. There are as many programs as the GPU runs at once; each fetches the next tile when it is
done, so that one chooses while others attend.

Compressed keys are grouped by block, and a tile of them may end inside of one: the keys that a tile has of a block are
a slot. Sums over slots are products with a matrix of zeros and ones.

Floor: one exponential per query head and compressed key (8.7 ms on an H200 at 131,072 tokens of 32 heads and 8,644
compressed keys). The scratch buffer is written and read once: 2 bytes per query head and slot, of which there are a
few more than blocks (11 GB each way at 131,072 tokens and 1,342 slots, 2.7 ms at 4.2 TB/s), while others compute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, HeadShape, ScoreBounds
from .best_blocks import add_heads, best_blocks
from .common import load_matrix, query_rows, store_matrix
from .compression_plan import CompressionPlan
from .score_bounds import NO_BOUNDS, largest_scores, takes_part, ways
from .tiles import SUM_WIDTH, end_of_full_tiles, forward_step, load_keys


# Programs that a multiprocessor may run at once; each has a scratch buffer.
_PROGRAMS_OF_MULTIPROCESSOR = 3
# Bytes of all of them, unless one takes more.
_BUFFER_BYTES = 1 << 29
# Scores of blocks that a program looks at together, and of how many tokens.
_MOST_SCORES = 4096
_MOST_TOKENS = 8
# Slots whose heads are added up together.
_SLOTS = 32
# Tiles of queries of a round.
_ROUND = tl.constexpr(64)


@triton.jit
def _store_sums(sums, values, first_slot, end_slot, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Stores `[ROWS, COLUMNS]` values of the slots from the first on, slot by slot, rows as in `from_register_order`.

    The matrix unit leaves of each 16 rows and 8 columns to thread 4 r + c of a warp the rows r and r + 8 and the
    columns 2 c and 2 c + 1. In this order they go to memory straight from the registers; where a compiler has them
    elsewhere, through shared memory, which only takes longer.
    """
    REPEATS: tl.constexpr = ROWS // (16 * WARPS)
    values = tl.reshape(values, (REPEATS, WARPS, 2, 8, COLUMNS // 8, 4, 2))
    # A store has its threads along the last dimension, then from the first on.
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
def _key_step(
    queries,
    key,
    value,
    member,
    key_slots,
    sums,
    maxima,
    begin,
    num_keys,
    first_slot,
    largest,
    total,
    attended,
    scale,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attends to a tile of keys and stores the sums of its slots from `first_slot` on. Returns where they end too."""
    end_slot = tl.load(key_slots + tl.minimum(begin + KEYS, num_keys))
    keys, values, is_key = load_keys(
        key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, MASKED
    )
    members = load_matrix(member, begin + tl.arange(0, KEYS), is_key, COLUMNS, COLUMNS)
    weights, largest, total, attended = forward_step(
        queries, keys, values, is_key, largest, total, attended, scale, PRECISION, MASKED, BOUNDED
    )
    slot_sums = tl.dot(weights, members, input_precision=PRECISION)
    _store_sums(sums, slot_sums, first_slot, end_slot, ROWS, COLUMNS, WARPS)
    if not BOUNDED:
        tl.store(maxima + begin // KEYS * ROWS + tl.arange(0, ROWS), largest)
    return end_slot, largest, total, attended


@triton.jit
def _attend_to_keys(
    queries,
    key,
    value,
    member,
    key_slots,
    sums,
    maxima,
    num_keys,
    largest,
    scale,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """As in `tiles.attend_to_keys`; stores the sums of weights of the slots, and where the bounds are not known, the
    largest score up to each tile. They refer to it. Returns the last one too.
    """
    total = tl.zeros((ROWS, SUM_WIDTH), tl.float32)
    attended = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    first_slot = tl.load(key_slots)
    sums -= first_slot.to(tl.int64) * ROWS
    end_full = end_of_full_tiles(num_keys, KEYS, queries.dtype)
    for begin in range(0, end_full, KEYS):
        first_slot, largest, total, attended = _key_step(
            queries,
            key,
            value,
            member,
            key_slots,
            sums,
            maxima,
            begin,
            num_keys,
            first_slot,
            largest,
            total,
            attended,
            scale,
            num_kv_heads,
            dim,
            value_dim,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
            BOUNDED,
            COLUMNS,
            WARPS,
            False,
        )
    for begin in range(end_full, num_keys, KEYS):
        first_slot, largest, total, attended = _key_step(
            queries,
            key,
            value,
            member,
            key_slots,
            sums,
            maxima,
            begin,
            num_keys,
            first_slot,
            largest,
            total,
            attended,
            scale,
            num_kv_heads,
            dim,
            value_dim,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
            BOUNDED,
            COLUMNS,
            WARPS,
            True,
        )
    all_weights = tl.sum(total, 1)
    return attended / all_weights[:, None], largest + tl.log2(all_weights), largest


@triton.jit
def _attend_and_choose(
    number,
    query,
    key,
    value,
    member,
    output,
    log_sum,
    chosen,
    largest_key,
    sums,
    maxima,
    scores,
    order,
    tiles,
    cu_keys,
    key_slots,
    slot_tiles,
    block_slots,
    cu_blocks,
    most_slots,
    k,
    scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    K: tl.constexpr,
):
    """What a program does for a tile of queries and a key/value head, with scratch buffers from its pointers on."""
    TOKENS: tl.constexpr = ROWS // GROUP
    # Scores that come from half-precision queries need no more bits than an int32 has.
    dtype: tl.constexpr = tl.int64 if query.dtype.element_ty == tl.float32 else tl.int32
    kv_head = number % num_kv_heads
    tile = tiles + 3 * (number // num_kv_heads)
    sample, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = load_matrix(query, rows, valid, dim, DIM)
    first_key = tl.load(cu_keys + sample).to(tl.int64)
    num_keys = (tl.load(cu_keys + sample + 1) - first_key).to(tl.int32)
    attended, log_sums, largest = _attend_to_keys(
        queries,
        key + (first_key * num_kv_heads + kv_head) * dim,
        value + (first_key * num_kv_heads + kv_head) * value_dim,
        member + first_key * COLUMNS,
        key_slots + first_key,
        sums,
        maxima,
        num_keys,
        largest_scores(queries, largest_key, kv_head, scale, ROWS, BOUNDED),
        scale,
        num_kv_heads,
        dim,
        value_dim,
        DIM,
        VALUE_DIM,
        PRECISION,
        ROWS,
        KEYS,
        BOUNDED,
        COLUMNS,
        WARPS,
    )
    store_matrix(output, rows, valid, attended, value_dim, VALUE_DIM)
    tl.store(log_sum + rows, log_sums, mask=valid)
    # Each of these steps reads what all threads have written in the one before.
    tl.debug_barrier()
    first_slot = tl.load(key_slots + first_key)
    num_slots = tl.load(key_slots + first_key + num_keys) - first_slot
    # Rows that are not valid get the weight 0.
    log_sums = tl.where(valid, log_sums, float("inf"))
    add_heads(
        sums,
        maxima,
        slot_tiles + first_slot,
        scores,
        log_sums,
        largest,
        num_slots,
        most_slots,
        GROUP,
        ROWS,
        SLOTS,
        BOUNDED,
        WARPS,
    )
    tl.debug_barrier()
    first_block, end_block = tl.load(cu_blocks + sample), tl.load(cu_blocks + sample + 1)
    for first in range(0, TOKENS, STEP):
        blocks, slots = best_blocks(
            scores + first * most_slots,
            block_slots,
            first_block,
            end_block,
            most_slots,
            k,
            STEP,
            BLOCKS,
            BLOCK_SLOTS,
            INDEX_BITS,
            K,
            dtype,
        )
        places = start + first + tl.arange(0, STEP)
        exists = places < end
        tokens = (places if order is None else tl.load(order + places, mask=exists, other=0)).to(tl.int64)
        pointers = chosen + ((tokens * num_kv_heads + kv_head) * k)[:, None] + slots
        tl.store(pointers, blocks, mask=exists[:, None] & (slots < k))
    tl.debug_barrier()


@Kernel
@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    member,
    output,
    log_sum,
    chosen,
    largest_query,
    largest_key,
    sums,
    maxima,
    scores,
    next_tile,
    order,
    tiles,
    cu_keys,
    key_slots,
    slot_tiles,
    block_slots,
    cu_blocks,
    num_tiles,
    most_slots,
    most_tiles,
    k,
    scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    K: tl.constexpr,
):
    if takes_part(largest_query, largest_key, scale, num_kv_heads, BOUNDED):
        program = tl.program_id(0).to(tl.int64)
        sums += program * most_slots * ROWS
        maxima += program * most_tiles * ROWS
        scores += program * most_slots * (ROWS // GROUP)
        number, last = tl.atomic_add(next_tile, 1, sem="relaxed"), num_tiles * num_kv_heads
        # For a while loop, which triton 3.2 does not allow around matrix products: whoever is done leaves out what is
        # left of the rounds.
        for _ in range(0, last, _ROUND):
            if number < last:
                for _ in range(_ROUND):
                    if number < last:
                        _attend_and_choose(
                            number,
                            query,
                            key,
                            value,
                            member,
                            output,
                            log_sum,
                            chosen,
                            largest_key,
                            sums,
                            maxima,
                            scores,
                            order,
                            tiles,
                            cu_keys,
                            key_slots,
                            slot_tiles,
                            block_slots,
                            cu_blocks,
                            most_slots,
                            k,
                            scale,
                            num_kv_heads,
                            group_size,
                            dim,
                            value_dim,
                            GROUP,
                            DIM,
                            VALUE_DIM,
                            PRECISION,
                            ROWS,
                            KEYS,
                            BOUNDED,
                            COLUMNS,
                            WARPS,
                            SLOTS,
                            STEP,
                            BLOCKS,
                            BLOCK_SLOTS,
                            INDEX_BITS,
                            K,
                        )
                        number = tl.atomic_add(next_tile, 1, sem="relaxed")


def _most_registers(heads: HeadShape, dtype: torch.dtype) -> int | None:
    """Of a thread; None for what the compiler likes.

    With narrow heads a multiprocessor has room for three programs instead of two, at 64 to 128 bytes of spilled
    registers that only the choice of the blocks needs.
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

    Weights of half-precision queries are rounded to their dtype before they are summed over a block, as they are for
    the product with the values, and so are these sums, before they are summed over heads; of the result at least 13
    bits count (for up to 4,096 blocks a sample; one less whenever their number doubles). Blocks whose scores are
    closer than that, 2^-7 of them in bfloat16 and 2^-10 in float16, may be exchanged.

    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, H_kv, D]`, contiguous: the compressed keys, grouped by selection block.
        value: `[M, H_kv, D_v]`, contiguous.
        plan: the keys and blocks. A sample with queries has keys.
        topk: blocks per query and key/value head.
        scale: factor of the scores, positive.
        bounds: of the scores, if they are known.
        query_chunk_size: queries whose sums are in the scratch buffer at once; 0: by a fixed budget.
        counter: `[1]` int32, zero, which is changed; made if None.

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
    programs = num_tiles * heads.num_kv_heads
    if query_chunk_size:
        most_programs = cdiv(query_chunk_size, tokens) * heads.num_kv_heads
    else:
        most_programs = _BUFFER_BYTES // max(1, plan.most_slots * shape.rows * query.itemsize)
    programs = max(1, min(programs, most_programs, _PROGRAMS_OF_MULTIPROCESSOR * num_multiprocessors(query.device)))
    most_tiles = cdiv(plan.most_keys, shape.keys)
    sums = query.new_empty(programs, plan.most_slots, shape.rows)
    scores = log_sum.new_empty(programs, tokens, plan.most_slots)
    maxima = log_sum.new_empty(programs, most_tiles, shape.rows)
    step = min(_MOST_TOKENS, tokens)
    counter = chosen.new_zeros(1) if counter is None else counter
    # Where there are two kernels, one of them does not count.
    for bounded in ways(bounds):
        _forward_kernel[(programs,)](
            query,
            key,
            value,
            plan.members,
            output,
            log_sum,
            chosen,
            *bounds,
            sums,
            maxima,
            scores,
            counter,
            plan.order,
            plan.tiles,
            plan.cu_keys,
            plan.key_slots,
            plan.slot_tiles,
            plan.block_slots,
            plan.cu_blocks,
            num_tiles,
            plan.most_slots,
            most_tiles,
            k,
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            **shape.arguments(),
            maxnreg=_most_registers(heads, query.dtype),
            BOUNDED=bounded,
            COLUMNS=plan.members.shape[1],
            WARPS=min(shape.num_warps, shape.rows // 16),
            SLOTS=_SLOTS,
            STEP=step,
            BLOCKS=min(next_power_of_2(plan.most_blocks), _MOST_SCORES // step),
            BLOCK_SLOTS=plan.most_block_slots,
            INDEX_BITS=max(12, (plan.most_blocks - 1).bit_length()),
            # A warp has all of a token, as it has of the candidates.
            K=max(32, next_power_of_2(k)),
        )
    return output, log_sum, chosen
