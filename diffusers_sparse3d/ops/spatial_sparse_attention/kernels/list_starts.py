"""The place where each list starts among the sorted choices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv
from ...runtime.launch import NUMBERS, Kernel


# Lists of a program.
_SIZE = 256


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _list_starts_kernel(
    lists,  # [num_choices] int16 or int32, the list number of each choice, ascending
    starts,  # [num_lists + 1] int32, written
    num_choices,
    num_lists,
    lowest,  # the number of the first list
    num_steps,  # steps of a search among the choices
    SIZE: tl.constexpr,  # lists of a program
):
    """A program searches the first choice whose list number is not below that of each of its lists, by bisection."""
    # [SIZE]
    number = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low = tl.zeros((SIZE,), tl.int32)
    high = low + num_choices
    for _ in range(num_steps):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(lists + middle, mask=low < high, other=0) < number + lowest)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(starts + number, low, mask=number <= num_lists)


def list_starts(lists: Tensor, num_lists: int, lowest: int) -> Tensor:
    """`[num_lists + 1]` int32: where each list starts, and where the last one ends.

    Args:
        lists: `[num_choices]` int16 or int32, the list number of each choice, ascending.
        num_lists: lists of all chunks.
        lowest: the number of the first list.
    """
    starts = lists.new_empty(num_lists + 1, dtype=torch.int32)
    _list_starts_kernel[(cdiv(num_lists + 1, _SIZE),)](
        lists, starts, len(lists), num_lists, lowest, len(lists).bit_length(), SIZE=_SIZE
    )
    return starts
