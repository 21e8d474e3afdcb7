"""Attention inside segments: of every sample to its compressed keys, or of every window to itself.

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

from ...triton_dispatch import num_multiprocessors, on_device_of_first_argument
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


@triton.jit
def _end_of_full_tiles(count, SIZE: tl.constexpr, dtype: tl.constexpr):
    """Where the tiles of so many rows that need no mask end.

    In float32 none: its products are unrolled, and a second loop that holds them too would spill registers.
    """
    if dtype == tl.float32:
        return count * 0
    return count - count % SIZE


@triton.jit
def _load_keys(
    key,
    value,
    begin,
    num_keys,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys and values of the places from `begin` on, and which are real: a mask that only the last tile needs."""
    places = begin + tl.arange(0, KEYS)
    is_key = places < num_keys if MASKED else places >= 0
    keys = load_matrix(key, places * num_kv_heads, is_key, dim, DIM)
    values = load_matrix(value, places * num_kv_heads, is_key, value_dim, VALUE_DIM)
    return keys, values, is_key


@triton.jit
def _forward_step(
    queries, keys, values, is_key, largest, total, attended, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr
):
    """A tile of keys: the largest score so far, the sum of weights and the weighted sum of values."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    correction = tl.exp2(largest - new_largest)
    total = total * correction + tl.sum(weights, 1)
    attended = attended * correction[:, None]
    attended = tl.dot(weights.to(values.dtype), values, attended, input_precision=PRECISION)
    return new_largest, total, attended


@triton.jit
def _backward_query_step(
    queries,
    gradients,
    products,
    log_sums,
    keys,
    values,
    is_key,
    grad_queries,
    scale,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of keys: what it adds to the gradient of the queries."""
    exponents = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale - log_sums[:, None]
    if MASKED:
        # Keys past the end are zeros, but their weight could overflow.
        exponents = tl.where(is_key[None, :], exponents, float("-inf"))
    weights = tl.exp2(exponents)
    grad_weights = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - products[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, grad_queries, input_precision=PRECISION)


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
    rows, _, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = load_matrix(query, rows, valid, dim, DIM)
    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    key += (first_key * num_kv_heads + kv_head) * dim
    value += (first_key * num_kv_heads + kv_head) * value_dim

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    end_full = _end_of_full_tiles(num_keys, KEYS, query.dtype.element_ty)
    for begin in range(0, end_full, KEYS):
        keys, values, is_key = _load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, False
        )
        largest, total, attended = _forward_step(
            queries, keys, values, is_key, largest, total, attended, scale, PRECISION, False
        )
    for begin in range(end_full, num_keys, KEYS):
        keys, values, is_key = _load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, True
        )
        largest, total, attended = _forward_step(
            queries, keys, values, is_key, largest, total, attended, scale, PRECISION, True
        )

    store_matrix(output, rows, valid, attended / total[:, None], value_dim, VALUE_DIM)
    tl.store(log_sum + rows, largest + tl.log2(total), mask=valid)


@triton.jit
def _backward_query_kernel(
    query,
    key,
    value,
    output,
    log_sum,
    grad_output,
    gate,
    grad_query,
    product,
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
    GATED: tl.constexpr,
    ADD: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    kv_head = tl.program_id(1)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows, tokens, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = load_matrix(query, rows, valid, dim, DIM)
    gradients = load_matrix(grad_output, rows, valid, value_dim, VALUE_DIM)
    outputs = load_matrix(output, rows, valid, value_dim, VALUE_DIM)
    products = tl.sum(gradients.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(product + rows, products, mask=valid)
    log_sums = tl.load(log_sum + rows, mask=valid, other=float("inf"))
    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    key += (first_key * num_kv_heads + kv_head) * dim
    value += (first_key * num_kv_heads + kv_head) * value_dim

    grad_queries = tl.zeros((ROWS, DIM), tl.float32)
    end_full = _end_of_full_tiles(num_keys, KEYS, query.dtype.element_ty)
    for begin in range(0, end_full, KEYS):
        keys, values, is_key = _load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, False
        )
        grad_queries = _backward_query_step(
            queries, gradients, products, log_sums, keys, values, is_key, grad_queries, scale, PRECISION, False
        )
    for begin in range(end_full, num_keys, KEYS):
        keys, values, is_key = _load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, True
        )
        grad_queries = _backward_query_step(
            queries, gradients, products, log_sums, keys, values, is_key, grad_queries, scale, PRECISION, True
        )
    grad_queries *= score_scale
    if GATED:
        grad_queries *= tl.load(gate + tokens, mask=valid, other=0.0)[:, None]
    if ADD:
        grad_queries += load_matrix(grad_query, rows, valid, dim, DIM).to(tl.float32)
    store_matrix(grad_query, rows, valid, grad_queries, dim, DIM)


@triton.jit
def _backward_key_step(
    query,
    grad_output,
    gate,
    product,
    log_sum,
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
    GATED: tl.constexpr,
    FULL: tl.constexpr,
):
    """A tile of queries: the gradients of keys and values with what it adds."""
    rows, tokens, valid = query_rows(order, begin, end, kv_head, num_kv_heads, group_size, GROUP, ROWS, FULL)
    queries = load_matrix(query, rows, valid, dim, DIM)
    gradients = load_matrix(grad_output, rows, valid, value_dim, VALUE_DIM)
    products = tl.load(product + rows, mask=valid, other=0.0)
    # Rows that are not valid get the weight 0.
    log_sums = tl.load(log_sum + rows, mask=valid, other=float("inf"))
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - log_sums[None, :])
    if GATED:
        weights *= tl.load(gate + tokens, mask=valid, other=0.0)[None, :]
    grad_values = tl.dot(weights.to(gradients.dtype), gradients, grad_values, input_precision=PRECISION)
    grad_weights = tl.dot(values, tl.trans(gradients), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - products[None, :])
    grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys, input_precision=PRECISION)
    return grad_keys, grad_values


