"""Selected attention, first step: the attention of every query to each of its chosen blocks alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import NUMBERS, Kernel
from .arguments import LOG2_E, HeadShape, ScoreBounds, SortedChoices
from .choice_lists import PIECE_WIDTH
from .common import load_matrix, store_matrix
from .score_bounds import has_work, largest_scores, variants
from .selection_plan import Chunk, SelectionPlan
from .selection_rows import piece_of_chunk, rows_of_choices
from .tiles import attend_to_keys


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    query,  # [N, H, D]
    key,  # [N, H_kv, D], grouped by selection block
    value,  # [N, H_kv, D_v], grouped by selection block
    parts,  # [chunk, H_kv, k, H / H_kv, D_v], written: the attention of each query to each of its blocks
    part_log_sums,  # [chunk, H_kv, k, H / H_kv] float32, written: the log-sum-exp of the scores, in base 2
    bounds,  # ScoreBounds
    choices,  # SortedChoices
    pieces,  # [pieces, WIDTH] int32: list, first choice, choice after the last, number in the list
    cu_blocks,  # [num_blocks + 1] int32, the first key of each block
    num_blocks,  # selection blocks of all samples
    chunk,  # the number of the chunk
    first_choice,  # the number of the first choice of the chunk
    k,  # choices of a query and key/value head
    scale,  # factor of the scores, times log2(e)
    heads,  # HeadConstants
    tile,  # TileConstants
    BOUNDED: tl.constexpr,  # whether this variant takes a bound of the scores in place of a running maximum
    WIDTH: tl.constexpr,  # numbers of a piece
):
    """A program attends from the queries of one piece, a tile of choices of one block, to the keys of the block."""
    TOKENS: tl.constexpr = tile.ROWS // heads.GROUP
    num_lists = num_blocks * heads.num_kv_heads
    list_number, first, last = piece_of_chunk(choices.starts, pieces, chunk, num_lists, TOKENS, WIDTH)
    if (first < last) & has_work(bounds, scale, heads.num_kv_heads, BOUNDED):
        block, kv_head = list_number % num_blocks, list_number // num_blocks
        # [ROWS]
        rows, rows_of_parts, valid = rows_of_choices(
            choices.choices, first, last, first_choice, k, kv_head, heads, tile.ROWS
        )
        # [ROWS, DIM]
        queries = load_matrix(query, rows, valid, heads.dim, heads.DIM)

        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * heads.num_kv_heads + kv_head
        key += first_row * heads.dim
        value += first_row * heads.value_dim
        # [ROWS]
        largest = largest_scores(bounds, kv_head, scale, tile.ROWS, BOUNDED)
        # [ROWS, VALUE_DIM], [ROWS]
        attended, log_sums = attend_to_keys(queries, key, value, num_keys, largest, scale, heads, tile, BOUNDED)
        store_matrix(parts, rows_of_parts, valid, attended, heads.value_dim, heads.VALUE_DIM)
        tl.store(part_log_sums + rows_of_parts, log_sums, mask=valid)


def attend_to_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor,
    part_log_sums: Tensor,
    bounds: ScoreBounds,
    choices: SortedChoices,
    pieces: Tensor,
    chunk: Chunk,
    k: int,
    selection: SelectionPlan,
    scale: float,
) -> None:
    """The attention of the queries of one chunk to each of their chosen blocks.

    Args:
        query, key, value, bounds, selection, scale: as in `selection_attention.attend`.
        parts: `[chunk, H_kv, k, H / H_kv, D_v]`, written.
        part_log_sums: `[chunk, H_kv, k, H / H_kv]` float32, written: the log-sum-exp in base 2.
        choices: sorted by block in each chunk.
        pieces: their lists cut into pieces of the tokens of a tile.
        chunk: the queries.
        k: choices of a query and key/value head.
    """
    heads, shape = HeadShape.of(query, key, value), selection.shapes.forward
    for bounded in variants(bounds):
        _forward_kernel[(chunk.most_pieces,)](
            query,
            key,
            value,
            parts,
            part_log_sums,
            bounds,
            choices,
            pieces,
            selection.cu_seqlens,
            selection.num_blocks,
            chunk.number,
            chunk.first_choice,
            k,
            scale * LOG2_E,
            heads.constants(query.dtype),
            shape.constants,
            **shape.launch,
            BOUNDED=bounded,
            WIDTH=PIECE_WIDTH.value,
        )
