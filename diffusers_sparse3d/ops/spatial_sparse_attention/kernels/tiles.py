"""The parts of the forward kernels of every branch: queries that attend to keys, tile by tile.

Scores are in base 2 (the scale includes log2(e)), and so is the log-sum-exp. Only the last tile of keys needs a mask,
so it has a loop of its own.
"""

from __future__ import annotations

import struct

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


# A cubic whose relative difference from 2^f, for f in [-1/2, 1/2], is at most 7.5e-5, highest power first.
CUBIC = (0.05517167, 0.24261114, 0.69326099, 0.99992807)
# Added to a number below 2^22, it leaves the nearest integer in the lowest bits.
_ROUNDING = 1.5 * 2**23
# The cubic takes numbers below it, minus infinity among them, as this one: 2^-125 is nothing beside any other weight.
_SMALLEST = -125.0


def _exp2_assembly() -> str:
    """PTX for powers of two of four numbers, three by the exponential unit, one by `CUBIC`."""
    cubic, square, slope, constant, rounding, smallest = (
        "0f" + struct.pack(">f", number).hex().upper() for number in (*CUBIC, _ROUNDING, _SMALLEST)
    )
    return f"""{{
        .reg .f32 number, shifted, fraction, power;
        .reg .b32 exponent, bits;
        ex2.approx.ftz.f32 $0, $4;
        ex2.approx.ftz.f32 $1, $5;
        ex2.approx.ftz.f32 $2, $6;
        max.f32 number, $7, {smallest};
        add.rn.f32 shifted, number, {rounding};
        sub.rn.f32 fraction, shifted, {rounding};
        sub.rn.f32 fraction, number, fraction;
        fma.rn.f32 power, fraction, {cubic}, {square};
        fma.rn.f32 power, power, fraction, {slope};
        fma.rn.f32 power, power, fraction, {constant};
        mov.b32 exponent, shifted;
        mov.b32 bits, power;
        shl.b32 exponent, exponent, 23;
        add.s32 bits, bits, exponent;
        mov.b32 $3, bits;
    }}"""


_EXP2_ASSEMBLY = tl.constexpr(_exp2_assembly())


@triton.jit
def exp2(numbers, POLYNOMIAL: tl.constexpr):
    """Powers of two of numbers up to 0; with `POLYNOMIAL`, some of them by a cubic, which is 2^-125 at least.

    The exponential unit is the busiest one in loops without a running maximum. A quarter of the numbers go past it.
    """
    if POLYNOMIAL:
        powers = tl.inline_asm_elementwise(
            _EXP2_ASSEMBLY, "=f,=f,=f,=f,f,f,f,f", [numbers], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        powers = tl.exp2(numbers)
    return powers


@triton.jit
def softmax_weights(scores, largest, scale, BOUNDED: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """The weights of one tile of keys, with a running maximum or, if `BOUNDED`, with a bound of all scores.

    Args:
        scores: `[ROWS, KEYS]`, products of queries and keys, minus infinity where there is no key.
        largest: `[ROWS]`, the largest score so far, or the bound.
        scale: factor of the scores, times log2(e).
        POLYNOMIAL: as in `exp2`; only if `BOUNDED`.

    Returns:
        The weights `[ROWS, KEYS]`, the new largest score, and the factor of all sums so far, which is 1 if
        `BOUNDED`.
    """
    if BOUNDED:
        weights = exp2(scores * scale - largest[:, None], POLYNOMIAL)
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
    POLYNOMIAL: tl.constexpr,
):
    """The attention of a tile of queries to a run of keys of one key/value head.

    Args:
        queries: `[ROWS, DIM]`.
        key, value: pointers to the first key and value; the next ones are `num_kv_heads` rows apart.
        num_keys: how many there are, at least one.
        largest: `[ROWS]`, minus infinity; if `BOUNDED`, a bound of all scores of each query, so close to the largest
            one that no weight that counts is rounded to zero.
        scale: factor of the scores, times log2(e).
        heads: `HeadConstants`.
        tile: `TileConstants`.
        POLYNOMIAL: as in `exp2`; only if `BOUNDED`.

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
            weights, largest, correction = softmax_weights(scores, largest, scale, BOUNDED, POLYNOMIAL)
            if not BOUNDED:
                total = total * correction[:, None]
                attended = attended * correction[:, None]
            total += column_sums(weights)
            # [ROWS, VALUE_DIM]
            attended = tl.dot(weights.to(values.dtype), values, attended, input_precision=heads.PRECISION)
    # [ROWS]
    all_weights = tl.sum(total, 1)
    return attended / all_weights[:, None], largest + tl.log2(all_weights)
