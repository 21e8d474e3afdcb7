"""Choices sorted into lists, and lists cut into pieces for the programs of selected attention.

Nothing is transferred to the host: tensors whose sizes depend on the lengths of lists are as large as they can get.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .arguments import SortedChoices
from .list_numbers import write_list_numbers
from .list_starts import list_starts


# Pieces of a program.
_SIZE = 256
# Numbers of a piece.
PIECE_WIDTH = tl.constexpr(4)


@triton.jit
def first_piece(starts, list_number, piece_size):
    """The number of the first piece of a list, and the place of its first choice."""
    start = tl.load(starts + list_number)
    return start // piece_size + list_number, start


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _pieces_kernel(
    starts,  # [num_lists + 1] int32, see SortedChoices
    pieces,  # [num_pieces, WIDTH] int32, written
    num_pieces,
    num_lists,
    piece_size,  # choices of a piece at most
    num_steps,  # steps of a search among the lists
    SIZE: tl.constexpr,  # pieces of a program
    WIDTH: tl.constexpr,  # numbers of a piece
):
    """A program writes some pieces; the list of each is found by bisection."""
    # [SIZE]
    piece = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    # The last list whose first piece is not after this one. The first piece of list 0 is piece 0.
    low = tl.zeros((SIZE,), tl.int32)
    high = low + num_lists
    for _ in range(num_steps):
        middle = (low + high) // 2
        first, start = first_piece(starts, middle, piece_size)
        not_after = (low < high) & (first <= piece)
        low = tl.where(not_after, middle + 1, low)
        high = tl.where(not_after, high, middle)
    list_number = low - 1
    first, start = first_piece(starts, list_number, piece_size)
    begin = start + (piece - first) * piece_size
    end = tl.load(starts + list_number + 1)
    valid = piece < num_pieces
    pieces += piece * WIDTH
    tl.store(pieces, tl.where((begin < end) | (piece == first), list_number, num_lists), mask=valid)
    tl.store(pieces + 1, begin, mask=valid)
    tl.store(pieces + 2, tl.minimum(begin + piece_size, end), mask=valid)
    tl.store(pieces + 3, piece - first, mask=valid)


def count_lists(num_queries: int, num_kv_heads: int, num_blocks: int, chunk_size: int) -> int:
    """The number of lists of all chunks."""
    return cdiv(num_queries, chunk_size) * num_kv_heads * num_blocks


def most_pieces(num_choices: int, num_lists: int, piece_size: int) -> int:
    """The number of pieces that lists with `num_choices` choices together have room for, see `cut_lists`."""
    return num_choices // piece_size + num_lists


@on_device_of_first_argument
def sort_choices(blocks: Tensor, num_blocks: int, chunk_size: int) -> SortedChoices:
    """The choices of all queries, sorted into lists.

    Args:
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, block numbers, -1 for none; N is not zero.
        num_blocks: selection blocks of all samples.
        chunk_size: queries of a chunk.
    """
    num_queries, num_kv_heads, _ = blocks.shape
    num_lists = count_lists(num_queries, num_kv_heads, num_blocks, chunk_size)
    # A radix sort of 16 bits takes two passes in place of four.
    narrow = num_lists < 1 << 16
    lowest = torch.iinfo(torch.int16).min if narrow else 0
    lists = blocks.new_empty(blocks.numel(), dtype=torch.int16 if narrow else torch.int32)
    write_list_numbers(blocks, lists, num_blocks, chunk_size, num_lists, lowest)
    lists, choices = lists.sort(stable=True)
    return SortedChoices(list_starts(lists, num_lists, lowest), choices)


@on_device_of_first_argument
def cut_lists(starts: Tensor, num_choices: int, piece_size: int) -> Tensor:
    """Lists cut into pieces of `piece_size` choices and a shorter rest; an empty list has one empty piece.

    The first piece of list l has the number `starts[l] // piece_size + l`, so that no sum over all lists is needed.
    There is room for as many pieces as the lists can have; some of it stays unused.

    Args:
        starts: `[num_lists + 1]` int32, see `SortedChoices`.
        num_choices: places of choices, those without a block included.
        piece_size: choices of a piece.

    Returns:
        `[most_pieces(...), 4]` int32: list (the number of lists if there is no such piece), first choice, choice after
        the last, number of the piece in its list.
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
        num_lists.bit_length(),
        SIZE=_SIZE,
        WIDTH=PIECE_WIDTH.value,
    )
    return pieces
