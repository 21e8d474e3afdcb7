"""Backward pass of selected attention, second step: the gradient of a query from those of each of its blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2
from ...runtime.launch import NUMBERS, Kernel
from .arguments import HeadShape
from .common import load_matrix, store_matrix
from .selection_plan import Chunk, head_grid
from .selection_rows import part_rows


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _add_query_gradients_kernel(
    parts,  # [chunk, H_kv, k, H / H_kv, D], the gradients of each query from each of its blocks, before the scale
    blocks,  # [N, H_kv, k] int32 or int64, the numbers of the chosen blocks, -1 where there are no more
    grad_query,  # [N, H, D], written, or added to if ADD
    first_query,  # the first query of the chunk
    k,  # choices of a query and key/value head
    score_scale,  # factor of the scores
    heads,  # HeadConstants
    HEADS: tl.constexpr,  # query heads of a program
    DIM: tl.constexpr,  # `dim`, padded to a power of two
    ADD: tl.constexpr,  # whether the gradient is added to what `grad_query` holds
):
    """A program adds up the parts of some heads of one query."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    # [HEADS]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < heads.num_kv_heads * heads.group_size
    # [HEADS, DIM]
    total = tl.zeros((HEADS, DIM), tl.float32)
    rows, exists = part_rows(blocks, row, token, head, is_head, 0, k, heads)
    next_values = load_matrix(parts, rows, exists, heads.dim, DIM)
    for rank in range(1, k + 1):
        values = next_values
        # The next part is on its way while this one is added.
        # [HEADS], [HEADS, DIM]
        rows, exists = part_rows(blocks, row, token, head, is_head, rank, k, heads)
        next_values = load_matrix(parts, rows, exists, heads.dim, DIM)
        total += values.to(tl.float32)
    total *= score_scale

    rows = token * (heads.num_kv_heads * heads.group_size) + head
    if ADD:
        total += load_matrix(grad_query, rows, is_head, heads.dim, DIM).to(tl.float32)
    store_matrix(grad_query, rows, is_head, total, heads.dim, DIM)


def add_query_gradients(
    parts: Tensor,
    blocks: Tensor,
    grad_query: Tensor,
    chunk: Chunk,
    heads: HeadShape,
    dtype: torch.dtype,
    scale: float,
    add: bool,
) -> None:
    """The gradient of the queries of one chunk from those of each of their chosen blocks.

    Args:
        parts: `[chunk, H_kv, k, H / H_kv, D]`, see `selection_backward_query.query_gradients_of_blocks`.
        blocks: `[N, H_kv, k]` int32 or int64, block numbers, then -1.
        grad_query: `[N, H, D]`, whose rows of the chunk are written.
        chunk: the queries.
        heads: sizes.
        dtype: of queries, keys and values.
        scale: factor of the scores.
        add: whether the gradient is added to what `grad_query` holds.
    """
    padded_dim = next_power_of_2(heads.dim)
    grid, heads_of_program = head_grid(chunk.last - chunk.first, heads, padded_dim)
    _add_query_gradients_kernel[grid](
        parts,
        blocks,
        grad_query,
        chunk.first,
        blocks.shape[2],
        scale,
        heads.constants(dtype),
        HEADS=heads_of_program,
        DIM=padded_dim,
        ADD=add,
    )
