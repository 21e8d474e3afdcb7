"""The parts of the backward kernels of every attention: one tile of queries and one of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_inputs import LOG_SUM_COLUMN, PRODUCT_COLUMN, STATISTICS_WIDTH, negated_parts
from .common import load_matrix
from .tiles import end_of_full_tiles, load_keys


@triton.jit
def _query_gradient_step(
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
def query_gradient(
    queries,
    gradients,
    products,
    log_sums,
    key,
    value,
    num_keys,
    scale,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradient of queries `[ROWS, DIM]`, before the scale of the scores, from the keys from two pointers on."""
    grad_queries = tl.zeros((ROWS, DIM), tl.float32)
    end_full = end_of_full_tiles(num_keys, KEYS, queries.dtype)
    for begin in range(0, end_full, KEYS):
        keys, values, is_key = load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, False
        )
        grad_queries = _query_gradient_step(
            queries, gradients, products, log_sums, keys, values, is_key, grad_queries, scale, PRECISION, False
        )
    for begin in range(end_full, num_keys, KEYS):
        keys, values, is_key = load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, True
        )
        grad_queries = _query_gradient_step(
            queries, gradients, products, log_sums, keys, values, is_key, grad_queries, scale, PRECISION, True
        )
    return grad_queries


@triton.jit
def key_gradient_step(
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
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A tile of queries: the gradients of keys, before the scale of the scores, and values with what it adds.

    Rows that are not valid count as zeros, their gradient too, so they add nothing.
    """
    queries = load_matrix(query, rows, valid, dim, DIM)
    gradients = load_matrix(gradient, rows, valid, value_dim, VALUE_DIM)
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    grad_weights = tl.dot(values, tl.trans(gradients), input_precision=PRECISION)
    if statistics is not None:
        # Subtracted by the matrix units. As vectors they would be loaded element by element, in every thread.
        parts = tl.trans(load_matrix(statistics, rows, valid, STATISTICS_WIDTH, STATISTICS_WIDTH))
        scores = tl.dot(negated_parts(LOG_SUM_COLUMN, KEYS, keys.dtype), parts, scores)
        grad_weights = tl.dot(negated_parts(PRODUCT_COLUMN, KEYS, keys.dtype), parts, grad_weights)
        weights = tl.exp2(scores * scale)
        grad_scores = weights * grad_weights
    else:
        weights = tl.exp2(scores * scale - tl.load(log_sum + rows, mask=valid, other=float("inf"))[None, :])
        grad_scores = weights * (grad_weights - tl.load(product + rows, mask=valid, other=0.0)[None, :])
    grad_values = tl.dot(weights.to(gradients.dtype), gradients, grad_values, input_precision=PRECISION)
    grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys, input_precision=PRECISION)
    return grad_keys, grad_values
