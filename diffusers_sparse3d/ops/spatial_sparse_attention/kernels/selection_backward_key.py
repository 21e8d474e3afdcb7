"""Backward pass of selected attention: the gradients of keys and values, from the queries that chose their block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv
from ...runtime.launch import NUMBERS, Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape, KeyGradients, SortedChoices
from .backward_tiles import key_gradient_step
from .choice_lists import PIECE_WIDTH, cut_lists
from .common import head_rows, load_matrix, store_matrix
from .selection_add_key_gradients import add_key_gradients
from .selection_plan import SelectionPlan


# Pieces into which the lists of choices are cut for the gradients of keys and values, besides one for each list: so
# many at most, unless they would be larger than the largest, and none smaller than the smallest.
_MOST_PIECES = 1024
_SMALLEST_PIECE = 128
_LARGEST_PIECE = 2048


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _backward_key_kernel(
    query,  # [N, H, D]
    key,  # [N, H_kv, D], grouped by selection block
    value,  # [N, H_kv, D_v], grouped by selection block
    inputs,  # BackwardInputs
    gradients,  # KeyGradients [N, H_kv, *] float32, written by the first piece of each list
    parts,  # KeyGradients [parts, part_rows, *] float32, written by all other pieces
    choosers,  # [N * H_kv * k] int64, the query of each of the sorted choices
    pieces,  # [pieces, WIDTH] int32: list, first choice, choice after the last, number in the list
    cu_blocks,  # [num_blocks + 1] int32, the first key of each block
    num_blocks,  # selection blocks of all samples
    part_rows,  # keys of a part: those of the largest block, in whole tiles
    scale,  # factor of the scores, times log2(e)
    score_scale,  # factor of the scores
    heads,  # HeadConstants
    tile,  # TileConstants
    WIDTH: tl.constexpr,  # numbers of a piece
):
    """A program has one tile of keys of a block, and loops over one piece of the list of queries that chose the block.

    The tiles of keys of a block come one after the other, as they read the same queries.
    """
    TOKENS: tl.constexpr = tile.ROWS // heads.GROUP
    piece = tl.program_id(1)
    pieces += piece * WIDTH
    list_number = tl.load(pieces)
    if list_number < num_blocks * heads.num_kv_heads:
        block, kv_head = list_number % num_blocks, list_number // num_blocks
        first_key, end_key = tl.load(cu_blocks + block), tl.load(cu_blocks + block + 1)
        offset = tl.program_id(0) * tile.KEYS
        if first_key + offset < end_key:
            # [KEYS]
            inside = offset + tl.arange(0, tile.KEYS)
            is_key = first_key + inside < end_key
            key_rows = (first_key + inside).to(tl.int64) * heads.num_kv_heads + kv_head
            # [KEYS, DIM], [KEYS, VALUE_DIM]
            keys = load_matrix(key, key_rows, is_key, heads.dim, heads.DIM)
            values = load_matrix(value, key_rows, is_key, heads.value_dim, heads.VALUE_DIM)

            # [KEYS, DIM], [KEYS, VALUE_DIM]
            grad_keys = tl.zeros((tile.KEYS, heads.DIM), tl.float32)
            grad_values = tl.zeros((tile.KEYS, heads.VALUE_DIM), tl.float32)
            last = tl.load(pieces + 2)
            for begin in range(tl.load(pieces + 1), last, TOKENS):
                # [ROWS]
                rows, valid = head_rows(choosers, begin, last, kv_head, heads, tile.ROWS)
                # [KEYS, DIM], [KEYS, VALUE_DIM]
                grad_keys, grad_values = key_gradient_step(
                    query, inputs, rows, valid, keys, values, grad_keys, grad_values, scale, heads, tile.KEYS
                )

            grad_keys *= score_scale
            if tl.load(pieces + 3) == 0:
                store_matrix(gradients.key, key_rows, is_key, grad_keys, heads.dim, heads.DIM)
                store_matrix(gradients.value, key_rows, is_key, grad_values, heads.value_dim, heads.VALUE_DIM)
            else:
                # The lists up to this one have as many first pieces, which have no part.
                # [KEYS]
                place = (piece - list_number - 1).to(tl.int64) * part_rows + inside
                store_matrix(parts.key, place, is_key, grad_keys, heads.dim, heads.DIM)
                store_matrix(parts.value, place, is_key, grad_values, heads.value_dim, heads.VALUE_DIM)


def key_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    choices: SortedChoices,
) -> KeyGradients:
    """The gradients of keys and values, `[N, H_kv, *]` float32, in the order of `selection`.

    Args:
        query, key, value, blocks, inputs, selection, scale: as in `selection_attention.attend_backward`.
        choices: sorted by block in one chunk of all queries.
    """
    heads, shape, num_blocks = HeadShape.of(query, key, value), selection.shapes.key_gradient, selection.num_blocks
    gradients = KeyGradients(torch.empty_like(key, dtype=torch.float32), torch.empty_like(value, dtype=torch.float32))
    num_lists, key_tiles = choices.num_lists, cdiv(selection.max_seqlen, shape.keys)
    piece_size = min(max(cdiv(choices.choices.shape[0], _MOST_PIECES), _SMALLEST_PIECE), _LARGEST_PIECE)
    pieces = cut_lists(choices.starts, blocks.numel(), piece_size)
    num_pieces = pieces.shape[0]
    num_parts, part_rows = num_pieces - num_lists, key_tiles * shape.keys
    parts = KeyGradients(*(gradient.new_empty(num_parts, part_rows, gradient.shape[2]) for gradient in gradients))
    _backward_key_kernel[key_tiles, num_pieces](
        query,
        key,
        value,
        inputs,
        gradients,
        parts,
        # Divided once here, and not in every loop.
        torch.div(choices.choices, blocks[0].numel(), rounding_mode="floor"),
        pieces,
        selection.cu_seqlens,
        num_blocks,
        part_rows,
        scale * LOG2_E,
        scale,
        heads.constants(query.dtype),
        shape.constants,
        **shape.launch,
        WIDTH=PIECE_WIDTH.value,
    )
    if num_parts:
        add_key_gradients(gradients, parts, choices, piece_size, selection, heads, query.dtype)
    return gradients
