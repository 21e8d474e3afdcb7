"""Attention inside segments: every query attends to all keys of its window or of its sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, HeadShape
from .common import head_rows, load_matrix, store_matrix
from .segment_plan import SegmentPlan
from .tiles import attend_to_keys


@Kernel
@triton.jit
def _forward_kernel(
    query,  # [N, H, D]
    key,  # [M, H_kv, D], grouped by segment
    value,  # [M, H_kv, D_v], grouped by segment
    output,  # [N, H, D_v], written
    log_sum,  # [N, H] float32, written: the log-sum-exp of the scores, in base 2
    order,  # [N] int64, the queries grouped by segment; None if they are
    tiles,  # [tiles, 3] int32: segment, first place in `order`, place after the last
    cu_keys,  # [S + 1] int32, the first key of each segment
    scale,  # factor of the scores, times log2(e)
    heads,  # HeadConstants
    tile,  # TileConstants
):
    """A program attends from one tile of queries of one key/value head to all keys of the tile's segment."""
    kv_head = tl.program_id(1)
    tiles += 3 * tl.program_id(0)
    segment, start, end = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    # [ROWS]
    rows, valid = head_rows(order, start, end, kv_head, heads, tile.ROWS)
    # [ROWS, DIM]
    queries = load_matrix(query, rows, valid, heads.dim, heads.DIM)

    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    key += (first_key * heads.num_kv_heads + kv_head) * heads.dim
    value += (first_key * heads.num_kv_heads + kv_head) * heads.value_dim
    # [ROWS]
    largest = tl.full((tile.ROWS,), float("-inf"), tl.float32)
    # [ROWS, VALUE_DIM], [ROWS]
    attended, log_sums = attend_to_keys(queries, key, value, num_keys, largest, scale, heads, tile, False)
    store_matrix(output, rows, valid, attended, heads.value_dim, heads.VALUE_DIM)
    tl.store(log_sum + rows, log_sums, mask=valid)


@on_device_of_first_argument
def attend(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> tuple[Tensor, Tensor]:
    """The attention of every query to all keys of its segment.

    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, H_kv, D]`, contiguous, grouped by segment.
        value: `[M, H_kv, D_v]`, contiguous, grouped by segment.
        plan: the segments. A segment with queries has keys.
        scale: factor of the scores, positive.

    Returns:
        The output `[N, H, D_v]`, and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`.
    """
    heads, shape = HeadShape.of(query, key, value), plan.shapes.forward
    output = value.new_empty(*query.shape[:2], heads.value_dim)
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
    num_tiles = plan.query_tiles.shape[0]
    if num_tiles:
        _forward_kernel[num_tiles, heads.num_kv_heads](
            query,
            key,
            value,
            output,
            log_sum,
            plan.order,
            plan.query_tiles,
            plan.cu_keys,
            scale * LOG2_E,
            heads.constants(query.dtype),
            shape.constants,
            **shape.launch,
        )
    return output, log_sum
