"""The gradients that queries get from each of their chosen selection blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape, SortedChoices
from .backward_tiles import query_gradient
from .choice_lists import PIECE_WIDTH
from .common import load_matrix, store_matrix
from .selection_plan import Chunk, SelectionPlan
from .selection_rows import choice_rows, piece_of_chunk


@Kernel
@triton.jit(do_not_specialize=["chunk", "first_choice"])
def _backward_query_kernel(
    query,
    key,
    value,
    gradient,
    log_sum,
    product,
    parts,
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
    WIDTH: tl.constexpr,
):
    segment, first, last = piece_of_chunk(starts, pieces, chunk, num_blocks * num_kv_heads, ROWS // GROUP, WIDTH)
    if first < last:
        block, kv_head = segment % num_blocks, segment // num_blocks
        rows, part_rows, valid = choice_rows(
            choices, first, last, first_choice, k, kv_head, num_kv_heads, group_size, GROUP, ROWS
        )
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * num_kv_heads + kv_head
        grad_queries = query_gradient(
            load_matrix(query, rows, valid, dim, DIM),
            load_matrix(gradient, rows, valid, value_dim, VALUE_DIM),
            tl.load(product + rows, mask=valid, other=0.0),
            tl.load(log_sum + rows, mask=valid, other=float("inf")),
            key + first_row * dim,
            value + first_row * value_dim,
            num_keys,
            scale,
            num_kv_heads,
            dim,
            value_dim,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
        )
        store_matrix(parts, part_rows, valid, grad_queries, dim, DIM)


def query_gradients_of_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: BackwardInputs,
    parts: Tensor,
    choices: SortedChoices,
    pieces: Tensor,
    chunk: Chunk,
    k: int,
    selection: SelectionPlan,
    scale: float,
) -> None:
    """Stores the gradients that the queries of a chunk get from each of their blocks in `parts`, before the scale."""
    heads, shape = HeadShape.of(query, key, value), selection.shapes.query_gradient
    _backward_query_kernel[(chunk.most_pieces,)](
        query,
        key,
        value,
        inputs.gradient,
        inputs.log_sum,
        inputs.product,
        parts,
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
        WIDTH=PIECE_WIDTH.value,
    )
