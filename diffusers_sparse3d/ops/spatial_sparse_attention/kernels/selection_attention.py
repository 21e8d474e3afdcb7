"""Attention of every query to the tokens of the blocks that were chosen for it.

A choice is a query's block for one key/value head. Choices are sorted by block, so that a program has a tile of those
of one block, all heads of the group as rows, and its keys serve them all. What a query gets from each of its blocks
passes through a buffer, for a bounded number of queries at once, and a second kernel adds it up. The gradients of keys
and values come from programs that have (a tile of) one block and loop over the queries that chose it; long lists are
cut into parts, whose sums are added in a fixed order. There are no atomics.

Floor at 131,072 tokens of 32 heads of 32 half-precision channels, top-k 8: the buffer, 2.1 GB written and read, takes
1 ms at 4.2 TB/s. With a program for each query instead, which needs no buffer, the keys and values of 8 blocks for 16
rows are 63 KB at 62 tokens a block, 16.6 GB in total; queries choose large blocks more often, and it was 13 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import Kernel
from .backward_inputs import BackwardInputs, prepare_backward
from .choice_lists import PIECE_WIDTH, SortedChoices, cut_lists, first_piece, most_pieces, sort_choices
from .common import LOG2_E, AttentionShapes, HeadShape, TileShape, load_matrix, query_rows, store_matrix
from .score_bounds import NO_BOUNDS, ScoreBounds, largest_scores, takes_part, ways
from .segment_attention import key_shape as segment_key_shape
from .tiles import attend_to_keys, key_gradient_step, query_gradient


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...coordinates import Partition


# Parts into which the lists of choices are cut for the gradients of keys and values, besides one for each list: so
# many at most, unless they would be larger than the largest, and none smaller than the smallest.
_MOST_PARTS = 1024
_SMALLEST_PART = 128
_LARGEST_PART = 2048
# Bytes of the buffer of what queries get from each block.
_BUFFER_BYTES = 1 << 27
# Channels, of all its heads, of a program that adds up what is in the buffer.
_MOST_COLUMNS = 1024


@triton.jit
def _piece_of_chunk(starts, pieces, chunk, num_segments, piece_size, WIDTH: tl.constexpr):
    """Of a program's piece: its segment in the chunk and the bounds of its choices, which are none if it is none."""
    first_segment = chunk * num_segments
    first, _ = first_piece(starts, first_segment, piece_size)
    end, _ = first_piece(starts, first_segment + num_segments, piece_size)
    piece = first + tl.program_id(0)
    in_chunk = piece < end
    pieces += piece * WIDTH
    segment = tl.load(pieces, mask=in_chunk, other=0) - first_segment
    return segment, tl.load(pieces + 1, mask=in_chunk, other=0), tl.load(pieces + 2, mask=in_chunk, other=0)


