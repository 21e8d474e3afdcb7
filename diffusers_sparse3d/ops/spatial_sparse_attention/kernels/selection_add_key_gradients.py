"""Backward pass of selected attention, last step: the gradients of keys and values from all pieces of a long list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.launch import NUMBERS, Kernel
from .arguments import HeadShape, KeyGradients, SortedChoices
from .common import load_matrix, store_matrix
from .selection_plan import SelectionPlan


@triton.jit
def _add_parts(
    gradient, part, first_part, end_part, part_rows, rows, inside, is_key, dim: tl.constexpr, DIM: tl.constexpr
):
    """Adds parts to the gradient of a tile of keys or values, in the order of the list, so that sums are reproducible.

    Args:
        gradient: `[N * H_kv, dim]` float32.
        part: `[parts, part_rows, dim]` float32.
        first_part, end_part: the parts that are added.
        part_rows: keys of a part.
        rows: `[KEYS]`, the rows of the tile in `gradient`.
        inside: `[KEYS]`, its rows in a part.
        is_key: `[KEYS]`, which of them exist.
        dim: channels; `DIM`: padded to a power of two.
    """
    # [KEYS, DIM]
    total = load_matrix(gradient, rows, is_key, dim, DIM)
    part += first_part.to(tl.int64) * part_rows * dim
    for _ in range(first_part, end_part):
        # [KEYS, DIM]
        total += load_matrix(part, inside, is_key, dim, DIM)
        part += part_rows * dim
    store_matrix(gradient, rows, is_key, total, dim, DIM)


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _add_parts_kernel(
    gradients,  # KeyGradients [N, H_kv, *] float32, added to
    parts,  # KeyGradients [parts, part_rows, *] float32
    starts,  # [num_lists + 1] int32, the first choice of each list
    cu_blocks,  # [num_blocks + 1] int32, the first key of each block
    num_blocks,  # selection blocks of all samples
    piece_size,  # choices of a piece
    part_rows,  # keys of a part
    heads,  # HeadConstants
    KEYS: tl.constexpr,  # keys of a program
):
    """A program adds the parts of a list to the gradients of one tile of its keys, or of its values."""
    list_number = tl.program_id(0)
    block, kv_head = list_number % num_blocks, list_number // num_blocks
    # Every list has one piece without a part, its first. All others are full but the last.
    start, end = tl.load(starts + list_number), tl.load(starts + list_number + 1)
    first_part = start // piece_size
    end_part = first_part + tl.maximum(end - start - 1, 0) // piece_size
    first_key, end_key = tl.load(cu_blocks + block), tl.load(cu_blocks + block + 1)
    # [KEYS]
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_key = first_key + inside < end_key
    if end_part > first_part:
        rows = (first_key + inside).to(tl.int64) * heads.num_kv_heads + kv_head
        if tl.program_id(2) == 0:
            gradient, part = gradients.key, parts.key
            _add_parts(gradient, part, first_part, end_part, part_rows, rows, inside, is_key, heads.dim, heads.DIM)
        else:
            gradient, part = gradients.value, parts.value
            _add_parts(
                gradient, part, first_part, end_part, part_rows, rows, inside, is_key, heads.value_dim, heads.VALUE_DIM
            )


def add_key_gradients(
    gradients: KeyGradients,
    parts: KeyGradients,
    choices: SortedChoices,
    piece_size: int,
    selection: SelectionPlan,
    heads: HeadShape,
    dtype: torch.dtype,
) -> None:
    """Adds the gradients from all pieces of a list but the first to those from the first.

    Args:
        gradients: `[N, H_kv, *]` float32, added to.
        parts: `[parts, part_rows, *]` float32, of all pieces but the first ones of the lists.
        choices: sorted by block in one chunk of all queries.
        piece_size: choices of a piece.
        selection: the tokens in blocks.
        heads: sizes.
        dtype: of queries, keys and values.
    """
    shape, part_rows = selection.shapes.key_gradient, parts.key.shape[1]
    _add_parts_kernel[choices.num_lists, part_rows // shape.keys, 2](
        gradients,
        parts,
        choices.starts,
        selection.cu_seqlens,
        selection.num_blocks,
        piece_size,
        part_rows,
        heads.constants(dtype),
        KEYS=shape.keys,
    )
