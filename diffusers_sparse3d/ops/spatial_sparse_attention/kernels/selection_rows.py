"""Rows of the tensors that the kernels of selected attention address, by choices and by queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .choice_lists import first_piece


@triton.jit
def piece_of_chunk(starts, pieces, chunk, num_lists, piece_size, WIDTH: tl.constexpr):
    """Of a program's piece: its segment in the chunk and the bounds of its choices, which are none if it is none."""
    first_segment = chunk * num_lists
    first, _ = first_piece(starts, first_segment, piece_size)
    end, _ = first_piece(starts, first_segment + num_lists, piece_size)
    piece = first + tl.program_id(0)
    in_chunk = piece < end
    pieces += piece * WIDTH
    segment = tl.load(pieces, mask=in_chunk, other=0) - first_segment
    return segment, tl.load(pieces + 1, mask=in_chunk, other=0), tl.load(pieces + 2, mask=in_chunk, other=0)


@triton.jit
def choice_rows(
    choices,
    first,
    last,
    first_choice,
    k,
    kv_head,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of choices of a segment: rows of `[N * H]`, rows of the buffer, and which are real."""
    rows = tl.arange(0, ROWS)
    places = first + rows // GROUP
    head = rows % GROUP
    valid = (places < last) & (head < group_size)
    choice = tl.load(choices + places, mask=valid, other=0)
    # Choices are less than 2^31, and so divided as such.
    token = (choice.to(tl.int32) // (num_kv_heads * k)).to(tl.int64)
    rows = token * (num_kv_heads * group_size) + kv_head * group_size + head
    return rows, (choice - first_choice) * group_size + head, valid


@triton.jit
def part_rows_of_heads(
    blocks, row, token, heads, is_head, slot, k, num_kv_heads: tl.constexpr, group_size: tl.constexpr
):
    """Of a query's heads: their rows of the buffer for a slot, and which heads have a block there."""
    kv_head = heads // group_size
    valid = is_head & (tl.zeros_like(heads) + slot < k)
    block = tl.load(blocks + (token * num_kv_heads + kv_head) * k + slot, mask=valid, other=-1)
    return ((row * num_kv_heads + kv_head) * k + slot) * group_size + heads % group_size, block >= 0