@triton.jit
def _choice_rows(
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


@Kernel
@triton.jit(do_not_specialize=["chunk", "first_choice"])
def _forward_kernel(
    query,
    key,
    value,
    parts,
    part_log_sums,
    largest_query,
    largest_key,
    choices,
    starts,
    pieces,
    cu_blocks,
    num_blocks,
    chunk,
    first_choice,
    k,
    scale,
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
    BOUNDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    segment, first, last = _piece_of_chunk(starts, pieces, chunk, num_blocks * num_kv_heads, ROWS // GROUP, WIDTH)
    if (first < last) & takes_part(largest_query, largest_key, scale, num_kv_heads, BOUNDED):
        block, kv_head = segment % num_blocks, segment // num_blocks
        rows, part_rows, valid = _choice_rows(
            choices, first, last, first_choice, k, kv_head, num_kv_heads, group_size, GROUP, ROWS
        )
        queries = load_matrix(query, rows, valid, dim, DIM)
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * num_kv_heads + kv_head
        attended, log_sums = attend_to_keys(
            queries,
            key + first_row * dim,
            value + first_row * value_dim,
            num_keys,
            largest_scores(queries, largest_key, kv_head, scale, ROWS, BOUNDED),
            scale,
            num_kv_heads,
            dim,
            value_dim,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
            BOUNDED,
        )
        store_matrix(parts, part_rows, valid, attended, value_dim, VALUE_DIM)
        tl.store(part_log_sums + part_rows, log_sums, mask=valid)


@triton.jit
def _part_rows(blocks, row, token, heads, is_head, slot, k, num_kv_heads: tl.constexpr, group_size: tl.constexpr):
    """Of a query's heads: their rows of the buffer for a slot, and which heads have a block there."""
    kv_head = heads // group_size
    valid = is_head & (tl.zeros_like(heads) + slot < k)
    block = tl.load(blocks + (token * num_kv_heads + kv_head) * k + slot, mask=valid, other=-1)
    return ((row * num_kv_heads + kv_head) * k + slot) * group_size + heads % group_size, block >= 0


@Kernel
@triton.jit(do_not_specialize=["first_query"])
def _combine_kernel(
    parts,
    part_log_sums,
    blocks,
    output,
    log_sum,
    gate,
    compressed,
    window,
    gated_sum,
    first_query,
    k,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    value_dim: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """The attention of a query from that to each of its blocks, and its gated sum with other branches."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < num_kv_heads * group_size
    # The first slot of a query is never empty.
    largest = tl.where(is_head, float("-inf"), 0.0)
    total = tl.zeros((HEADS,), tl.float32)
    attended = tl.zeros((HEADS, VALUE_DIM), tl.float32)
    part_rows, exists = _part_rows(blocks, row, token, heads, is_head, 0, k, num_kv_heads, group_size)
    next_values = load_matrix(parts, part_rows, exists, value_dim, VALUE_DIM)
    next_log_sums = tl.load(part_log_sums + part_rows, mask=exists, other=float("-inf"))
    for slot in range(1, k + 1):
        values, log_sums = next_values, next_log_sums
        # On its way while these are added.
        part_rows, exists = _part_rows(blocks, row, token, heads, is_head, slot, k, num_kv_heads, group_size)
        next_values = load_matrix(parts, part_rows, exists, value_dim, VALUE_DIM)
        next_log_sums = tl.load(part_log_sums + part_rows, mask=exists, other=float("-inf"))
        new_largest = tl.maximum(largest, log_sums)
        correction, weights = tl.exp2(largest - new_largest), tl.exp2(log_sums - new_largest)
        total = total * correction + weights
        attended = attended * correction[:, None] + weights[:, None] * values.to(tl.float32)
        largest = new_largest
    total = tl.where(is_head, total, 1.0)
    attended /= total[:, None]
    rows = token * (num_kv_heads * group_size) + heads
    if output is not None:
        store_matrix(output, rows, is_head, attended, value_dim, VALUE_DIM)
        tl.store(log_sum + rows, largest + tl.log2(total), mask=is_head)
    if gate is not None:
        gate += token * 3
        attended *= tl.load(gate + 1).to(tl.float32)
        other = load_matrix(compressed, rows, is_head, value_dim, VALUE_DIM)
        attended += tl.load(gate).to(tl.float32) * other.to(tl.float32)
        other = load_matrix(window, rows, is_head, value_dim, VALUE_DIM)
        attended += tl.load(gate + 2).to(tl.float32) * other.to(tl.float32)
        store_matrix(gated_sum, rows, is_head, attended, value_dim, VALUE_DIM)


@Kernel
@triton.jit(do_not_specialize=["chunk", "first_choice"])
def _backward_query_kernel(
    query,
    key,
    value,
    gradient,
    log_sum,
    product,
    parts,
    choices,
    starts,
    pieces,
    cu_blocks,
    num_blocks,
    chunk,
    first_choice,
    k,
    scale,
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
    segment, first, last = _piece_of_chunk(starts, pieces, chunk, num_blocks * num_kv_heads, ROWS // GROUP, WIDTH)
    if first < last:
        block, kv_head = segment % num_blocks, segment // num_blocks
        rows, part_rows, valid = _choice_rows(
            choices, first, last, first_choice, k, kv_head, num_kv_heads, group_size, GROUP, ROWS
        )
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * num_kv_heads + kv_head
        grad_queries = query_gradient(
            load_matrix(query, rows, valid, dim, DIM),
            load_matrix(gradient, rows, valid, value_dim, VALUE_DIM),
            tl.load(product + rows, mask=valid, other=0.0),
            tl.load(log_sum + rows, mask=valid, other=float("inf")),
            key + first_row * dim,
            value + first_row * value_dim,
            num_keys,
            scale,
            num_kv_heads,
            dim,
            value_dim,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
        )
        store_matrix(parts, part_rows, valid, grad_queries, dim, DIM)


@Kernel
@triton.jit(do_not_specialize=["first_query"])
def _add_query_gradients_kernel(
    parts,
    blocks,
    grad_query,
    first_query,
    k,
    score_scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ADD: tl.constexpr,
):
    """The gradient of a query from what comes from each of its blocks."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < num_kv_heads * group_size
    total = tl.zeros((HEADS, DIM), tl.float32)
    part_rows, exists = _part_rows(blocks, row, token, heads, is_head, 0, k, num_kv_heads, group_size)
    next_values = load_matrix(parts, part_rows, exists, dim, DIM)
    for slot in range(1, k + 1):
        values = next_values
        part_rows, exists = _part_rows(blocks, row, token, heads, is_head, slot, k, num_kv_heads, group_size)
        next_values = load_matrix(parts, part_rows, exists, dim, DIM)
        total += values.to(tl.float32)
    total *= score_scale
    rows = token * (num_kv_heads * group_size) + heads
    if ADD:
        total += load_matrix(grad_query, rows, is_head, dim, DIM).to(tl.float32)
    store_matrix(grad_query, rows, is_head, total, dim, DIM)


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
    part_size,
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
    first_part = start // part_size
    end_part = first_part + tl.maximum(end - start - 1, 0) // part_size
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


def choice_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """Of the kernels whose programs have choices."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    return TileShape(128, 32, 4, 3) if widest <= 64 else TileShape(64, 64, 4, 2)


def list_key_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """Of the gradients of keys and values."""
    shape = segment_key_shape(heads, dtype)
    # Rows are gathered: addresses come first, so that more of them have to be on their way.
    return shape._replace(num_stages=5) if dtype != torch.float32 and max(heads.dim, heads.value_dim) <= 32 else shape


class SelectionPlan(NamedTuple):
    """The tokens in selection blocks, as in `Partition`.

    Attributes:
        order: `[N]` int64, the tokens grouped by block.
        inverse: `[N]` int64, the place of each token among them.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts.
        max_seqlen: tokens of the largest block.
        shapes: of the tiles.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    shapes: AttentionShapes

    @classmethod
    def of(cls, partition: Partition, shapes: AttentionShapes) -> SelectionPlan:
        return cls(partition.order, partition.inverse, partition.cu_seqlens, partition.max_seqlen, shapes)

    @property
    def num_blocks(self) -> int:
        return self.cu_seqlens.shape[0] - 1


class _Chunk(NamedTuple):
    """Some queries.

    Attributes:
        number: of the chunk.
        first, last: its queries.
        first_choice: of its first query.
        most_pieces: of the lists of its choices, at most.
    """

    number: int
    first: int
    last: int
    first_choice: int
    most_pieces: int


def _chunks(shape: torch.Size, chunk_size: int, num_blocks: int, piece_size: int) -> Iterator[_Chunk]:
    """The chunks of choices `[N, H_kv, k]` of blocks."""
    num_queries, num_kv_heads, k = shape
    for number, first in enumerate(range(0, num_queries, chunk_size)):
        last = min(first + chunk_size, num_queries)
        num_choices = (last - first) * num_kv_heads * k
        # One more, as its choices may start anywhere in a piece.
        pieces = most_pieces(num_choices, num_kv_heads * num_blocks, piece_size) + 1
        yield _Chunk(number, first, last, first * num_kv_heads * k, pieces)


def chunk_size_of(shape: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> int:
    """How many queries at a time leave what they get from each block, outputs or gradients, in the buffer.

    `shape` is that of the choices, `[N, H_kv, k]`.
    """
    num_queries, num_kv_heads, k = shape
    bytes_of_query = num_kv_heads * k * heads.group_size * max(heads.dim, heads.value_dim) * dtype.itemsize
    # Sizes may be symbols while an operator is traced.
    return torch.sym_min(num_queries, max(1, _BUFFER_BYTES // bytes_of_query))


def _head_grid(num_rows: int, heads: HeadShape, padded_dim: int) -> tuple[tuple[int, int], int]:
    """A grid of rows and some of their heads, and how many heads that is."""
    num_heads = heads.num_kv_heads * heads.group_size
    piece = min(max(1, _MOST_COLUMNS // padded_dim), next_power_of_2(num_heads))
    return (num_rows, cdiv(num_heads, piece)), piece


class OtherBranches(NamedTuple):
    """What the selection is added to, and where the sum goes.

    Attributes:
        gate: `[N, 3]`, contiguous, factors of compressed attention, selection and windows.
        compressed, window: `[N, H, D_v]`.
        gated_sum: `[N, H, D_v]`, written to; may be one of them.
    """

    gate: Tensor
    compressed: Tensor
    window: Tensor
    gated_sum: Tensor


@on_device_of_first_argument
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    selection: SelectionPlan,
    scale: float,
    bounds: ScoreBounds = NO_BOUNDS,
    others: OtherBranches | None = None,
    keep: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """
    Args:
        query: `[N, H, D]`, contiguous.
        key: `[N, H_kv, D]`, contiguous, in the order of `selection`.
        value: `[N, H_kv, D_v]`, contiguous, in the order of `selection`.
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, distinct block numbers, then -1; rows as in `query`.
        selection: the tokens in blocks.
        scale: factor of the scores, positive.
        bounds: of the scores, if they are known.
        others: that the output is added to while it is at hand.
        keep: whether the output itself is wanted.

    Returns:
        The output `[N, H, D_v]` and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`, or None twice; the
        choices of the chunks of this call, `[num_segments + 1]` int32 and `[N * H_kv * k]` int64: see `SortedChoices`.
    """
    heads, k = HeadShape.of(query, key, value), blocks.shape[2]
    shape = selection.shapes.forward
    tokens = heads.tokens(shape.rows)
    output = value.new_empty(*query.shape[:2], heads.value_dim) if keep else None
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32) if keep else None
    if not query.shape[0]:
        return output, log_sum, blocks.new_zeros(1, dtype=torch.int32), blocks.new_empty(0, dtype=torch.int64)
    chunk_size = chunk_size_of(blocks.shape, heads, query.dtype)
    choices = sort_choices(blocks, selection.num_blocks, chunk_size)
    pieces = cut_lists(choices.starts, blocks.numel(), tokens)
    part_log_sums = query.new_empty(chunk_size, heads.num_kv_heads, k, heads.group_size, dtype=torch.float32)
    parts = value.new_empty(*part_log_sums.shape, heads.value_dim)
    for chunk in _chunks(blocks.shape, chunk_size, selection.num_blocks, tokens):
        for bounded in ways(bounds):
            _forward_kernel[(chunk.most_pieces,)](
                query,
                key,
                value,
                parts,
                part_log_sums,
                *bounds,
                choices.choices,
                choices.starts,
                pieces,
                selection.cu_seqlens,
                selection.num_blocks,
                chunk.number,
                chunk.first_choice,
                k,
                scale * LOG2_E,
                **heads.arguments(query.dtype),
                **shape.arguments(),
                BOUNDED=bounded,
                WIDTH=PIECE_WIDTH.value,
            )
        padded_dim = next_power_of_2(heads.value_dim)
        grid, piece = _head_grid(chunk.last - chunk.first, heads, padded_dim)
        _combine_kernel[grid](
            parts,
            part_log_sums,
            blocks,
            output,
            log_sum,
            *(others or (None,) * 4),
            chunk.first,
            k,
            num_kv_heads=heads.num_kv_heads,
            group_size=heads.group_size,
            value_dim=heads.value_dim,
            HEADS=piece,
            VALUE_DIM=padded_dim,
        )
    return output, log_sum, *choices


def _query_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    choices: SortedChoices,
    chunk_size: int,
    grad_query: Tensor | None,
) -> Tensor:
    """The gradient of the query, see `attend_backward`; choices are sorted in chunks."""
    heads, k = HeadShape.of(query, key, value), blocks.shape[2]
    shape = selection.shapes.query_gradient
    tokens = heads.tokens(shape.rows)
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    pieces = cut_lists(choices.starts, blocks.numel(), tokens)
    parts = query.new_empty(chunk_size, heads.num_kv_heads, k, heads.group_size, heads.dim)
    for chunk in _chunks(blocks.shape, chunk_size, selection.num_blocks, tokens):
        _backward_query_kernel[(chunk.most_pieces,)](
            query,
            key,
            value,
            inputs.gradient,
            inputs.log_sum,
            inputs.product,
            parts,
            choices.choices,
            choices.starts,
            pieces,
            selection.cu_seqlens,
            selection.num_blocks,
            chunk.number,
            chunk.first_choice,
            k,
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            **shape.arguments(),
            WIDTH=PIECE_WIDTH.value,
        )
        padded_dim = next_power_of_2(heads.dim)
        grid, piece = _head_grid(chunk.last - chunk.first, heads, padded_dim)
        _add_query_gradients_kernel[grid](
            parts,
            blocks,
            grad_query,
            chunk.first,
            k,
            scale,
            num_kv_heads=heads.num_kv_heads,
            group_size=heads.group_size,
            dim=heads.dim,
            HEADS=piece,
            DIM=padded_dim,
            ADD=add,
        )
    return grad_query


def _key_gradients(
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
    num_segments, key_tiles = choices.num_segments, cdiv(selection.max_seqlen, shape.keys)
    part_size = min(max(cdiv(choices.choices.shape[0], _MOST_PARTS), _SMALLEST_PART), _LARGEST_PART)
    pieces = cut_lists(choices.starts, blocks.numel(), part_size)
    num_pieces = pieces.shape[0]
    num_parts, part_rows = num_pieces - num_segments, key_tiles * shape.keys
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
        sizes = heads.arguments(query.dtype)
        _add_parts_kernel[num_segments, key_tiles, 2](
            grad_key,
            grad_value,
            part_grad_key,
            part_grad_value,
            choices.starts,
            selection.cu_seqlens,
            num_blocks,
            part_size,
            part_rows,
            **{name: sizes[name] for name in ("num_kv_heads", "dim", "value_dim", "DIM", "VALUE_DIM")},
            KEYS=shape.keys,
        )
    return grad_key, grad_value


@on_device_of_first_argument
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    starts: Tensor,
    choices: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        query, key, value, blocks, selection, scale: as in `attend`.
        starts, choices: its third and fourth result.
        inputs: of the others and the gradient of the output.
        grad_query: added to, in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[N, H_kv, D]` and value `[N, H_kv, D_v]`, the latter two in float32 and in
        the order of `selection`.
    """
    if not query.shape[0]:
        grads = torch.empty_like(key, dtype=torch.float32), torch.empty_like(value, dtype=torch.float32)
        return torch.empty_like(query) if grad_query is None else grad_query, *grads
    arguments = (query, key, value, blocks, inputs, selection, scale)
    chunk_size = chunk_size_of(blocks.shape, HeadShape.of(query, key, value), query.dtype)
    in_chunks = SortedChoices(starts, choices)
    grad_query = _query_gradients(*arguments, in_chunks, chunk_size, grad_query)
    # The sums over a list come from as few programs as share the work evenly, not from one for each chunk.
    num_queries = query.shape[0]
    sorted_as_one = in_chunks if chunk_size >= num_queries else sort_choices(blocks, selection.num_blocks, num_queries)
    return grad_query, *_key_gradients(*arguments, sorted_as_one)


class SelectedAttention(torch.autograd.Function):
    """`attend` with gradients of query, key and value, all in the row order of the query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: SelectionPlan, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key[selection.order], value[selection.order]
        blocks = blocks.contiguous()
        output, log_sum, *choices = attend(query, key, value, blocks, selection, scale)
        ctx.save_for_backward(query, key, value, blocks, *choices, output, log_sum)
        ctx.selection, ctx.scale = selection, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, output, log_sum = ctx.saved_tensors
        inputs = prepare_backward(output, log_sum, grad_output.contiguous(), ctx.scale)
        grad_query, grad_key, grad_value = attend_backward(*arguments, inputs, ctx.selection, ctx.scale)
        _, key, value, *_ = arguments
        inverse = ctx.selection.inverse
        return grad_query, grad_key[inverse].to(key.dtype), grad_value[inverse].to(value.dtype), None, None, None
