"""The parts of the forward kernels of every branch: queries that attend to keys, tile by tile.

Scores are in base 2 (the scale includes log2(e)), and so is the log-sum-exp. Only the last tile of keys needs a mask,
so it has a loop of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_matrix


# Weights of a tile are summed to this many columns: a thread of the matrix unit's layout holds all columns of one sum.
SUM_WIDTH = tl.constexpr(8)


@triton.jit
def end_of_full_tiles(count, SIZE: tl.constexpr, dtype: tl.constexpr):
    """The end of the tiles that need no mask, among `count` rows in tiles of `SIZE`.

    In float32 it is 0: its products are unrolled, and a second loop that holds them too would spill registers.
    """
    if dtype == tl.float32:
        return count * 0
    return count - count % SIZE


@triton.jit
def softmax_weights(scores, largest, scale, BOUNDED: tl.constexpr):
    """The weights of one tile of keys, with a running maximum or, if `BOUNDED`, with a bound of all scores.

    Args:
        scores: `[ROWS, KEYS]`, products of queries and keys, minus infinity where there is no key.
        largest: `[ROWS]`, the largest score so far, or the bound.
        scale: factor of the scores, times log2(e).

    Returns:
        The weights `[ROWS, KEYS]`, the new largest score, and the factor of all sums so far, which is 1 if
        `BOUNDED`.
    """
    if BOUNDED:
        weights = tl.exp2(scores * scale - largest[:, None])
        correction = 1.0
    else:
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        largest = new_largest
    return weights, largest, correction


@triton.jit
def column_sums(values):
    """Sums over columns of `[ROWS, COLUMNS]`, as parts of them `[ROWS, SUM_WIDTH]`."""
    return tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // SUM_WIDTH, SUM_WIDTH)), 1)


@triton.jit
def divide_rows(matrix, divisors):
    """`[ROWS, COLUMNS]` float32 divided by `[ROWS]`: one division a row, as a division takes ten instructions."""
    return matrix * (1.0 / divisors)[:, None]


@triton.jit
def attend_to_keys(
    queries,
    key,
    value,
    num_keys,
    largest,
    scale,
    heads,
    tile,
    BOUNDED: tl.constexpr,
):
    """The attention of a tile of queries to a run of keys of one key/value head.

    Args:
        queries: `[ROWS, DIM]`.
        key, value: pointers to the first key and value; the next ones are `num_kv_heads` rows apart.
        num_keys: how many there are, at least one.
        largest: `[ROWS]`, minus infinity; if `BOUNDED`, a bound of all scores, so close to the largest ones that no
            weight that counts is rounded to zero.
        scale: factor of the scores, times log2(e).
        heads: `HeadConstants`.
        tile: `TileConstants`.

    Returns:
        The output `[ROWS, VALUE_DIM]` and the log-sum-exp `[ROWS]` in base 2, both float32.
    """
    # [ROWS, SUM_WIDTH]
    total = tl.zeros((tile.ROWS, SUM_WIDTH), tl.float32)
    # [ROWS, VALUE_DIM]
    attended = tl.zeros((tile.ROWS, heads.VALUE_DIM), tl.float32)
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
            scores = tl.dot(queries, tl.trans(keys), input_precision=heads.PRECISION)
            if MASKED:
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            weights, largest, correction = softmax_weights(scores, largest, scale, BOUNDED)
            if not BOUNDED:
                total = total * correction[:, None]
                attended = attended * correction[:, None]
            total += column_sums(weights)
            # [ROWS, VALUE_DIM]
            attended = tl.dot(weights.to(values.dtype), values, attended, input_precision=heads.PRECISION)
    # [ROWS]
    all_weights = tl.sum(total, 1)
    return divide_rows(attended, all_weights), largest + tl.log2(all_weights)
