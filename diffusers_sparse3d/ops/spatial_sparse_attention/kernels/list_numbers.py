"""The number of the list that each choice belongs to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv
from ...runtime.launch import NUMBERS, Kernel


# Choices of a program.
_SIZE = 256


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _list_numbers_kernel(
    blocks,  # [N * H_kv * k] int32 or int64, the block of each choice, -1 for none
    lists,  # [N * H_kv * k] int16 or int32, written
    num_choices,  # N * H_kv * k
    num_blocks,  # selection blocks of all samples
    k,  # choices of a query and key/value head
    chunk_choices,  # choices of a chunk
    num_lists,  # lists of all chunks
    lowest,  # the number of the first list
    num_kv_heads: tl.constexpr,  # H_kv
    SIZE: tl.constexpr,  # choices of a program
):
    """A program writes the list numbers of some choices; places without a block get the number after the last list."""
    # [SIZE]
    choice = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = choice < num_choices
    block = tl.load(blocks + choice, mask=valid, other=-1).to(tl.int32)
    kv_head = choice // k % num_kv_heads
    number = (choice // chunk_choices * num_kv_heads + kv_head) * num_blocks + block
    tl.store(lists + choice, lowest + tl.where(block >= 0, number, num_lists), mask=valid)


def write_list_numbers(
    blocks: Tensor, lists: Tensor, num_blocks: int, chunk_size: int, num_lists: int, lowest: int
) -> None:
    """The number of the list of each choice, see `SortedChoices`.

    Args:
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, -1 for none.
        lists: `[N * H_kv * k]` int16 or int32, written.
        num_blocks: selection blocks of all samples.
        chunk_size: queries of a chunk.
        num_lists: lists of all chunks.
        lowest: the number of the first list.
    """
    _, num_kv_heads, k = blocks.shape
    num_choices = blocks.numel()
    _list_numbers_kernel[(cdiv(num_choices, _SIZE),)](
        blocks,
        lists,
        num_choices,
        num_blocks,
        k,
        chunk_size * num_kv_heads * k,
        num_lists,
        lowest,
        num_kv_heads=num_kv_heads,
        SIZE=_SIZE,
    )
