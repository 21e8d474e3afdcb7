"""The gradients of the keys and values of attention inside segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape
from .backward_tiles import key_gradient_step
from .common import load_matrix, query_rows, store_matrix
from .segment_plan import SegmentPlan
from .tiles import end_of_full_tiles


@triton.jit
def _backward_key_step(
    query,
    gradient,
    log_sum,
    product,
    statistics,
    order,
    begin,
    end,
    kv_head,
    keys,
    values,
    grad_keys,
    grad_values,
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
    FULL: tl.constexpr,
):
    rows, valid = query_rows(order, begin, end, kv_head, num_kv_heads, group_size, GROUP, ROWS, FULL)
    return key_gradient_step(
        query,
        gradient,
        log_sum,
        product,
        statistics,
        rows,
        valid,
        keys,
        values,
        grad_keys,
        grad_values,
        scale,
        dim,
        value_dim,
        DIM,
        VALUE_DIM,
        PRECISION,
        KEYS,
    )


@Kernel
@triton.jit
def _backward_key_kernel(
    query,
    key,
    value,
    gradient,
    log_sum,
    product,
    statistics,
    grad_key,
    grad_value,
    order,
    tiles,
    cu_queries,
    num_rows,
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
):
    tile = tiles + 3 * tl.program_id(0)
    kv_head = tl.program_id(1)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    places = start + tl.arange(0, KEYS)
    is_key = places < end
    key_rows = places.to(tl.int64) * num_kv_heads + kv_head
    keys = load_matrix(key, key_rows, is_key, dim, DIM)
    values = load_matrix(value, key_rows, is_key, value_dim, VALUE_DIM)

    TOKENS: tl.constexpr = ROWS // GROUP
    first_query, last_query = tl.load(cu_queries + segment), tl.load(cu_queries + segment + 1)
    tiles_per_split = tl.cdiv(tl.cdiv(last_query - first_query, TOKENS), num_splits)
    first_query += split * tiles_per_split * TOKENS
    last_query = tl.minimum(last_query, first_query + tiles_per_split * TOKENS)

    grad_keys = tl.zeros((KEYS, DIM), tl.float32)
    grad_values = tl.zeros((KEYS, VALUE_DIM), tl.float32)
    num_queries = tl.maximum(last_query - first_query, 0)
    end_full = first_query + end_of_full_tiles(num_queries, TOKENS, query.dtype.element_ty)
    for begin in range(first_query, end_full, TOKENS):
        grad_keys, grad_values = _backward_key_step(
            query,
            gradient,
            log_sum,
            product,
            statistics,
            order,
            begin,
            last_query,
            kv_head,
            keys,
            values,
            grad_keys,
            grad_values,
            scale,
            num_kv_heads,
            group_size,
            dim,
            value_dim,
            GROUP,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
            True,
        )
    for begin in range(end_full, last_query, TOKENS):
        grad_keys, grad_values = _backward_key_step(
            query,
            gradient,
            log_sum,
            product,
            statistics,
            order,
            begin,
            last_query,
            kv_head,
            keys,
            values,
            grad_keys,
            grad_values,
            scale,
            num_kv_heads,
            group_size,
            dim,
            value_dim,
            GROUP,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
            False,
        )
    key_rows += split.to(tl.int64) * num_rows * num_kv_heads
    store_matrix(grad_key, key_rows, is_key, grad_keys * score_scale, dim, DIM)
    store_matrix(grad_value, key_rows, is_key, grad_values, value_dim, VALUE_DIM)


@on_device_of_first_argument
def key_gradients(
    query: Tensor, key: Tensor, value: Tensor, inputs: BackwardInputs, plan: SegmentPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values, see `segment_attention.attend_backward`."""
    heads = HeadShape.of(query, key, value)
    num_query_tiles, num_key_tiles = plan.backward_query_tiles.shape[0], plan.key_tiles.shape[0]
    # Few keys with many queries each, as compression has them: the queries are split, and the parts added up.
    programs = max(1, num_key_tiles * heads.num_kv_heads)
    wanted = cdiv(8 * num_multiprocessors(query.device), programs)
    num_splits = max(1, min(wanted, cdiv(num_query_tiles, max(1, num_key_tiles)), 32))
    grad_key = torch.empty(num_splits, *key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.empty(num_splits, *value.shape, dtype=torch.float32, device=key.device)
    if num_key_tiles:
        _backward_key_kernel[num_key_tiles, heads.num_kv_heads, num_splits](
            query,
            key,
            value,
            *inputs,
            grad_key,
            grad_value,
            plan.order,
            plan.key_tiles,
            plan.cu_queries,
            key.shape[0],
            scale * LOG2_E,
            scale,
            **heads.arguments(query.dtype),
            **plan.shapes.key_gradient.arguments(),
        )
    return grad_key, grad_value
