"""The parts of the backward kernels of every branch: one tile of queries meets one tile of keys.

Scores are computed again. With the log-sum-exp L of a query, its weights are p = exp2(scale * score - L), now divided
by their sum; with its gradient g and the product d of g and its output, the gradient of a score is
p * (g . value - d) * scale. Scores and L are in base 2 (`scale` includes log2(e)); the last factor, the scale of the
scores without log2(e), is left to the kernels, which apply it once to the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_inputs import LOG_SUM_COLUMN, PRODUCT_COLUMN, STATISTICS_WIDTH, negated_terms
from .common import load_matrix
from .tiles import end_of_full_tiles


@triton.jit
def query_gradients_of_keys(queries, gradients, products, log_sums, key, value, num_keys, scale, heads, tile):
    """The gradient of a tile of queries from a run of keys of one key/value head.

    Args:
        queries: `[ROWS, DIM]`.
        gradients: `[ROWS, VALUE_DIM]`, gradients of their outputs.
        products: `[ROWS]`, products of output and gradient.
        log_sums: `[ROWS]`, log-sum-exps of their scores; infinity for rows that do not exist.
        key, value: pointers to the first key and value; the next ones are `num_kv_heads` rows apart.
        num_keys: how many there are.
        scale: factor of the scores, times log2(e).
        heads: `HeadConstants`.
        tile: `TileConstants`.

    Returns:
        `[ROWS, DIM]` float32, before the scale of the scores.
    """
    # [ROWS, DIM]
    grad_queries = tl.zeros((tile.ROWS, heads.DIM), tl.float32)
    end_full = end_of_full_tiles(num_keys, tile.KEYS, queries.dtype)
    for MASKED in tl.static_range(2):
        for begin in range(end_full if MASKED else 0, num_keys if MASKED else end_full, tile.KEYS):
            # [KEYS]
            places = begin + tl.arange(0, tile.KEYS)
            is_key = places < num_keys if MASKED else places >= 0
            # [KEYS, DIM], [KEYS, VALUE_DIM]
            keys = load_matrix(key, places * heads.num_kv_heads, is_key, heads.dim, heads.DIM)
            values = load_matrix(value, places * heads.num_kv_heads, is_key, heads.value_dim, heads.VALUE_DIM)
            # [ROWS, KEYS]
            exponents = tl.dot(queries, tl.trans(keys), input_precision=heads.PRECISION) * scale - log_sums[:, None]
            if MASKED:
                # Keys past the end are zeros, but their weight could overflow.
                exponents = tl.where(is_key[None, :], exponents, float("-inf"))
            weights = tl.exp2(exponents)
            grad_weights = tl.dot(gradients, tl.trans(values), input_precision=heads.PRECISION)
            grad_scores = weights * (grad_weights - products[:, None])
            # [ROWS, DIM]
            grad_queries = tl.dot(grad_scores.to(keys.dtype), keys, grad_queries, input_precision=heads.PRECISION)
    return grad_queries


@triton.jit
def key_gradient_step(
    query, inputs, rows, valid, keys, values, grad_keys, grad_values, scale, heads, KEYS: tl.constexpr
):
    """Adds what a tile of queries contributes to the gradients of a tile of keys and values.

    Args:
        query: `[N, H, D]`.
        inputs: `BackwardInputs`.
        rows: `[ROWS]`, the rows of the tile of queries in `query` as `[N * H, D]`.
        valid: `[ROWS]`, which of them exist. The others count as zeros, their gradient too, so they add nothing.
        keys: `[KEYS, DIM]`.
        values: `[KEYS, VALUE_DIM]`.
        grad_keys: `[KEYS, DIM]` float32, the gradient of the keys so far, before the scale of the scores.
        grad_values: `[KEYS, VALUE_DIM]` float32, the gradient of the values so far.
        scale: factor of the scores, times log2(e).
        heads: `HeadConstants`.
        KEYS: keys of the tile.

    Returns:
        The new `grad_keys` and `grad_values`.
    """
    # [ROWS, DIM], [ROWS, VALUE_DIM]
    queries = load_matrix(query, rows, valid, heads.dim, heads.DIM)
    gradients = load_matrix(inputs.gradient, rows, valid, heads.value_dim, heads.VALUE_DIM)
    # [KEYS, ROWS]
    scores = tl.dot(keys, tl.trans(queries), input_precision=heads.PRECISION)
    grad_weights = tl.dot(values, tl.trans(gradients), input_precision=heads.PRECISION)
    if inputs.statistics is not None:
        # The matrix units subtract log-sum-exp and product. As vectors over the columns, every thread would have to
        # load them element by element.
        # [STATISTICS_WIDTH, ROWS]
        terms = tl.trans(load_matrix(inputs.statistics, rows, valid, STATISTICS_WIDTH, STATISTICS_WIDTH))
        # [KEYS, ROWS]
        scores = tl.dot(negated_terms(LOG_SUM_COLUMN, KEYS, keys.dtype), terms, scores)
        grad_weights = tl.dot(negated_terms(PRODUCT_COLUMN, KEYS, keys.dtype), terms, grad_weights)
        weights = tl.exp2(scores * scale)
        grad_scores = weights * grad_weights
    else:
        # [ROWS]
        log_sums = tl.load(inputs.log_sum + rows, mask=valid, other=float("inf"))
        products = tl.load(inputs.product + rows, mask=valid, other=0.0)
        # [KEYS, ROWS]
        weights = tl.exp2(scores * scale - log_sums[None, :])
        grad_scores = weights * (grad_weights - products[None, :])
    # [KEYS, VALUE_DIM], [KEYS, DIM]
    grad_values = tl.dot(weights.to(gradients.dtype), gradients, grad_values, input_precision=heads.PRECISION)
    grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys, input_precision=heads.PRECISION)
    return grad_keys, grad_values
