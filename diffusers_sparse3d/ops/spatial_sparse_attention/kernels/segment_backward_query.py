"""The gradient of the queries of attention inside segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape
from .backward_tiles import query_gradients_of_keys
from .common import head_rows, load_matrix, store_matrix
from .segment_plan import SegmentPlan


@Kernel
@triton.jit
def _backward_query_kernel(
    query,  # [N, H, D]
    key,  # [M, H_kv, D], grouped by segment
    value,  # [M, H_kv, D_v], grouped by segment
    inputs,  # BackwardInputs
    grad_query,  # [N, H, D], written, or added to if ADD
    order,  # [N] int64, the queries grouped by segment; None if they are
    tiles,  # [tiles, 3] int32: segment, first place in `order`, place after the last
    cu_keys,  # [S + 1] int32, the first key of each segment
    scale,  # factor of the scores, times log2(e)
    score_scale,  # factor of the scores
    heads,  # HeadConstants
    tile,  # TileConstants
    ADD: tl.constexpr,  # whether the gradient is added to what `grad_query` holds
):
    """A program has one tile of queries of one key/value head, and loops over all keys of the tile's segment."""
    kv_head = tl.program_id(1)
    tiles += 3 * tl.program_id(0)
    segment, start, end = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    # [ROWS]
    rows, valid = head_rows(order, start, end, kv_head, heads, tile.ROWS)
    # [ROWS, DIM], [ROWS, VALUE_DIM]
    queries = load_matrix(query, rows, valid, heads.dim, heads.DIM)
    gradients = load_matrix(inputs.gradient, rows, valid, heads.value_dim, heads.VALUE_DIM)
    # [ROWS]
    products = tl.load(inputs.product + rows, mask=valid, other=0.0)
    log_sums = tl.load(inputs.log_sum + rows, mask=valid, other=float("inf"))

    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    key += (first_key * heads.num_kv_heads + kv_head) * heads.dim
    value += (first_key * heads.num_kv_heads + kv_head) * heads.value_dim
    # [ROWS, DIM]
    grad_queries = query_gradients_of_keys(
        queries, gradients, products, log_sums, key, value, num_keys, scale, heads, tile
    )
    grad_queries *= score_scale
    if ADD:
        grad_queries += load_matrix(grad_query, rows, valid, heads.dim, heads.DIM).to(tl.float32)
    store_matrix(grad_query, rows, valid, grad_queries, heads.dim, heads.DIM)


@on_device_of_first_argument
def query_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: BackwardInputs,
    plan: SegmentPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> Tensor:
    """The gradient of the queries, `[N, H, D]`; arguments as in `segment_attention.attend_backward`."""
    heads, shape = HeadShape.of(query, key, value), plan.shapes.query_gradient
    gradient = torch.empty_like(query) if grad_query is None else grad_query
    num_tiles = plan.backward_query_tiles.shape[0]
    if num_tiles:
        _backward_query_kernel[num_tiles, heads.num_kv_heads](
            query,
            key,
            value,
            inputs,
            gradient,
            plan.order,
            plan.backward_query_tiles,
            plan.cu_keys,
            scale * LOG2_E,
            scale,
            heads.constants(query.dtype),
            shape.constants,
            **shape.launch,
            ADD=grad_query is not None,
        )
    return gradient
