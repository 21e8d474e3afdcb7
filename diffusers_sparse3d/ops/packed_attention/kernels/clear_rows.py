"""Zeros for queries that have no key to attend to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import Kernel
from ...spatial_sparse_attention.kernels.arguments import HeadShape
from ...spatial_sparse_attention.kernels.common import head_rows, store_matrix
from ...spatial_sparse_attention.kernels.segment_plan import SegmentPlan


@Kernel
@triton.jit
def _clear_kernel(output, order, tiles, cu_keys, heads, tile):
    """Clear a tile of queries, if its segment has no key.

    Args:
        output: `[N, H, D_v]`.
        order: `[N]` int64, the queries grouped by segment; None if they are.
        tiles: `[tiles, 3]` int32: segment, first place in `order`, place after the last.
        cu_keys: `[S + 2]` int32, the first key of each segment.
        heads: `HeadConstants`.
        tile: `TileConstants`.
    """
    tiles += 3 * tl.program_id(0)
    segment, start, end = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    if tl.load(cu_keys + segment) == tl.load(cu_keys + segment + 1):
        # [ROWS, VALUE_DIM]
        zeros = tl.zeros((tile.ROWS, heads.VALUE_DIM), tl.float32)
        for kv_head in range(heads.num_kv_heads):
            # [ROWS]
            rows, valid = head_rows(order, start, end, kv_head, heads, tile.ROWS)
            store_matrix(output, rows, valid, zeros, heads.value_dim, heads.VALUE_DIM)


@on_device_of_first_argument
def clear_without_keys(output: Tensor, plan: SegmentPlan, heads: HeadShape) -> None:
    """Set the output of queries whose segment has no key to zero; sums over no keys were divided by zero there."""
    _clear_kernel[(len(plan.query_tiles),)](
        output,
        plan.order,
        plan.query_tiles,
        plan.cu_keys,
        heads.constants(output.dtype),
        plan.shapes.forward.constants,
    )
