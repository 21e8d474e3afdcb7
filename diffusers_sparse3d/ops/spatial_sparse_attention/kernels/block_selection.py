"""The choice of the selection blocks, from the log-sum-exp of the compressed attention.

Two kernels for each chunk of queries: the probabilities of the compressed keys, summed over the heads of a group, go
to a buffer of bounded size; then the scores of the blocks, sums of a few neighbouring entries, are kept in registers,
each in one integer with the number of its block, while the best are taken out one by one.

Floor: one exponential per query head and compressed key (8.7 ms on an H200 at 131,072 tokens of 32 heads and 8,644
compressed keys), 2 D floating-point operations each, and the traffic of the buffer, written and read once per
key/value head (9 GB in half precision there, 2 ms; less where a chunk stays in the L2 cache).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_dispatch import on_device_of_first_argument
from .common import LOG2_E, HeadShape, TileShape, load_matrix, query_rows, segment_tiles


if TYPE_CHECKING:
    from ....sparse_tensor import CoordinateCache
    from ...coordinates import Partition


# Elements of the buffer of probabilities.
_BUFFER_ELEMENTS = 1 << 26
# Blocks whose scores a program, one warp, keeps at once.
_MOST_BLOCKS = 256
# Of the float32 2^-58.
_SMALLEST_SCORE_BITS = tl.constexpr((127 - 58) << 23)


@triton.jit
def _probability_kernel(
    query,
    key,
    log_sum,
    probabilities,
    order,
    tiles,
    cu_keys,
    first_tile,
    width,
    scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tiles + 3 * (first_tile + tl.program_id(0))
    kv_head = tl.program_id(1)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = tl.trans(load_matrix(query, rows, valid, dim, DIM))
    # Rows that are not valid get the probability 0.
    log_sums = tl.load(log_sum + rows, mask=valid, other=float("inf"))
    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    key += (first_key * num_kv_heads + kv_head) * dim

    TOKENS: tl.constexpr = ROWS // GROUP
    buffer_rows = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64) * num_kv_heads + kv_head
    probabilities += buffer_rows * width
    for begin in range(0, num_keys, KEYS):
        places = begin + tl.arange(0, KEYS)
        is_key = places < num_keys
        keys = load_matrix(key, places * num_kv_heads, is_key, dim, DIM)
        # Keys are the rows here: the heads of a group, in columns, are then mostly summed inside a thread.
        scores = tl.dot(keys, queries, input_precision=PRECISION)
        weights = tl.exp2(scores * scale - log_sums[None, :])
        sums = tl.sum(tl.reshape(weights, (KEYS, TOKENS, GROUP)), 2)
        pointers = probabilities[None, :] + places[:, None]
        tl.store(pointers, sums.to(probabilities.dtype.element_ty), mask=is_key[:, None])


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
def _best_blocks_kernel(
    probabilities,
    chosen,
    order,
    tiles,
    cu_keys,
    cu_block_keys,
    cu_blocks,
    first_tile,
    width,
    most_keys,
    k,
    num_kv_heads: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = tiles + 3 * (first_tile + row // TOKENS)
    sample, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    place = start + row % TOKENS
    if place < end:
        first_block, end_block = tl.load(cu_blocks + sample), tl.load(cu_blocks + sample + 1)
        probabilities += (row.to(tl.int64) * num_kv_heads + kv_head) * width - tl.load(cu_keys + sample)
        slots = tl.arange(0, K)
        # Scores that come from half-precision queries need no more bits than an int32 has.
        dtype: tl.constexpr = tl.int64 if probabilities.dtype.element_ty == tl.float32 else tl.int32
        best = tl.full((K,), -1, dtype)
        last_rank: tl.constexpr = (1 << INDEX_BITS) - 1
        for begin in range(first_block, end_block, BLOCKS):
            blocks = begin + tl.arange(0, BLOCKS)
            exists = blocks < end_block
            first_key = tl.load(cu_block_keys + blocks, mask=exists, other=0)
            end_key = tl.load(cu_block_keys + blocks + 1, mask=exists, other=0)
            scores = tl.zeros((BLOCKS,), tl.float32)
            for number in range(0, most_keys):
                keys = first_key + number
                scores += tl.load(probabilities + keys, mask=keys < end_key, other=0.0).to(tl.float32)
            # Of equals, the first block.
            candidates = tl.where(exists, _sortable(scores, last_rank - (blocks - first_block), INDEX_BITS, dtype), -1)
            merged = tl.full((K,), -1, dtype)
            for slot in range(0, k):
                largest = tl.maximum(tl.max(candidates, 0), tl.max(best, 0))
                merged = tl.where(slots == slot, largest, merged)
                candidates = tl.where(candidates == largest, -1, candidates)
                best = tl.where(best == largest, -1, best)
            best = merged
        token = tl.load(order + place).to(tl.int64)
        block = tl.where(best >= 0, first_block + last_rank - (best & last_rank).to(tl.int32), -1)
        tl.store(chosen + (token * num_kv_heads + kv_head) * k + slots, block, mask=slots < k)


def score_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    if dtype == torch.float32:
        return TileShape(32, 32, 4, 2)
    return TileShape(64, 64, 4, 3 if heads.dim <= 64 else 2)


class BlockPlan(NamedTuple):
    """The selection blocks of the samples and the compressed keys inside them.

    Attributes:
        order: `[N]` int64, the queries grouped by sample.
        tiles: of the samples, as `segment_tiles` makes them.
        cu_keys: `[B + 1]` int32, where the compressed keys of each sample start.
        cu_block_keys: `[num_blocks + 1]` int32, where those of each selection block start.
        cu_blocks: `[B + 1]` int32, where the selection blocks of each sample start.
        most_keys: of a sample.
        most_block_keys: of a selection block.
        most_blocks: of a sample.
        shape: of the tiles.
    """

    order: Tensor
    tiles: Tensor
    cu_keys: Tensor
    cu_block_keys: Tensor
    cu_blocks: Tensor
    most_keys: int
    most_block_keys: int
    most_blocks: int
    shape: TileShape

    @classmethod
    def make(
        cls, selection: Partition, compressed: CoordinateCache, blocks: Partition, heads: HeadShape, shape: TileShape
    ) -> BlockPlan:
        """`blocks` is the partition of the voxels of `compressed` into the blocks of `selection`."""
        cu_queries = selection.cu_seqlens[selection.batch_cu_blocks.long()]
        return cls(
            selection.order,
            segment_tiles(cu_queries, heads.tokens(shape.rows)),
            compressed.cu_seqlens,
            blocks.cu_seqlens,
            selection.batch_cu_blocks,
            most_keys=compressed.batch_partition().max_seqlen,
            most_block_keys=blocks.max_seqlen,
            most_blocks=selection.most_blocks,
            shape=shape,
        )


@on_device_of_first_argument
def select(
    query: Tensor,
    key: Tensor,
    log_sum: Tensor,
    plan: BlockPlan,
    topk: int,
    scale: float,
    query_chunk_size: int = 0,
) -> Tensor:
    """The best blocks of each query and key/value head.

    Half-precision queries have their probabilities rounded to float16 (relative error 5e-4, one compressed key each)
    before they are summed over a block, and of the sums at least 13 bits count (relative error 1.2e-4, for up to 4,096
    blocks a sample; it doubles with their number). Blocks whose scores are closer than that may be exchanged.

    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, H_kv, D]`, contiguous: the compressed keys, grouped by selection block.
        log_sum: `[N, H]` float32, of the compressed attention, in base 2.
        plan: the blocks.
        topk: blocks per query and key/value head.
        scale: factor of the scores.
        query_chunk_size: queries whose probabilities are in the buffer at once; 0: by a fixed budget.

    Returns:
        `[N, H_kv, min(topk, plan.most_blocks)]` int32 block numbers, best first; -1 where there are no more.
    """
    heads = HeadShape.of(query, key, key)
    tokens, k = heads.tokens(plan.shape.rows), min(topk, plan.most_blocks)
    chosen = torch.empty(len(query), heads.num_kv_heads, k, dtype=torch.int32, device=query.device)
    elements = tokens * heads.num_kv_heads * max(1, plan.most_keys)
    chunk = triton.cdiv(query_chunk_size, tokens) if query_chunk_size else _BUFFER_ELEMENTS // elements
    chunk = max(1, min(chunk, len(plan.tiles)))
    probabilities = torch.empty(
        chunk * elements,
        dtype=torch.float32 if query.dtype == torch.float32 else torch.float16,
        device=query.device,
    )
    arguments = heads.arguments(query.dtype)
    del arguments["value_dim"], arguments["VALUE_DIM"]
    blocks = min(max(32, triton.next_power_of_2(max(1, plan.most_blocks))), _MOST_BLOCKS)
    index_bits = max(12, (plan.most_blocks - 1).bit_length())
    for first_tile in range(0, len(plan.tiles), chunk):
        num_tiles = min(chunk, len(plan.tiles) - first_tile)
        _probability_kernel[num_tiles, heads.num_kv_heads](
            query,
            key,
            log_sum,
            probabilities,
            plan.order,
            plan.tiles,
            plan.cu_keys,
            first_tile,
            plan.most_keys,
            scale * LOG2_E,
            **arguments,
            **plan.shape.arguments(),
        )
        _best_blocks_kernel[num_tiles * tokens, heads.num_kv_heads](
            probabilities,
            chosen,
            plan.order,
            plan.tiles,
            plan.cu_keys,
            plan.cu_block_keys,
            plan.cu_blocks,
            first_tile,
            plan.most_keys,
            plan.most_block_keys,
            k,
            num_kv_heads=heads.num_kv_heads,
            TOKENS=tokens,
            BLOCKS=blocks,
            INDEX_BITS=index_bits,
            K=triton.next_power_of_2(max(1, k)),
            num_warps=1,
        )
    return chosen
