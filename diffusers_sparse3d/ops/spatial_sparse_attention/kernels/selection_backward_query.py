"""Backward pass of selected attention, first step: the gradients that queries get from each of their chosen blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import NUMBERS, Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape, SortedChoices
from .backward_tiles import query_gradients_of_keys
from .choice_lists import PIECE_WIDTH
from .common import load_matrix, store_matrix
from .selection_plan import Chunk, SelectionPlan
from .selection_rows import piece_of_chunk, rows_of_choices


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _backward_query_kernel(
    query,  # [N, H, D]
    key,  # [N, H_kv, D], grouped by selection block
    value,  # [N, H_kv, D_v], grouped by selection block
    inputs,  # BackwardInputs
    parts,  # [chunk, H_kv, k, H / H_kv, D], written: gradients that queries get from each block, before the scale
    choices,  # SortedChoices
    pieces,  # [pieces, WIDTH] int32: list, first choice, choice after the last, number in the list
    cu_blocks,  # [num_blocks + 1] int32, the first key of each block
    num_blocks,  # selection blocks of all samples
    chunk,  # the number of the chunk
    first_choice,  # the number of the first choice of the chunk
    k,  # choices of a query and key/value head
    scale,  # factor of the scores, times log2(e)
    heads,  # HeadConstants
    tile,  # TileConstants
    WIDTH: tl.constexpr,  # numbers of a piece
):
    """A program has the queries of one piece, a tile of choices of one block, and loops over the keys of the block."""
    TOKENS: tl.constexpr = tile.ROWS // heads.GROUP
    num_lists = num_blocks * heads.num_kv_heads
    list_number, first, last = piece_of_chunk(choices.starts, pieces, chunk, num_lists, TOKENS, WIDTH)
    if first < last:
        block, kv_head = list_number % num_blocks, list_number // num_blocks
        # [ROWS]
        rows, rows_of_parts, valid = rows_of_choices(
            choices.choices, first, last, first_choice, k, kv_head, heads, tile.ROWS
        )
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * heads.num_kv_heads + kv_head
        # [ROWS, DIM], [ROWS, VALUE_DIM]
        queries = load_matrix(query, rows, valid, heads.dim, heads.DIM)
        gradients = load_matrix(inputs.gradient, rows, valid, heads.value_dim, heads.VALUE_DIM)
        # [ROWS]
        products = tl.load(inputs.product + rows, mask=valid, other=0.0)
        log_sums = tl.load(inputs.log_sum + rows, mask=valid, other=float("inf"))
        key += first_row * heads.dim
        value += first_row * heads.value_dim
        # [ROWS, DIM]
        grad_queries = query_gradients_of_keys(
            queries, gradients, products, log_sums, key, value, num_keys, scale, heads, tile
        )
        store_matrix(parts, rows_of_parts, valid, grad_queries, heads.dim, heads.DIM)


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
    """The gradients that the queries of one chunk get from each of their chosen blocks, before the scale.

    Args:
        query, key, value, inputs, selection, scale: as in `selection_attention.attend_backward`.
        parts: `[chunk, H_kv, k, H / H_kv, D]`, written.
        choices: sorted by block in each chunk.
        pieces: their lists cut into pieces of the tokens of a tile.
        chunk: the queries.
        k: choices of a query and key/value head.
    """
    heads, shape = HeadShape.of(query, key, value), selection.shapes.query_gradient
    _backward_query_kernel[(chunk.most_pieces,)](
        query,
        key,
        value,
        inputs,
        parts,
        choices,
        pieces,
        selection.cu_seqlens,
        selection.num_blocks,
        chunk.number,
        chunk.first_choice,
        k,
        scale * LOG2_E,
        heads.constants(query.dtype),
        shape.constants,
        **shape.launch,
        WIDTH=PIECE_WIDTH.value,
    )
