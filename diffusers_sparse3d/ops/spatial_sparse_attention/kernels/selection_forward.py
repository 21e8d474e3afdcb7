"""Attention of every query to each of its chosen selection blocks, one by one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Kernel
from .arguments import LOG2_E, HeadShape, ScoreBounds, SortedChoices
from .choice_lists import PIECE_WIDTH
from .common import load_matrix, store_matrix
from .score_bounds import largest_scores, takes_part, ways
from .selection_plan import Chunk, SelectionPlan
from .selection_rows import choice_rows, piece_of_chunk
from .tiles import attend_to_keys


@Kernel
@triton.jit(do_not_specialize=["chunk", "first_choice"])
def _forward_kernel(
    query,
    key,
    value,
    parts,
    part_log_sums,
    largest_query,
    largest_key,
    choices,
    starts,
    pieces,
    cu_blocks,
    num_blocks,
    chunk,
    first_choice,
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
    WIDTH: tl.constexpr,
):
    segment, first, last = piece_of_chunk(starts, pieces, chunk, num_blocks * num_kv_heads, ROWS // GROUP, WIDTH)
    if (first < last) & takes_part(largest_query, largest_key, scale, num_kv_heads, BOUNDED):
        block, kv_head = segment % num_blocks, segment // num_blocks
        rows, part_rows, valid = choice_rows(
            choices, first, last, first_choice, k, kv_head, num_kv_heads, group_size, GROUP, ROWS
        )
        queries = load_matrix(query, rows, valid, dim, DIM)
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * num_kv_heads + kv_head
        attended, log_sums = attend_to_keys(
            queries,
            key + first_row * dim,
            value + first_row * value_dim,
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
        )
        store_matrix(parts, part_rows, valid, attended, value_dim, VALUE_DIM)
        tl.store(part_log_sums + part_rows, log_sums, mask=valid)


def attend_to_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor,
    part_log_sums: Tensor,
    bounds: ScoreBounds,
    choices: SortedChoices,
    pieces: Tensor,
    chunk: Chunk,
    k: int,
    selection: SelectionPlan,
    scale: float,
) -> None:
    """Stores the attention of the queries of a chunk to each of their blocks in `parts` and `part_log_sums`."""
    heads, shape = HeadShape.of(query, key, value), selection.shapes.forward
    for bounded in ways(bounds):
        _forward_kernel[(chunk.most_pieces,)](
            query,
            key,
            value,
            parts,
            part_log_sums,
            *bounds,
            choices.choices,
            choices.starts,
            pieces,
            selection.cu_seqlens,
            selection.num_blocks,
            chunk.number,
            chunk.first_choice,
            k,
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            **shape.arguments(),
            BOUNDED=bounded,
            WIDTH=PIECE_WIDTH.value,
        )
