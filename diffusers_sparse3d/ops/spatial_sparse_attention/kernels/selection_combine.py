"""The attention of every query to all of its chosen blocks, from that to each, and the gated sum of all branches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2
from ...runtime.launch import Kernel
from .arguments import HeadShape, OtherBranches
from .common import load_matrix, store_matrix
from .selection_plan import Chunk, head_grid
from .selection_rows import part_rows_of_heads


@Kernel
@triton.jit(do_not_specialize=["first_query"])
def _combine_kernel(
    parts,
    part_log_sums,
    blocks,
    output,
    log_sum,
    gate,
    compressed,
    window,
    gated_sum,
    first_query,
    k,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    value_dim: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """The attention of a query from that to each of its blocks, and its gated sum with other branches."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < num_kv_heads * group_size
    # The first slot of a query is never empty.
    largest = tl.where(is_head, float("-inf"), 0.0)
    total = tl.zeros((HEADS,), tl.float32)
    attended = tl.zeros((HEADS, VALUE_DIM), tl.float32)
    part_rows, exists = part_rows_of_heads(blocks, row, token, heads, is_head, 0, k, num_kv_heads, group_size)
    next_values = load_matrix(parts, part_rows, exists, value_dim, VALUE_DIM)
    next_log_sums = tl.load(part_log_sums + part_rows, mask=exists, other=float("-inf"))
    for slot in range(1, k + 1):
        values, log_sums = next_values, next_log_sums
        # On its way while these are added.
        part_rows, exists = part_rows_of_heads(blocks, row, token, heads, is_head, slot, k, num_kv_heads, group_size)
        next_values = load_matrix(parts, part_rows, exists, value_dim, VALUE_DIM)
        next_log_sums = tl.load(part_log_sums + part_rows, mask=exists, other=float("-inf"))
        new_largest = tl.maximum(largest, log_sums)
        correction, weights = tl.exp2(largest - new_largest), tl.exp2(log_sums - new_largest)
        total = total * correction + weights
        attended = attended * correction[:, None] + weights[:, None] * values.to(tl.float32)
        largest = new_largest
    total = tl.where(is_head, total, 1.0)
    attended /= total[:, None]
    rows = token * (num_kv_heads * group_size) + heads
    if output is not None:
        store_matrix(output, rows, is_head, attended, value_dim, VALUE_DIM)
        tl.store(log_sum + rows, largest + tl.log2(total), mask=is_head)
    if gate is not None:
        gate += token * 3
        attended *= tl.load(gate + 1).to(tl.float32)
        other = load_matrix(compressed, rows, is_head, value_dim, VALUE_DIM)
        attended += tl.load(gate).to(tl.float32) * other.to(tl.float32)
        other = load_matrix(window, rows, is_head, value_dim, VALUE_DIM)
        attended += tl.load(gate + 2).to(tl.float32) * other.to(tl.float32)
        store_matrix(gated_sum, rows, is_head, attended, value_dim, VALUE_DIM)


def combine_blocks(
    parts: Tensor,
    part_log_sums: Tensor,
    blocks: Tensor,
    output: Tensor | None,
    log_sum: Tensor | None,
    others: OtherBranches | None,
    chunk: Chunk,
    heads: HeadShape,
) -> None:
    """Combines the parts of the queries of a chunk into rows of `output`, `log_sum` and `others.gated_sum`."""
    padded_dim = next_power_of_2(heads.value_dim)
    grid, piece = head_grid(chunk.last - chunk.first, heads, padded_dim)
    _combine_kernel[grid](
        parts,
        part_log_sums,
        blocks,
        output,
        log_sum,
        *(others or (None,) * 4),
        chunk.first,
        blocks.shape[2],
        num_kv_heads=heads.num_kv_heads,
        group_size=heads.group_size,
        value_dim=heads.value_dim,
        HEADS=piece,
        VALUE_DIM=padded_dim,
    )
