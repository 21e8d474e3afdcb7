"""Which queries chose each block, as lists cut into pieces for the programs of the selection's kernels.

A choice is a query's block for one key/value head; choices are numbered as in `blocks.flatten()`. Nothing is
transferred to the host: what depends on the lengths of the lists has an upper bound as its size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import SortedChoices


# Items of a program of the kernels here.
_SIZE = 256
# Numbers of a piece.
PIECE_WIDTH = tl.constexpr(4)


@Kernel
@triton.jit
def _segments_kernel(
    blocks,
    segments,
    num_choices,
    num_blocks,
    k,
    chunk_choices,
    num_lists,
    lowest,
    num_kv_heads: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The segment of each choice, counted from `lowest` on; after the last segment for a choice that is none."""
    choice = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = choice < num_choices
    block = tl.load(blocks + choice, mask=valid, other=-1).to(tl.int32)
    kv_head = choice // k % num_kv_heads
    segment = (choice // chunk_choices * num_kv_heads + kv_head) * num_blocks + block
    tl.store(segments + choice, lowest + tl.where(block >= 0, segment, num_lists), mask=valid)


@Kernel
@triton.jit
def _starts_kernel(segments, starts, num_choices, num_lists, lowest, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Where the list of each segment starts: at the first choice of one that is not below it."""
    segment = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low = tl.zeros((SIZE,), tl.int32)
    high = low + num_choices
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(segments + middle, mask=low < high, other=0) < segment + lowest)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(starts + segment, low, mask=segment <= num_lists)


@triton.jit
def first_piece(starts, segment, piece_size):
    """The number of the first piece of a segment, and the first choice of its list."""
    start = tl.load(starts + segment)
    return start // piece_size + segment, start


@Kernel
@triton.jit
def _pieces_kernel(
    starts, pieces, num_pieces, num_lists, piece_size, SIZE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr
):
    piece = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    # The last segment whose first piece is not after this one. That of segment zero is piece zero.
    low = tl.zeros((SIZE,), tl.int32)
    high = low + num_lists
    for _ in range(STEPS):
        middle = (low + high) // 2
        first, _ = first_piece(starts, middle, piece_size)
        not_after = (low < high) & (first <= piece)
        low = tl.where(not_after, middle + 1, low)
        high = tl.where(not_after, high, middle)
    segment = low - 1
    first, start = first_piece(starts, segment, piece_size)
    begin = start + (piece - first) * piece_size
    end = tl.load(starts + segment + 1)
    valid = piece < num_pieces
    pieces += piece * WIDTH
    tl.store(pieces, tl.where((begin < end) | (piece == first), segment, num_lists), mask=valid)
    tl.store(pieces + 1, begin, mask=valid)
    tl.store(pieces + 2, tl.minimum(begin + piece_size, end), mask=valid)
    tl.store(pieces + 3, piece - first, mask=valid)


def count_lists(num_queries: int, num_kv_heads: int, num_blocks: int, chunk_size: int) -> int:
    """Of all chunks."""
    return cdiv(num_queries, chunk_size) * num_kv_heads * num_blocks


@on_device_of_first_argument
def sort_choices(blocks: Tensor, num_blocks: int, chunk_size: int) -> SortedChoices:
    """
    Args:
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, -1 for none; N is not zero.
        num_blocks: of the partition.
        chunk_size: queries of a chunk.
    """
    num_queries, num_kv_heads, k = blocks.shape
    num_choices, num_lists = blocks.numel(), count_lists(num_queries, num_kv_heads, num_blocks, chunk_size)
    # Two passes of a radix sort in place of four.
    narrow = num_lists < 1 << 16
    lowest = torch.iinfo(torch.int16).min if narrow else 0
    segments = blocks.new_empty(num_choices, dtype=torch.int16 if narrow else torch.int32)
    _segments_kernel[(cdiv(num_choices, _SIZE),)](
        blocks,
        segments,
        num_choices,
        num_blocks,
        k,
        chunk_size * num_kv_heads * k,
        num_lists,
        lowest,
        num_kv_heads=num_kv_heads,
        SIZE=_SIZE,
    )
    segments, choices = segments.sort(stable=True)
    starts = blocks.new_empty(num_lists + 1, dtype=torch.int32)
    _starts_kernel[(cdiv(num_lists + 1, _SIZE),)](
        segments, starts, num_choices, num_lists, lowest, SIZE=_SIZE, STEPS=num_choices.bit_length()
    )
    return SortedChoices(starts, choices)


@on_device_of_first_argument
def cut_lists(starts: Tensor, num_choices: int, piece_size: int) -> Tensor:
    """Cuts lists into pieces of `piece_size` choices and the rest; of an empty list there is one empty piece.

    The first piece of segment s is piece number `starts[s] // piece_size + s`. So there are places for as many as the
    lists can have, some of which stay empty, but it takes no sum over all lists.

    Args:
        starts: `[num_lists + 1]` int32, as of `SortedChoices`.
        num_choices: how many there are, those of no block included.
        piece_size: choices of a piece.

    Returns:
        `[most_pieces(...), 4]` int32: segment (or the number of segments where there is no such piece), start, end,
        number of the piece in its segment.
    """
    num_lists = starts.shape[0] - 1
    num_pieces = most_pieces(num_choices, num_lists, piece_size)
    pieces = starts.new_empty(num_pieces, PIECE_WIDTH.value)
    _pieces_kernel[(cdiv(num_pieces, _SIZE),)](
        starts,
        pieces,
        num_pieces,
        num_lists,
        piece_size,
        SIZE=_SIZE,
        STEPS=num_lists.bit_length(),
        WIDTH=PIECE_WIDTH.value,
    )
    return pieces


def most_pieces(num_choices: int, num_lists: int, piece_size: int) -> int:
    """How many numbers of pieces lists of so many choices together take at most."""
    return num_choices // piece_size + num_lists
