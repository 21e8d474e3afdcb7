"""The sums of the gradients of keys and values over the pieces of long lists of choices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Kernel
from .arguments import HeadShape, SortedChoices
from .common import load_matrix, store_matrix
from .selection_plan import SelectionPlan


@triton.jit
def _add_parts(
    grad,
    part_grad,
    first_part,
    end_part,
    part_rows,
    rows,
    inside,
    is_key,
    dim: tl.constexpr,
    DIM: tl.constexpr,
):
    total = load_matrix(grad, rows, is_key, dim, DIM)
    part_grad += first_part.to(tl.int64) * part_rows * dim
    for _ in range(first_part, end_part):
        # In the order of the list, whatever order the programs ran in.
        total += load_matrix(part_grad, inside, is_key, dim, DIM)
        part_grad += part_rows * dim
    store_matrix(grad, rows, is_key, total, dim, DIM)


@Kernel
@triton.jit
def _add_parts_kernel(
    grad_key,
    grad_value,
    part_grad_key,
    part_grad_value,
    starts,
    cu_blocks,
    num_blocks,
    piece_size,
    part_rows,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    segment = tl.program_id(0)
    block, kv_head = segment % num_blocks, segment // num_blocks
    # Further pieces alone: without the first of this segment and of those before.
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    first_part = start // piece_size
    end_part = first_part + tl.maximum(end - start - 1, 0) // piece_size
    first_key, end_key = tl.load(cu_blocks + block), tl.load(cu_blocks + block + 1)
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_key = first_key + inside < end_key
    if end_part > first_part:
        rows = (first_key + inside).to(tl.int64) * num_kv_heads + kv_head
        if tl.program_id(2) == 0:
            _add_parts(grad_key, part_grad_key, first_part, end_part, part_rows, rows, inside, is_key, dim, DIM)
        else:
            _add_parts(
                grad_value,
                part_grad_value,
                first_part,
                end_part,
                part_rows,
                rows,
                inside,
                is_key,
                value_dim,
                VALUE_DIM,
            )


def add_key_gradients(
    grad_key: Tensor,
    grad_value: Tensor,
    part_grad_key: Tensor,
    part_grad_value: Tensor,
    choices: SortedChoices,
    piece_size: int,
    selection: SelectionPlan,
    heads: HeadShape,
    dtype: torch.dtype,
) -> None:
    """Adds gradients from all pieces of a list but the first, `[pieces, rows, ...]`, to those from the first."""
    shape, part_rows = selection.shapes.key_gradient, part_grad_key.shape[1]
    sizes = heads.arguments(dtype)
    _add_parts_kernel[choices.num_lists, part_rows // shape.keys, 2](
        grad_key,
        grad_value,
        part_grad_key,
        part_grad_value,
        choices.starts,
        selection.cu_seqlens,
        selection.num_blocks,
        piece_size,
        part_rows,
        **{name: sizes[name] for name in ("num_kv_heads", "dim", "value_dim", "DIM", "VALUE_DIM")},
        KEYS=shape.keys,
    )
