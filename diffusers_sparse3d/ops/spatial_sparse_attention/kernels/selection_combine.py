"""Selected attention, second step: the parts of every query combined, and the gated sum of all branches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2
from ...runtime.launch import NUMBERS, Kernel
from .arguments import HeadShape, OtherBranches
from .common import load_matrix, store_matrix
from .selection_plan import Chunk, head_grid
from .selection_rows import part_rows
from .tiles import divide_rows


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _combine_kernel(
    parts,  # [chunk, H_kv, k, H / H_kv, D_v], the attention of each query to each of its blocks
    part_log_sums,  # [chunk, H_kv, k, H / H_kv] float32, its log-sum-exp in base 2
    blocks,  # [N, H_kv, k] int32 or int64, the numbers of the chosen blocks, -1 where there are no more
    output,  # [N, H, D_v], written: the attention to all chosen blocks; None if it is not wanted
    log_sum,  # [N, H] float32, written: its log-sum-exp in base 2; None where `output` is
    others,  # OtherBranches, whose `gated_sum` is written; None if it is not wanted
    first_query,  # the first query of the chunk
    k,  # choices of a query and key/value head
    heads,  # HeadConstants
    HEADS: tl.constexpr,  # query heads of a program
    VALUE_DIM: tl.constexpr,  # `value_dim`, padded to a power of two
):
    """A program combines the parts of some heads of one query, and adds the other branches."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    # [HEADS]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < heads.num_kv_heads * heads.group_size
    # The block of rank 0 always exists: from then on the largest score is finite.
    largest = tl.where(is_head, float("-inf"), 0.0)
    total = tl.zeros((HEADS,), tl.float32)
    # [HEADS, VALUE_DIM]
    attended = tl.zeros((HEADS, VALUE_DIM), tl.float32)
    rows, exists = part_rows(blocks, row, token, head, is_head, 0, k, heads)
    next_values = load_matrix(parts, rows, exists, heads.value_dim, VALUE_DIM)
    next_log_sums = tl.load(part_log_sums + rows, mask=exists, other=float("-inf"))
    for rank in range(1, k + 1):
        values, log_sums = next_values, next_log_sums
        # The next part is on its way while this one is added.
        # [HEADS], [HEADS, VALUE_DIM]
        rows, exists = part_rows(blocks, row, token, head, is_head, rank, k, heads)
        next_values = load_matrix(parts, rows, exists, heads.value_dim, VALUE_DIM)
        next_log_sums = tl.load(part_log_sums + rows, mask=exists, other=float("-inf"))
        # [HEADS]
        new_largest = tl.maximum(largest, log_sums)
        correction, weights = tl.exp2(largest - new_largest), tl.exp2(log_sums - new_largest)
        total = total * correction + weights
        # [HEADS, VALUE_DIM]
        attended = attended * correction[:, None] + weights[:, None] * values.to(tl.float32)
        largest = new_largest
    total = tl.where(is_head, total, 1.0)
    attended = divide_rows(attended, total)

    rows = token * (heads.num_kv_heads * heads.group_size) + head
    if output is not None:
        store_matrix(output, rows, is_head, attended, heads.value_dim, VALUE_DIM)
        tl.store(log_sum + rows, largest + tl.log2(total), mask=is_head)
    if others is not None:
        gate = others.gate + token * 3
        attended *= tl.load(gate + 1).to(tl.float32)
        # [HEADS, VALUE_DIM]
        compressed = load_matrix(others.compressed, rows, is_head, heads.value_dim, VALUE_DIM)
        attended += tl.load(gate).to(tl.float32) * compressed.to(tl.float32)
        window = load_matrix(others.window, rows, is_head, heads.value_dim, VALUE_DIM)
        attended += tl.load(gate + 2).to(tl.float32) * window.to(tl.float32)
        store_matrix(others.gated_sum, rows, is_head, attended, heads.value_dim, VALUE_DIM)


def combine_blocks(
    parts: Tensor,
    part_log_sums: Tensor,
    blocks: Tensor,
    output: Tensor | None,
    log_sum: Tensor | None,
    others: OtherBranches | None,
    chunk: Chunk,
    heads: HeadShape,
    dtype: torch.dtype,
) -> None:
    """The attention of the queries of one chunk to all of their chosen blocks, from that to each.

    Args:
        parts: `[chunk, H_kv, k, H / H_kv, D_v]`, see `selection_forward.attend_to_blocks`.
        part_log_sums: `[chunk, H_kv, k, H / H_kv]` float32, in base 2.
        blocks: `[N, H_kv, k]` int32 or int64, block numbers, then -1.
        output: `[N, H, D_v]`, whose rows of the chunk are written; None if it is not wanted.
        log_sum: `[N, H]` float32, the same; None where `output` is.
        others: the other branches, whose `gated_sum` is written; None if it is not wanted.
        chunk: the queries.
        heads: sizes.
        dtype: of queries, keys and values.
    """
    padded_dim = next_power_of_2(heads.value_dim)
    grid, heads_of_program = head_grid(chunk.last - chunk.first, heads, padded_dim)
    _combine_kernel[grid](
        parts,
        part_log_sums,
        blocks,
        output,
        log_sum,
        others,
        chunk.first,
        blocks.shape[2],
        heads.constants(dtype),
        HEADS=heads_of_program,
        VALUE_DIM=padded_dim,
    )
