"""The rows that the kernels of selected attention work on: of a piece of a list of choices, and of one query."""

from __future__ import annotations

import triton
import triton.language as tl

from .choice_lists import first_piece


@triton.jit
def piece_of_chunk(starts, pieces, chunk, num_lists, piece_size, WIDTH: tl.constexpr):
    """The piece of a chunk's lists that a program works on.

    Args:
        starts: `SortedChoices.starts`.
        pieces: `[pieces, WIDTH]` int32, see `choice_lists.cut_lists`.
        chunk: the number of the chunk.
        num_lists: lists of one chunk.
        piece_size: choices of a piece.

    Returns:
        The number of its list in the chunk, its first choice, and the choice after the last; both are 0 for a program
        without a piece.
    """
    first_list = chunk * num_lists
    first, _ = first_piece(starts, first_list, piece_size)
    end, _ = first_piece(starts, first_list + num_lists, piece_size)
    piece = first + tl.program_id(0)
    in_chunk = piece < end
    pieces += piece * WIDTH
    list_number = tl.load(pieces, mask=in_chunk, other=0) - first_list
    return list_number, tl.load(pieces + 1, mask=in_chunk, other=0), tl.load(pieces + 2, mask=in_chunk, other=0)


@triton.jit
def rows_of_choices(choices, first, last, first_choice, k, kv_head, heads, ROWS: tl.constexpr):
    """The rows of a tile of choices of one list, whose rows are the query heads of the choices.

    Args:
        choices: `SortedChoices.choices`.
        first, last: the first place of the tile in `choices`, and the place after the last one of its piece.
        first_choice: the number of the first choice of the chunk.
        k: choices of a query and key/value head.
        kv_head: the key/value head of the list.
        heads: `HeadConstants`.
        ROWS: rows of the tile.

    Returns:
        `[ROWS]` rows of the query as `[N * H, D]`, `[ROWS]` rows of the parts `[chunk, H_kv, k, group_size]`, and
        `[ROWS]` whether they exist.
    """
    # [ROWS]
    rows = tl.arange(0, ROWS)
    places = first + rows // heads.GROUP
    head = rows % heads.GROUP
    valid = (places < last) & (head < heads.group_size)
    choice = tl.load(choices + places, mask=valid, other=0)
    # Numbers of choices are below 2^31: a division of 32 bits is faster.
    token = (choice.to(tl.int32) // (heads.num_kv_heads * k)).to(tl.int64)
    rows = token * (heads.num_kv_heads * heads.group_size) + kv_head * heads.group_size + head
    return rows, (choice - first_choice) * heads.group_size + head, valid


@triton.jit
def part_rows(blocks, row, token, head, is_head, rank, k, heads):
    """The rows of the parts that some heads of a query have for one of their blocks.

    Args:
        blocks: `[N, H_kv, k]`, the numbers of the chosen blocks, -1 where there are no more.
        row: the place of the query in its chunk.
        token: the query.
        head: `[HEADS]`, its heads.
        is_head: `[HEADS]`, which of them exist.
        rank: the place of the block among the k of the query; none is there from k on.
        heads: `HeadConstants`.

    Returns:
        `[HEADS]` rows of the parts `[chunk, H_kv, k, group_size]`, and `[HEADS]` whether there is a block.
    """
    # [HEADS]
    kv_head = head // heads.group_size
    valid = is_head & (tl.zeros_like(head) + rank < k)
    block = tl.load(blocks + (token * heads.num_kv_heads + kv_head) * k + rank, mask=valid, other=-1)
    rows = ((row * heads.num_kv_heads + kv_head) * k + rank) * heads.group_size + head % heads.group_size
    return rows, block >= 0
