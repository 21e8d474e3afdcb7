"""Upper bounds of all scores of an attention, from the largest norms of queries and keys.

Softmax does not depend on the number that is subtracted from all scores of a query, as long as no weight that counts
is rounded to zero. With a bound at hand a kernel need not look for the largest score, which saves a third of its
instructions. Whether the bounds are close enough is known on the GPU alone, so both variants of a kernel are
launched, and one of them returns at once.

Floor: queries and keys are read once (0.29 GB at 131,072 tokens of 32 heads of 32 channels in bfloat16: 0.07 ms).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .arguments import HeadShape, ScoreBounds
from .common import head_rows, load_matrix


# Bounds up to this value are used. Scores in base 2 are then within 50 of zero, so weights are at least 2^-100, which
# float32 and bfloat16 represent.
_LARGEST_BOUND = tl.constexpr(50.0)
# Samples with at least this many compressed keys save more time by bounds than the norms take.
_MANY_KEYS = 1024
# Tokens of a program of the norms, and the rows of them that it loads at once.
_TOKENS = 64
_ROWS = 128

NO_BOUNDS = ScoreBounds(None, None)


@triton.jit
def _largest_norm(tensor, num_tokens, heads, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """The largest norm of the vectors `[num_tokens, H, D]` that belong to a program's tokens and key/value head."""
    first = tl.program_id(0) * TOKENS
    end = tl.minimum(first + TOKENS, num_tokens)
    # [ROWS]
    largest = tl.zeros((ROWS,), tl.float32)
    for begin in range(first, end, ROWS // heads.GROUP):
        rows, valid = head_rows(None, begin, end, tl.program_id(1), heads, ROWS)
        # [ROWS, DIM]
        vectors = load_matrix(tensor, rows, valid, heads.dim, heads.DIM).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(vectors * vectors, 1))
    return tl.sqrt(tl.max(largest, 0))


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _largest_norms_kernel(
    query,  # [N, H, D]
    key,  # [N, H_kv, D]
    compressed_key,  # [M, H_kv, D]
    largest,  # [3, H_kv] float32, zeros; gets the largest norms of the three
    num_tokens,  # N
    num_compressed,  # M
    heads,  # HeadConstants of the query
    key_heads,  # HeadConstants of the keys, whose group is one head
    ROWS: tl.constexpr,  # rows that a program loads at once
    TOKENS: tl.constexpr,  # tokens of a program
):
    """A program takes the largest norm of some tokens, one key/value head and one of the three tensors."""
    number = tl.program_id(2)
    if number == 0:
        norm = _largest_norm(query, num_tokens, heads, ROWS, TOKENS)
    elif number == 1:
        norm = _largest_norm(key, num_tokens, key_heads, ROWS, TOKENS)
    else:
        norm = _largest_norm(compressed_key, num_compressed, key_heads, ROWS, TOKENS)
    # The largest of several numbers is the same in any order: results stay reproducible.
    tl.atomic_max(largest + number * heads.num_kv_heads + tl.program_id(1), norm, sem="relaxed")


@on_device_of_first_argument
def score_bounds(query: Tensor, key: Tensor, compressed_key: Tensor) -> tuple[ScoreBounds, ScoreBounds]:
    """The bounds of the attention to the compressed keys, and of that to the keys.

    Args:
        query: `[N, H, D]`, contiguous, N not zero.
        key: `[N, H_kv, D]`, contiguous.
        compressed_key: `[M, H_kv, D]`, contiguous.
    """
    heads = HeadShape.of(query, key, key)
    num_tokens, num_compressed = query.shape[0], compressed_key.shape[0]
    largest = torch.zeros(3, heads.num_kv_heads, dtype=torch.float32, device=query.device)
    _largest_norms_kernel[cdiv(max(num_tokens, num_compressed), _TOKENS), heads.num_kv_heads, 3](
        query,
        key,
        compressed_key,
        largest,
        num_tokens,
        num_compressed,
        heads.constants(query.dtype),
        heads._replace(group_size=1).constants(query.dtype),
        ROWS=max(_ROWS, heads.group),
        TOKENS=_TOKENS,
    )
    largest_query, largest_key, largest_compressed = largest.unbind()
    return ScoreBounds(largest_query, largest_compressed), ScoreBounds(largest_query, largest_key)


def bounds_of_branches(
    query: Tensor, key: Tensor, compressed_key: Tensor, most_keys: int
) -> tuple[ScoreBounds, ScoreBounds]:
    """The bounds of compressed and of selected attention, or no bounds where they would not pay.

    Args:
        query, key, compressed_key: as in `score_bounds`.
        most_keys: compressed keys of the largest sample. With few, the norms take longer than they save.
    """
    # In float16, weights far below one would be rounded to zero; in float32 the kernels would spill registers.
    if query.dtype != torch.bfloat16 or most_keys < _MANY_KEYS:
        return NO_BOUNDS, NO_BOUNDS
    return score_bounds(query, key, compressed_key)


def variants(bounds: ScoreBounds) -> tuple[bool, ...]:
    """The values of `BOUNDED` of the variants of a kernel that must be launched."""
    return (False,) if bounds.largest_key is None else (True, False)


@triton.jit
def has_work(bounds, scale, num_kv_heads: tl.constexpr, BOUNDED: tl.constexpr):
    """Whether this variant of a kernel is the one that computes: the bounds decide, and without bounds all do."""
    decided = True
    if bounds.largest_key is not None:
        largest = 0.0
        for kv_head in tl.static_range(num_kv_heads):
            norms = tl.load(bounds.largest_query + kv_head) * tl.load(bounds.largest_key + kv_head)
            largest = tl.maximum(largest, norms)
        decided = (largest * scale < _LARGEST_BOUND) == BOUNDED
    return decided


@triton.jit
def largest_scores(bounds, kv_head, scale, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """`[ROWS]`: a bound of all scores of the key/value head if `BOUNDED`, else minus infinity, the first maximum."""
    largest = float("-inf")
    if BOUNDED:
        largest = tl.load(bounds.largest_query + kv_head) * tl.load(bounds.largest_key + kv_head) * scale
    return tl.full((ROWS,), 0.0, tl.float32) + largest
