"""Which queries chose each block, as lists cut into pieces for the programs of the selection's kernels.

A choice is a query's block for one key/value head; choices are numbered as in `blocks.flatten()`. Nothing is
transferred to the host: what depends on the lengths of the lists has an upper bound as its size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_dispatch import cdiv, on_device_of_first_argument


# Items of a program of the kernels here.
_SIZE = 256
# Numbers of a piece.
PIECE_WIDTH = tl.constexpr(4)


@triton.jit
def _segments_kernel(
    blocks,
    segments,
    num_choices,
    num_blocks,
    k,
    chunk_choices,
    num_segments,
    num_kv_heads: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The segment of each choice; the number of segments for a choice that is none."""
    choice = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = choice < num_choices
    block = tl.load(blocks + choice, mask=valid, other=-1).to(tl.int32)
    kv_head = choice // k % num_kv_heads
    segment = (choice // chunk_choices * num_kv_heads + kv_head) * num_blocks + block
    tl.store(segments + choice, tl.where(block >= 0, segment, num_segments), mask=valid)


@triton.jit
def _first_not_below(ascending, count, targets, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """For each target, the first of `count` ascending numbers that is not below it; `count` if there is none."""
    low = tl.zeros((SIZE,), tl.int32)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(ascending + middle, mask=low < high, other=0) < targets)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _starts_kernel(
    segments, starts, counts, num_choices, num_segments, piece, least, SIZE: tl.constexpr, STEPS: tl.constexpr
):
    """Where the list of each segment starts, and of how many pieces it is."""
    segment = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    start = _first_not_below(segments, num_choices, segment, SIZE, STEPS)
    end = _first_not_below(segments, num_choices, segment + 1, SIZE, STEPS)
    tl.store(starts + segment, start, mask=segment <= num_segments)
    count = tl.maximum((end - start + piece - 1) // piece, least)
    tl.store(counts + segment, count, mask=segment < num_segments)


@triton.jit
def _pieces_kernel(
    last_pieces,
    starts,
    pieces,
    num_pieces,
    num_segments,
    piece_size,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    piece = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = piece < num_pieces
    segment = _first_not_below(last_pieces, num_segments, piece + 1, SIZE, STEPS)
    exists = valid & (segment < num_segments)
    before = tl.load(last_pieces + segment - 1, mask=exists & (segment > 0), other=0)
    first = tl.load(starts + segment, mask=exists, other=0) + (piece - before) * piece_size
    last = tl.minimum(first + piece_size, tl.load(starts + segment + 1, mask=exists, other=0))
    pieces += piece * WIDTH
    tl.store(pieces, segment, mask=valid)
    tl.store(pieces + 1, first, mask=valid)
    tl.store(pieces + 2, last, mask=valid)
    tl.store(pieces + 3, piece - before, mask=valid)


class SortedChoices(NamedTuple):
    """Choices sorted by block.

    Segment s is chunk s // (H_kv * num_blocks) of the queries, key/value head s // num_blocks % H_kv and block
    s % num_blocks.

    Attributes:
        segments: `[N * H_kv * k]` int32, ascending, the number of segments for choices of no block.
        choices: `[N * H_kv * k]` int64, ascending in each segment.
        num_segments: of all chunks.
    """

    segments: Tensor
    choices: Tensor
    num_segments: int


@on_device_of_first_argument
def sort_choices(blocks: Tensor, num_blocks: int, chunk_size: int) -> SortedChoices:
    """
    Args:
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, -1 for none; N is not zero.
        num_blocks: of the partition.
        chunk_size: queries of a chunk.
    """
    num_queries, num_kv_heads, k = blocks.shape
    num_segments = cdiv(num_queries, chunk_size) * num_kv_heads * num_blocks
    segments = torch.empty(blocks.numel(), dtype=torch.int32, device=blocks.device)
    _segments_kernel[(cdiv(len(segments), _SIZE),)](
        blocks,
        segments,
        len(segments),
        num_blocks,
        k,
        chunk_size * num_kv_heads * k,
        num_segments,
        num_kv_heads=num_kv_heads,
        SIZE=_SIZE,
    )
    return SortedChoices(*segments.sort(stable=True), num_segments)


@on_device_of_first_argument
def cut_lists(segments: Tensor, num_segments: int, piece_size: int, least: int) -> tuple[Tensor, Tensor]:
    """
    Args:
        segments: `[*]` int32, ascending, less than the number of segments where there is one.
        num_segments: how many there may be.
        piece_size: length of a piece of a list, which is a run of one segment.
        least: pieces of a list, at least: 1 for an empty piece of an empty list, else 0.

    Returns:
        How many pieces there are up to each segment, itself included, `[num_segments]` int32; the pieces,
        `[most_pieces(...), 4]` int32: segment (or the number of segments where there is no such piece), start, end,
        number of the piece in its segment.
    """
    starts, counts = segments.new_empty(num_segments + 1), segments.new_empty(num_segments)
    _starts_kernel[(cdiv(num_segments + 1, _SIZE),)](
        segments,
        starts,
        counts,
        len(segments),
        num_segments,
        piece_size,
        least,
        SIZE=_SIZE,
        STEPS=len(segments).bit_length(),
    )
    last_pieces = counts.cumsum(0, dtype=torch.int32)
    pieces = segments.new_empty(most_pieces(len(segments), num_segments, piece_size, least), PIECE_WIDTH.value)
    _pieces_kernel[(cdiv(len(pieces), _SIZE),)](
        last_pieces,
        starts,
        pieces,
        len(pieces),
        num_segments,
        piece_size,
        SIZE=_SIZE,
        STEPS=num_segments.bit_length(),
        WIDTH=PIECE_WIDTH,
    )
    return last_pieces, pieces


def most_pieces(num_choices: int, num_segments: int, piece_size: int, least: int) -> int:
    """How many pieces lists of so many choices together have at most."""
    return num_choices // piece_size + (num_segments if least else min(num_segments, num_choices))
