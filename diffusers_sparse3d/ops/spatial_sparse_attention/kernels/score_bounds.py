"""Bounds of all scores of an attention, by the norms of queries and keys.

Softmax does not depend on what is subtracted from all scores of a query, as long as no weight that counts gets lost.
With a bound at hand, its kernels need not look for the largest score: about a third of their instructions go.

Whether the bounds are near enough is known on the GPU alone. So there are two kernels, one of which ends at once.

Floor: queries and keys are read once (0.29 GB at 131,072 tokens of 32 heads of 32 channels in bfloat16: 0.07 ms).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import HeadShape, ScoreBounds
from .common import load_matrix, query_rows


# Scores in base 2 stay within so much of zero: weights are 2^-100 at least, which float32 and bfloat16 have.
_LARGEST_BOUND = tl.constexpr(50.0)
# Compressed keys of a sample from which on it pays to bound the scores.
_MANY_KEYS = 1024
# Tokens of a program that looks for the largest norm, and its rows of them at once.
_TOKENS = 64
_ROWS = 128


@triton.jit
def _largest_norm(
    tensor,
    num_tokens,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Of a program's tokens and key/value head."""
    first = tl.program_id(0) * TOKENS
    end = tl.minimum(first + TOKENS, num_tokens)
    largest = tl.zeros((ROWS,), tl.float32)
    for begin in range(first, end, ROWS // GROUP):
        rows, valid = query_rows(None, begin, end, tl.program_id(1), num_kv_heads, group_size, GROUP, ROWS)
        vectors = load_matrix(tensor, rows, valid, dim, DIM).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(vectors * vectors, 1))
    return tl.sqrt(tl.max(largest, 0))


@Kernel
@triton.jit
def _largest_norms_kernel(
    query,
    key,
    compressed_key,
    largest,
    num_tokens,
    num_compressed,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    number = tl.program_id(2)
    if number == 0:
        norm = _largest_norm(query, num_tokens, num_kv_heads, group_size, dim, GROUP, DIM, ROWS, TOKENS)
    elif number == 1:
        norm = _largest_norm(key, num_tokens, num_kv_heads, 1, dim, 1, DIM, ROWS, TOKENS)
    else:
        norm = _largest_norm(compressed_key, num_compressed, num_kv_heads, 1, dim, 1, DIM, ROWS, TOKENS)
    # The largest is the same in any order.
    tl.atomic_max(largest + number * num_kv_heads + tl.program_id(1), norm, sem="relaxed")


NO_BOUNDS = ScoreBounds(None, None)


@on_device_of_first_argument
def score_bounds(query: Tensor, key: Tensor, compressed_key: Tensor) -> tuple[ScoreBounds, ScoreBounds]:
    """Of the attention to compressed keys, and to keys.

    Args:
        query: `[N, H, D]`, contiguous, N not zero.
        key: `[N, H_kv, D]`, contiguous.
        compressed_key: `[M, H_kv, D]`, contiguous.
    """
    heads = HeadShape.of(query, key, key)
    sizes = heads.arguments(query.dtype)
    num_tokens, num_compressed = query.shape[0], compressed_key.shape[0]
    largest = torch.zeros(3, heads.num_kv_heads, dtype=torch.float32, device=query.device)
    _largest_norms_kernel[cdiv(max(num_tokens, num_compressed), _TOKENS), heads.num_kv_heads, 3](
        query,
        key,
        compressed_key,
        largest,
        num_tokens,
        num_compressed,
        **{name: sizes[name] for name in ("num_kv_heads", "group_size", "dim", "GROUP", "DIM")},
        ROWS=max(_ROWS, heads.group),
        TOKENS=_TOKENS,
    )
    largest_query, largest_key, largest_compressed = largest.unbind()
    return ScoreBounds(largest_query, largest_compressed), ScoreBounds(largest_query, largest_key)


def bounds_of_branches(
    query: Tensor, key: Tensor, compressed_key: Tensor, most_keys: int
) -> tuple[ScoreBounds, ScoreBounds]:
    """Of the compressed attention and of the selection, or nothing where that would not pay.

    Args:
        query, key, compressed_key: as in `score_bounds`.
        most_keys: compressed keys of a sample, at most. With few, the norms would take longer than they save.
    """
    # In float16 weights far below one would be lost; in float32 the kernels would spill registers.
    if query.dtype != torch.bfloat16 or most_keys < _MANY_KEYS:
        return NO_BOUNDS, NO_BOUNDS
    return score_bounds(query, key, compressed_key)


def ways(bounds: ScoreBounds) -> tuple[bool, ...]:
    """Which of the two kernels, with bounds or without, have to be launched."""
    return (False,) if bounds.largest_key is None else (True, False)


@triton.jit
def takes_part(largest_query, largest_key, scale, num_kv_heads: tl.constexpr, BOUNDED: tl.constexpr):
    """Whether the kernel is the one of the two that has the work."""
    mine = True
    if largest_key is not None:
        largest = 0.0
        for kv_head in tl.static_range(num_kv_heads):
            largest = tl.maximum(largest, tl.load(largest_query + kv_head) * tl.load(largest_key + kv_head))
        mine = (largest * scale < _LARGEST_BOUND) == BOUNDED
    return mine


@triton.jit
def largest_scores(queries, largest_key, kv_head, scale, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """Bounds of the scores of queries `[ROWS, *]`, or minus infinity, from where one looks for the largest."""
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    if BOUNDED:
        norms = tl.sqrt(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1))
        largest = norms * (tl.load(largest_key + kv_head) * scale)
    return largest
