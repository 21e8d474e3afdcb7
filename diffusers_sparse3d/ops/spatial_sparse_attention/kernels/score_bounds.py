"""Bounds of all scores of an attention, by the norms of queries and keys.

Softmax does not depend on what is subtracted from all scores of a query, as long as no weight that counts gets lost.
With a bound at hand, its kernels need not look for the largest score: about a third of their instructions go.

Whether the bounds are near enough is known on the GPU alone. So there are two kernels, one of which ends at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E


# Scores in base 2 stay within so much of zero: weights are 2^-100 at least, which float32 and bfloat16 have.
_LARGEST_BOUND = 50.0
# Compressed keys of a sample from which on it pays to bound the scores.
_MANY_KEYS = 1024


class ScoreBounds(NamedTuple):
    """What bounds the scores of an attention; both None if nothing is known.

    Attributes:
        largest_key: `[H_kv]` float32, the largest norm of a key.
        bounded: `[]` bool, whether all scores are small enough.
    """

    largest_key: Tensor | None
    bounded: Tensor | None


NO_BOUNDS = ScoreBounds(None, None)


def largest_norms(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """The largest norm of a row for each key/value head: `[N, H, D]`, H a multiple of H_kv -> `[H_kv]` float32."""
    norms = torch.linalg.vector_norm(tensor, dim=2, dtype=torch.float32)
    return norms.amax(0).view(num_kv_heads, -1).amax(1)


def score_bounds(largest_query: Tensor, key: Tensor, scale: float) -> ScoreBounds:
    """
    Args:
        largest_query: `[H_kv]` float32, by `largest_norms`.
        key: `[M, H_kv, D]`, M not zero.
        scale: factor of the scores.
    """
    largest_key = largest_norms(key, key.shape[1])
    return ScoreBounds(largest_key, (largest_query * largest_key).amax() * (scale * LOG2_E) < _LARGEST_BOUND)


def bounds_of_branches(
    query: Tensor, key: Tensor, compressed_key: Tensor, most_keys: int, scale: float
) -> tuple[ScoreBounds, ScoreBounds]:
    """Of the compressed attention and of the selection, or nothing where that would not pay.

    Args:
        query: `[N, H, D]`.
        key: `[N, H_kv, D]`.
        compressed_key: `[M, H_kv, D]`.
        most_keys: compressed keys of a sample, at most. With few, the norms would take longer than they save.
        scale: factor of the scores.
    """
    # In float16 weights far below one would be lost; in float32 the kernels would spill registers.
    if query.dtype != torch.bfloat16 or most_keys < _MANY_KEYS:
        return NO_BOUNDS, NO_BOUNDS
    largest_query = largest_norms(query, key.shape[1])
    return score_bounds(largest_query, compressed_key, scale), score_bounds(largest_query, key, scale)


def ways(bounds: ScoreBounds) -> tuple[bool, ...]:
    """Which of the two kernels, with bounds or without, have to be launched."""
    return (False,) if bounds.bounded is None else (True, False)


@triton.jit
def takes_part(bounded, BOUNDED: tl.constexpr):
    """Whether the kernel is the one of the two that has the work."""
    mine = True
    if bounded is not None:
        mine = (tl.load(bounded) != 0) == BOUNDED
    return mine


@triton.jit
def largest_scores(queries, largest_key, kv_head, scale, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """Bounds of the scores of queries `[ROWS, *]`, or minus infinity, from where one looks for the largest."""
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    if BOUNDED:
        norms = tl.sqrt(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1))
        largest = norms * (tl.load(largest_key + kv_head) * scale)
    return largest
