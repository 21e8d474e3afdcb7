"""The gradient of every query, from what it gets from each of its chosen selection blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2
from ...runtime.launch import Kernel
from .arguments import HeadShape
from .common import load_matrix, store_matrix
from .selection_plan import Chunk, head_grid
from .selection_rows import part_rows_of_heads


@Kernel
@triton.jit(do_not_specialize=["first_query"])
def _add_query_gradients_kernel(
    parts,
    blocks,
    grad_query,
    first_query,
    k,
    score_scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ADD: tl.constexpr,
):
    """The gradient of a query from what comes from each of its blocks."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < num_kv_heads * group_size
    total = tl.zeros((HEADS, DIM), tl.float32)
    part_rows, exists = part_rows_of_heads(blocks, row, token, heads, is_head, 0, k, num_kv_heads, group_size)
    next_values = load_matrix(parts, part_rows, exists, dim, DIM)
    for slot in range(1, k + 1):
        values = next_values
        part_rows, exists = part_rows_of_heads(blocks, row, token, heads, is_head, slot, k, num_kv_heads, group_size)
        next_values = load_matrix(parts, part_rows, exists, dim, DIM)
        total += values.to(tl.float32)
    total *= score_scale
    rows = token * (num_kv_heads * group_size) + heads
    if ADD:
        total += load_matrix(grad_query, rows, is_head, dim, DIM).to(tl.float32)
    store_matrix(grad_query, rows, is_head, total, dim, DIM)


def add_query_gradients(
    parts: Tensor, blocks: Tensor, grad_query: Tensor, chunk: Chunk, heads: HeadShape, scale: float, add: bool
) -> None:
    """Adds up the parts of the queries of a chunk; stores them in rows of `grad_query`, or adds them to these."""
    padded_dim = next_power_of_2(heads.dim)
    grid, piece = head_grid(chunk.last - chunk.first, heads, padded_dim)
    _add_query_gradients_kernel[grid](
        parts,
        blocks,
        grad_query,
        chunk.first,
        blocks.shape[2],
        scale,
        num_kv_heads=heads.num_kv_heads,
        group_size=heads.group_size,
        dim=heads.dim,
        HEADS=piece,
        DIM=padded_dim,
        ADD=add,
    )
