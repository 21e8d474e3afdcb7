"""Attention inside segments, as of every window to itself; backward also of every sample to its compressed keys.

A query tile belongs to one segment and loops over the keys of the segment; in the backward pass a second kernel has
tiles of keys that loop over the queries, so nothing is added up by atomics. Per score, the forward pass takes
2 (D + D_v) floating-point operations and one exponential, the backward pass 2 (4 D + 3 D_v) (scores and products with
the values are computed by both kernels) and two exponentials.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...runtime.dispatch import cdiv, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import Kernel
from .backward_inputs import BackwardInputs, prepare_backward
from .common import (
    LOG2_E,
    AttentionShapes,
    HeadShape,
    TileShape,
    load_matrix,
    query_rows,
    segment_tiles,
    store_matrix,
)
from .tiles import attend_to_keys, end_of_full_tiles, key_gradient_step, query_gradient


@Kernel
@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    output,
    log_sum,
    order,
    tiles,
    cu_keys,
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
):
    tile = tiles + 3 * tl.program_id(0)
    kv_head = tl.program_id(1)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = load_matrix(query, rows, valid, dim, DIM)
    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    attended, log_sums = attend_to_keys(
        queries,
        key + (first_key * num_kv_heads + kv_head) * dim,
        value + (first_key * num_kv_heads + kv_head) * value_dim,
        num_keys,
        tl.full((ROWS,), float("-inf"), tl.float32),
        scale,
        num_kv_heads,
        dim,
        value_dim,
        DIM,
        VALUE_DIM,
        PRECISION,
        ROWS,
        KEYS,
        False,
    )
    store_matrix(output, rows, valid, attended, value_dim, VALUE_DIM)
    tl.store(log_sum + rows, log_sums, mask=valid)


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


def forward_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 2)
    return TileShape(128, 32, 4, 3) if widest <= 64 else TileShape(64, 64, 4, 2)


def query_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """Of the gradient of the queries."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    if widest <= 32:
        return TileShape(128, 32, 4, 3)
    return TileShape(64, 64, 4, 2) if widest <= 64 else TileShape(64, 64, 8, 1)


def key_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """Of the gradients of keys and values."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    if widest <= 64:
        return TileShape(64, 64, 4, 3 if widest <= 32 else 2)
    return TileShape(64, 64, 8, 1)


class SegmentPlan(NamedTuple):
    """Which queries attend to which keys; depends on the coordinates and the tile shapes alone.

    Attributes:
        order: `[N]` int64, the queries grouped by segment; None if they are.
        cu_queries: `[S + 1]` int32, where each segment starts among them.
        cu_keys: `[S + 1]` int32, the same of the keys, which are grouped already.
        query_tiles, backward_query_tiles, key_tiles: as `segment_tiles` makes them, for the three kernels.
        shapes: of the tiles.
    """

    order: Tensor | None
    cu_queries: Tensor
    cu_keys: Tensor
    query_tiles: Tensor
    backward_query_tiles: Tensor
    key_tiles: Tensor
    shapes: AttentionShapes

    @classmethod
    def make(
        cls,
        order: Tensor | None,
        cu_queries: Tensor,
        cu_keys: Tensor,
        heads: HeadShape,
        shapes: AttentionShapes,
        query_tiles: Tensor | None = None,
    ) -> SegmentPlan:
        """`query_tiles` are those of the forward pass, if there are some."""
        forward_rows, backward_rows = shapes.forward.rows, shapes.query_gradient.rows
        if query_tiles is None:
            query_tiles = segment_tiles(cu_queries, heads.tokens(forward_rows))
        same = forward_rows == backward_rows
        backward_query_tiles = query_tiles if same else segment_tiles(cu_queries, heads.tokens(backward_rows))
        key_tiles = segment_tiles(cu_keys, shapes.key_gradient.keys)
        return cls(order, cu_queries, cu_keys, query_tiles, backward_query_tiles, key_tiles, shapes)


@on_device_of_first_argument
def attend(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> tuple[Tensor, Tensor]:
    """
    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, H_kv, D]`, contiguous, grouped by segment.
        value: `[M, H_kv, D_v]`, contiguous, grouped by segment.
        plan: the segments. A segment with queries has keys.
        scale: factor of the scores, positive.

    Returns:
        The output `[N, H, D_v]`, and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`.
    """
    heads = HeadShape.of(query, key, value)
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
            **heads.arguments(query.dtype),
            **plan.shapes.forward.arguments(),
        )
    return output, log_sum


@on_device_of_first_argument
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: BackwardInputs,
    plan: SegmentPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        query, key, value, plan, scale: as in `attend`.
        inputs: of its results and the gradient of the output.
        grad_query: added to, in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[P, M, H_kv, D]` and value `[P, M, H_kv, D_v]`, the latter two in float32
        and as parts to be added up, see `add_parts`.
    """
    heads = HeadShape.of(query, key, value)
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    arguments = heads.arguments(query.dtype)
    num_query_tiles, num_key_tiles = plan.backward_query_tiles.shape[0], plan.key_tiles.shape[0]
    if num_query_tiles:
        _backward_query_kernel[num_query_tiles, heads.num_kv_heads](
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
            **arguments,
            **plan.shapes.query_gradient.arguments(),
            ADD=add,
        )
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
            **arguments,
            **plan.shapes.key_gradient.arguments(),
        )
    return grad_query, grad_key, grad_value


def add_parts(parts: Tensor) -> Tensor:
    """`[P, M, ...]` -> `[M, ...]`."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


class SegmentAttention(torch.autograd.Function):
    """`attend` with gradients of query, key and value."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output, log_sum = attend(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        inputs = prepare_backward(output, log_sum, grad_output.contiguous(), ctx.scale)
        grad_query, *parts = attend_backward(query, key, value, inputs, ctx.plan, ctx.scale)
        grad_key, grad_value = (add_parts(part).to(key.dtype) for part in parts)
        return grad_query, grad_key, grad_value, None, None