@triton.jit
def _backward_key_kernel(
    query,
    key,
    value,
    log_sum,
    grad_output,
    gate,
    product,
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
    GATED: tl.constexpr,
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
    end_full = first_query + _end_of_full_tiles(num_queries, TOKENS, query.dtype.element_ty)
    for begin in range(first_query, end_full, TOKENS):
        grad_keys, grad_values = _backward_key_step(
            query,
            grad_output,
            gate,
            product,
            log_sum,
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
            GATED,
            True,
        )
    for begin in range(end_full, last_query, TOKENS):
        grad_keys, grad_values = _backward_key_step(
            query,
            grad_output,
            gate,
            product,
            log_sum,
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
            GATED,
            False,
        )
    key_rows += split.to(tl.int64) * num_rows * num_kv_heads
    store_matrix(grad_key, key_rows, is_key, grad_keys * score_scale, dim, DIM)
    store_matrix(grad_value, key_rows, is_key, grad_values, value_dim, VALUE_DIM)


def forward_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 2)
    if widest <= 64:
        return TileShape(64, 128, 4, 3 if widest <= 32 else 2)
    return TileShape(64, 64, 4, 2)


def backward_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    if widest <= 64:
        return TileShape(64, 64, 4, 3 if widest <= 32 else 2)
    return TileShape(64, 64, 8, 1)


class SegmentPlan(NamedTuple):
    """Which queries attend to which keys; depends on the coordinates and the tile shapes alone.

    Attributes:
        order: `[N]` int64, the queries grouped by segment.
        cu_queries: `[S + 1]` int32, where each segment starts among them.
        cu_keys: `[S + 1]` int32, the same of the keys, which are grouped already.
        query_tiles, backward_query_tiles, key_tiles: as `segment_tiles` makes them, for the three kernels.
        shapes: of the tiles.
    """

    order: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    query_tiles: Tensor
    backward_query_tiles: Tensor
    key_tiles: Tensor
    shapes: AttentionShapes

    @classmethod
    def make(
        cls, order: Tensor, cu_queries: Tensor, cu_keys: Tensor, heads: HeadShape, shapes: AttentionShapes
    ) -> SegmentPlan:
        forward_rows, backward_rows = shapes.forward.rows, shapes.query_gradient.rows
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
    if len(plan.query_tiles):
        _forward_kernel[len(plan.query_tiles), heads.num_kv_heads](
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
            **plan.shapes.forward.arguments,
        )
    return output, log_sum


@on_device_of_first_argument
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    grad_output: Tensor,
    plan: SegmentPlan,
    scale: float,
    gate: Tensor | None = None,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Args:
        query, key, value, plan, scale: as in `attend`.
        output, log_sum: what it returned.
        grad_output: `[N, H, D_v]`, contiguous.
        gate: `[N]` float32, factor by which the output was multiplied before `grad_output` was taken.
        grad_query: added to, in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[M, H_kv, D]` and value `[M, H_kv, D_v]`, the latter two in float32; and
        the product of output and gradient, summed over channels, `[N, H]` float32.
    """
    heads = HeadShape.of(query, key, value)
    product = torch.empty_like(log_sum)
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    arguments = heads.arguments(query.dtype) | {"GATED": gate is not None}
    num_query_tiles, num_key_tiles = len(plan.backward_query_tiles), len(plan.key_tiles)
    if num_query_tiles:
        _backward_query_kernel[num_query_tiles, heads.num_kv_heads](
            query,
            key,
            value,
            output,
            log_sum,
            grad_output,
            gate,
            grad_query,
            product,
            plan.order,
            plan.backward_query_tiles,
            plan.cu_keys,
            scale * LOG2_E,
            scale,
            **arguments,
            **plan.shapes.query_gradient.arguments,
            ADD=add,
        )
    # Few keys with many queries each, as compression has them: the queries are split, and the parts added up.
    programs = max(1, num_key_tiles * heads.num_kv_heads)
    wanted = triton.cdiv(8 * num_multiprocessors(query.device), programs)
    num_splits = max(1, min(wanted, triton.cdiv(num_query_tiles, max(1, num_key_tiles)), 32))
    grad_key = torch.empty(num_splits, *key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.empty(num_splits, *value.shape, dtype=torch.float32, device=key.device)
    if num_key_tiles:
        _backward_key_kernel[num_key_tiles, heads.num_kv_heads, num_splits](
            query,
            key,
            value,
            log_sum,
            grad_output,
            gate,
            product,
            grad_key,
            grad_value,
            plan.order,
            plan.key_tiles,
            plan.cu_queries,
            len(key),
            scale * LOG2_E,
            scale,
            **arguments,
            **plan.shapes.key_gradient.arguments,
        )
    if num_splits == 1:
        return grad_query, grad_key[0], grad_value[0], product
    return grad_query, grad_key.sum(0), grad_value.sum(0), product


class SegmentAttention(torch.autograd.Function):
    """`attend` with gradients of query, key and value; the log-sum-exp, its second result, has none."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output, log_sum = attend(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(log_sum)
        return output, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _, key, value, *_ = ctx.saved_tensors
        grad_query, grad_key, grad_value, _ = attend_backward(
            *ctx.saved_tensors, grad_output.contiguous(), ctx.plan, ctx.scale
        )
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
