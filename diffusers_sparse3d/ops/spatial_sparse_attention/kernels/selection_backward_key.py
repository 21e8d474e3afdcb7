"""The gradients of keys and values of selected attention, from the queries that chose their block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv
from ...runtime.launch import Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape, SortedChoices
from .backward_tiles import key_gradient_step
from .choice_lists import PIECE_WIDTH, cut_lists
from .common import load_matrix, query_rows, store_matrix
from .selection_add_key_gradients import add_key_gradients
from .selection_plan import SelectionPlan


# Pieces into which the lists of choices are cut for the gradients of keys and values, besides one for each list: so
# many at most, unless they would be larger than the largest, and none smaller than the smallest.
_MOST_PIECES = 1024
_SMALLEST_PIECE = 128
_LARGEST_PIECE = 2048


@Kernel
@triton.jit
def _backward_key_kernel(
    query,
    key,
    value,
    gradient,
    log_sum,
    product,
    statistics,
    grad_key,
    grad_value,
    part_grad_key,
    part_grad_value,
    choosers,
    pieces,
    cu_blocks,
    num_blocks,
    part_rows,
    scale,
    score_scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    # Tiles of the keys of a block come one after the other: they read the same queries.
    piece = tl.program_id(1)
    pieces += piece * WIDTH
    segment = tl.load(pieces)
    if segment < num_blocks * num_kv_heads:
        block, kv_head = segment % num_blocks, segment // num_blocks
        first_key, end_key = tl.load(cu_blocks + block), tl.load(cu_blocks + block + 1)
        offset = tl.program_id(0) * KEYS
        if first_key + offset < end_key:
            inside = offset + tl.arange(0, KEYS)
            is_key = first_key + inside < end_key
            key_rows = (first_key + inside).to(tl.int64) * num_kv_heads + kv_head
            keys = load_matrix(key, key_rows, is_key, dim, DIM)
            values = load_matrix(value, key_rows, is_key, value_dim, VALUE_DIM)

            grad_keys = tl.zeros((KEYS, DIM), tl.float32)
            grad_values = tl.zeros((KEYS, VALUE_DIM), tl.float32)
            last = tl.load(pieces + 2)
            for begin in range(tl.load(pieces + 1), last, TOKENS):
                rows, valid = query_rows(choosers, begin, last, kv_head, num_kv_heads, group_size, GROUP, ROWS)
                grad_keys, grad_values = key_gradient_step(
                    query,
                    gradient,
                    log_sum,
                    product,
                    statistics,
                    rows,
                    valid,
                    keys,
                    values,
                    grad_keys,
                    grad_values,
                    scale,
                    dim,
                    value_dim,
                    DIM,
                    VALUE_DIM,
                    PRECISION,
                    KEYS,
                )

            grad_keys *= score_scale
            if tl.load(pieces + 3) == 0:
                store_matrix(grad_key, key_rows, is_key, grad_keys, dim, DIM)
                store_matrix(grad_value, key_rows, is_key, grad_values, value_dim, VALUE_DIM)
            else:
                # Every segment before, and this one, has a first piece, which is not in this buffer.
                place = (piece - segment - 1).to(tl.int64) * part_rows + inside
                store_matrix(part_grad_key, place, is_key, grad_keys, dim, DIM)
                store_matrix(part_grad_value, place, is_key, grad_values, value_dim, VALUE_DIM)


def key_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    choices: SortedChoices,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values, see `attend_backward`; choices are sorted in one chunk."""
    heads, num_blocks = HeadShape.of(query, key, value), selection.num_blocks
    shape = selection.shapes.key_gradient
    grad_key = torch.empty_like(key, dtype=torch.float32)
    grad_value = torch.empty_like(value, dtype=torch.float32)
    num_lists, key_tiles = choices.num_lists, cdiv(selection.max_seqlen, shape.keys)
    piece_size = min(max(cdiv(choices.choices.shape[0], _MOST_PIECES), _SMALLEST_PIECE), _LARGEST_PIECE)
    pieces = cut_lists(choices.starts, blocks.numel(), piece_size)
    num_pieces = pieces.shape[0]
    num_parts, part_rows = num_pieces - num_lists, key_tiles * shape.keys
    part_grad_key = grad_key.new_empty(num_parts, part_rows, heads.dim)
    part_grad_value = grad_key.new_empty(num_parts, part_rows, heads.value_dim)
    _backward_key_kernel[key_tiles, num_pieces](
        query,
        key,
        value,
        *inputs,
        grad_key,
        grad_value,
        part_grad_key,
        part_grad_value,
        # The queries of the choices, divided once and not in every loop.
        torch.div(choices.choices, blocks[0].numel(), rounding_mode="floor"),
        pieces,
        selection.cu_seqlens,
        num_blocks,
        part_rows,
        scale * LOG2_E,
        scale,
        **heads.arguments(query.dtype),
        **shape.arguments(),
        WIDTH=PIECE_WIDTH.value,
    )
    if num_parts:
        add_key_gradients(
            grad_key, grad_value, part_grad_key, part_grad_value, choices, piece_size, selection, heads, query.dtype
        )
    return grad_key, grad_value
