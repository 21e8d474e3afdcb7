"""What a program does with a tile of queries and a run of keys, in every kind of attention of this folder.

Scores are kept in base 2 (scale times log2(e)), and so is the log-sum-exp. Masks are needed in the last tile of a run
only, so it has a loop of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_inputs import LOG_SUM_COLUMN, PRODUCT_COLUMN, STATISTICS_WIDTH, negated_parts
from .common import load_matrix


# Columns of a tile of weights are added up in so many sums, which a thread of the matrix unit's layout has by itself.
SUM_WIDTH = tl.constexpr(8)


@triton.jit
def sum_columns(weights):
    """`[ROWS, KEYS]` -> `[ROWS, SUM_WIDTH]`."""
    ROWS: tl.constexpr = weights.shape[0]
    KEYS: tl.constexpr = weights.shape[1]
    return tl.sum(tl.reshape(weights, (ROWS, KEYS // SUM_WIDTH, SUM_WIDTH)), 1)


@triton.jit
def end_of_full_tiles(count, SIZE: tl.constexpr, dtype: tl.constexpr):
    """Where the tiles of so many rows that need no mask end.

    In float32 none: its products are unrolled, and a second loop that holds them too would spill registers.
    """
    if dtype == tl.float32:
        return count * 0
    return count - count % SIZE


@triton.jit
def load_keys(
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
def forward_step(
    queries,
    keys,
    values,
    is_key,
    largest,
    total,
    attended,
    scale,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """A tile of keys: its weights, in the dtype of the values; the largest score so far, the sums of weights `[ROWS,
    SUM_WIDTH]` and the weighted sum of values.
    """
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    if BOUNDED:
        weights = tl.exp2(scores * scale - largest[:, None])
        total += sum_columns(weights)
    else:
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction[:, None] + sum_columns(weights)
        attended = attended * correction[:, None]
        largest = new_largest
    weights = weights.to(values.dtype)
    attended = tl.dot(weights, values, attended, input_precision=PRECISION)
    return weights, largest, total, attended


@triton.jit
def attend_to_keys(
    queries,
    key,
    value,
    num_keys,
    largest,
    scale,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """The output `[ROWS, VALUE_DIM]` and the log-sum-exp `[ROWS]` of queries and the keys from two pointers on.

    `largest` is where the largest score starts; with `BOUNDED`, a bound of all scores instead, near enough that no
    weight that counts gets lost.
    """
    total = tl.zeros((ROWS, SUM_WIDTH), tl.float32)
    attended = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    end_full = end_of_full_tiles(num_keys, KEYS, queries.dtype)
    for begin in range(0, end_full, KEYS):
        keys, values, is_key = load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, False
        )
        _, largest, total, attended = forward_step(
            queries, keys, values, is_key, largest, total, attended, scale, PRECISION, False, BOUNDED
        )
    for begin in range(end_full, num_keys, KEYS):
        keys, values, is_key = load_keys(
            key, value, begin, num_keys, num_kv_heads, dim, value_dim, DIM, VALUE_DIM, KEYS, True
        )
        _, largest, total, attended = forward_step(
            queries, keys, values, is_key, largest, total, attended, scale, PRECISION, True, BOUNDED
        )
    all_weights = tl.sum(total, 1)
    return attended / all_weights[:, None], largest + tl.log2(all_weights)


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
