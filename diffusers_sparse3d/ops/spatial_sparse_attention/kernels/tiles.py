"""What a program does with a tile of queries and a run of keys, in every kind of attention of this folder.

Scores are kept in base 2 (scale times log2(e)), and so is the log-sum-exp. Masks are needed in the last tile of a run
only, so it has a loop of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
