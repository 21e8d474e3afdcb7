"""The gradient of the queries of attention inside segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape
from .backward_tiles import query_gradient
from .common import load_matrix, query_rows, store_matrix
from .segment_plan import SegmentPlan


@Kernel
@triton.jit
def _backward_query_kernel(
    query,
    key,
    value,
    gradient,
    log_sum,
    product,
    grad_query,
    order,
    tiles,
    cu_keys,
    scale,
    score_scale,
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
    ADD: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    kv_head = tl.program_id(1)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = load_matrix(query, rows, valid, dim, DIM)
    gradients = load_matrix(gradient, rows, valid, value_dim, VALUE_DIM)
    products = tl.load(product + rows, mask=valid, other=0.0)
    log_sums = tl.load(log_sum + rows, mask=valid, other=float("inf"))
    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    grad_queries = query_gradient(
        queries,
        gradients,
        products,
        log_sums,
        key + (first_key * num_kv_heads + kv_head) * dim,
        value + (first_key * num_kv_heads + kv_head) * value_dim,
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
    grad_queries *= score_scale
    if ADD:
        grad_queries += load_matrix(grad_query, rows, valid, dim, DIM).to(tl.float32)
    store_matrix(grad_query, rows, valid, grad_queries, dim, DIM)


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
    """The gradient of the queries, see `segment_attention.attend_backward`."""
    heads = HeadShape.of(query, key, value)
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    num_tiles = plan.backward_query_tiles.shape[0]
    if num_tiles:
        _backward_query_kernel[num_tiles, heads.num_kv_heads](
            query,
            key,
            value,
            inputs.gradient,
            inputs.log_sum,
            inputs.product,
            grad_query,
            plan.order,
            plan.backward_query_tiles,
            plan.cu_keys,
            scale * LOG2_E,
            scale,
            **heads.arguments(query.dtype),
            **plan.shapes.query_gradient.arguments(),
            ADD=add,
        )
    return grad_query
