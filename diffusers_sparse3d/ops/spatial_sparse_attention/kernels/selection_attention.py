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

from ...triton_dispatch import on_device_of_first_argument
from .backward_inputs import BackwardInputs, prepare_backward
from .common import LOG2_E, HeadShape, TileShape, load_matrix, query_rows, store_matrix
from .segment_attention import backward_shape
from .tiles import attend_to_keys, key_gradient_step, query_gradient


if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...coordinates import Partition


# Queries of an inverse list that one program works on.
_LIST_PART = 2048
# Bytes of the buffer of what queries get from each block.
_BUFFER_BYTES = 1 << 28
# Columns of a program that adds up what is in the buffer.
_MOST_COLUMNS = 1024


@triton.jit
def _choice_rows(
    choices,
    starts,
    first_tiles,
    segment,
    first_query,
    k,
    kv_head,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of a tile of choices of a segment: rows of `[N * H]`, rows of the buffer, and which are real."""
    TOKENS: tl.constexpr = ROWS // GROUP
    rows = tl.arange(0, ROWS)
    places = tl.load(starts + segment) + (tl.program_id(0) - tl.load(first_tiles + segment)) * TOKENS + rows // GROUP
    head = rows % GROUP
    valid = (places < tl.load(starts + segment + 1)) & (head < group_size)
    choice = tl.load(choices + places, mask=valid, other=0)
    token = first_query + (choice // (num_kv_heads * k)).to(tl.int64)
    query_rows = token * (num_kv_heads * group_size) + kv_head * group_size + head
    return query_rows, choice.to(tl.int64) * group_size + head, valid


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    parts,
    part_log_sums,
    choices,
    starts,
    first_tiles,
    tile_segments,
    cu_blocks,
    num_blocks,
    first_query,
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
):
    segment = tl.load(tile_segments + tl.program_id(0))
    if segment < num_blocks * num_kv_heads:
        block, kv_head = segment % num_blocks, segment // num_blocks
        rows, part_rows, valid = _choice_rows(
            choices, starts, first_tiles, segment, first_query, k, kv_head, num_kv_heads, group_size, GROUP, ROWS
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
            tl.full((ROWS,), float("-inf"), tl.float32),
            scale,
            num_kv_heads,
            dim,
            value_dim,
            DIM,
            VALUE_DIM,
            PRECISION,
            ROWS,
            KEYS,
            False,
        )
        store_matrix(parts, part_rows, valid, attended, value_dim, VALUE_DIM)
        tl.store(part_log_sums + part_rows, log_sums, mask=valid)


@triton.jit
def _combine_kernel(
    parts,
    part_log_sums,
    blocks,
    output,
    log_sum,
    first_query,
    k,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    value_dim: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The attention of a query from that to each of its blocks."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head, channel = column // value_dim, column % value_dim
    kv_head, member = head // group_size, head % group_size
    valid = kv_head < num_kv_heads
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    attended = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(k):
        exists = valid & (tl.load(blocks + (token * num_kv_heads + kv_head) * k + slot, mask=valid, other=-1) >= 0)
        part_row = ((row * num_kv_heads + kv_head) * k + slot) * group_size + member
        log_sums = tl.load(part_log_sums + part_row, mask=exists, other=float("-inf"))
        part = tl.load(parts + part_row * value_dim + channel, mask=exists, other=0.0).to(tl.float32)
        # The first slot of a query is never empty.
        new_largest = tl.where(valid, tl.maximum(largest, log_sums), 0.0)
        correction, weight = tl.exp2(largest - new_largest), tl.exp2(log_sums - new_largest)
        total = total * correction + weight
        attended = attended * correction + weight * part
        largest = new_largest
    total = tl.where(valid, total, 1.0)
    head_row = token * (num_kv_heads * group_size) + head
    tl.store(output + head_row * value_dim + channel, (attended / total).to(output.dtype.element_ty), mask=valid)
    tl.store(log_sum + head_row, largest + tl.log2(total), mask=valid & (channel == 0))


@triton.jit
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
    first_tiles,
    tile_segments,
    cu_blocks,
    num_blocks,
    first_query,
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
):
    segment = tl.load(tile_segments + tl.program_id(0))
    if segment < num_blocks * num_kv_heads:
        block, kv_head = segment % num_blocks, segment // num_blocks
        rows, part_rows, valid = _choice_rows(
            choices, starts, first_tiles, segment, first_query, k, kv_head, num_kv_heads, group_size, GROUP, ROWS
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


@triton.jit
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
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
):
    """The gradient of a query from what comes from each of its blocks."""
    row = tl.program_id(0).to(tl.int64)
    token = first_query + row
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head, channel = column // dim, column % dim
    kv_head, member = head // group_size, head % group_size
    valid = kv_head < num_kv_heads
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(k):
        exists = valid & (tl.load(blocks + (token * num_kv_heads + kv_head) * k + slot, mask=valid, other=-1) >= 0)
        part_row = ((row * num_kv_heads + kv_head) * k + slot) * group_size + member
        total += tl.load(parts + part_row * dim + channel, mask=exists, other=0.0).to(tl.float32)
    total *= score_scale
    places = (token * (num_kv_heads * group_size) + head) * dim + channel
    if ADD:
        total += tl.load(grad_query + places, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_query + places, total.to(grad_query.dtype.element_ty), mask=valid)


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
    starts,
    part_segments,
    part_numbers,
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
    PART: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    # The first parts of all lists come first, then the further parts of the long ones.
    task = tl.program_id(0)
    num_segments = num_blocks * num_kv_heads
    segment, part = task, task * 0
    if task >= num_segments:
        segment = tl.load(part_segments + task - num_segments)
        part = tl.load(part_numbers + task - num_segments)
    if segment < num_segments:
        block, kv_head = segment % num_blocks, segment // num_blocks
        first_key, end_key = tl.load(cu_blocks + block), tl.load(cu_blocks + block + 1)
        offset = tl.program_id(1) * KEYS
        if first_key + offset < end_key:
            inside = offset + tl.arange(0, KEYS)
            is_key = first_key + inside < end_key
            key_rows = (first_key + inside).to(tl.int64) * num_kv_heads + kv_head
            keys = load_matrix(key, key_rows, is_key, dim, DIM)
            values = load_matrix(value, key_rows, is_key, value_dim, VALUE_DIM)

            list_end = tl.load(starts + segment + 1)
            first_query = tl.load(starts + segment) + part * PART
            last_query = tl.minimum(first_query + PART, list_end)
            grad_keys = tl.zeros((KEYS, DIM), tl.float32)
            grad_values = tl.zeros((KEYS, VALUE_DIM), tl.float32)
            for begin in range(first_query, last_query, TOKENS):
                rows, valid = query_rows(choosers, begin, last_query, kv_head, num_kv_heads, group_size, GROUP, ROWS)
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
            if task < num_segments:
                store_matrix(grad_key, key_rows, is_key, grad_keys, dim, DIM)
                store_matrix(grad_value, key_rows, is_key, grad_values, value_dim, VALUE_DIM)
            else:
                place = (task - num_segments).to(tl.int64) * part_rows + inside
                store_matrix(part_grad_key, place, is_key, grad_keys, dim, DIM)
                store_matrix(part_grad_value, place, is_key, grad_values, value_dim, VALUE_DIM)


@triton.jit
def _add_parts_kernel(
    grad,
    part_grad,
    first_parts,
    cu_blocks,
    num_blocks,
    part_rows,
    num_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    segment = tl.program_id(0)
    block, kv_head = segment % num_blocks, segment // num_blocks
    first_part, end_part = tl.load(first_parts + segment), tl.load(first_parts + segment + 1)
    first_key, end_key = tl.load(cu_blocks + block), tl.load(cu_blocks + block + 1)
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_key = first_key + inside < end_key
    if end_part > first_part:
        rows = (first_key + inside).to(tl.int64) * num_kv_heads + kv_head
        total = load_matrix(grad, rows, is_key, dim, DIM)
        part_grad += first_part.to(tl.int64) * part_rows * dim
        for _ in range(first_part, end_part):
            # In the order of the list, whatever order the programs ran in.
            total += load_matrix(part_grad, inside, is_key, dim, DIM)
            part_grad += part_rows * dim
        store_matrix(grad, rows, is_key, total, dim, DIM)


def choice_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """Of the kernels whose programs have choices."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    return TileShape(64, 64, 4, 3 if widest <= 32 else 2)


def sort_choices(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Choices of blocks, sorted by block.

    Segment s is key/value head s // num_blocks and block s % num_blocks.

    Args:
        blocks: `[N, H_kv, k]`, -1 for none.
        num_blocks: of the partition.

    Returns:
        The numbers of the choices in `blocks.flatten()`, segment by segment and ascending there `[N * H_kv * k]` int32
        (those that are none come last); where each segment starts, `[segments + 1]` int32.
    """
    num_kv_heads = blocks.shape[1]
    device, num_segments = blocks.device, num_kv_heads * num_blocks
    heads = torch.arange(0, num_segments, num_blocks, dtype=torch.int32, device=device)[:, None]
    segments = torch.where(blocks >= 0, heads + blocks, num_segments).int()
    segments, choices = segments.flatten().sort(stable=True)
    boundaries = torch.arange(num_segments + 1, dtype=torch.int32, device=device)
    return choices.int(), torch.searchsorted(segments, boundaries, out_int32=True)


def cut_lists(starts: Tensor, size: int, num_choices: int, whole: bool) -> tuple[Tensor, Tensor]:
    """Lists cut into pieces of at most `size`; nothing is transferred to the host, their number is an upper bound.

    Args:
        starts: `[segments + 1]` int32, where the list of each segment starts.
        size: of a piece.
        num_choices: in all lists together, at most.
        whole: whether the first piece of each list counts; else only further pieces.

    Returns:
        Where the pieces of each segment start, `[segments + 1]` int32; the segment of each piece, `[pieces]` int32,
        the number of segments for pieces that are not there.
    """
    num_segments = len(starts) - 1
    counts = torch.div(starts.diff() + (size - 1 if whole else -1), size, rounding_mode="floor")
    first_pieces = torch.nn.functional.pad(counts.clamp_(min=0).cumsum(0, dtype=torch.int32), (1, 0))
    most_pieces = num_choices // size + whole * min(num_segments, num_choices)
    pieces = torch.arange(most_pieces, dtype=torch.int32, device=starts.device)
    return first_pieces, torch.searchsorted(first_pieces[1:], pieces, right=True, out_int32=True)


class SelectionPlan(NamedTuple):
    """The tokens in selection blocks, as in `Partition`.

    Attributes:
        order: `[N]` int64, the tokens grouped by block.
        inverse: `[N]` int64, the place of each token among them.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts.
        max_seqlen: tokens of the largest block.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, partition: Partition) -> SelectionPlan:
        return cls(partition.order, partition.inverse, partition.cu_seqlens, partition.max_seqlen)

    @property
    def num_blocks(self) -> int:
        return len(self.cu_seqlens) - 1


class _Chunk(NamedTuple):
    """Some queries and their choices.

    Attributes:
        first, last: which queries.
        parts: `[queries * H_kv * k, group, channels]`, the buffer, to be written.
        tiles: choices, starts, first_tiles and tile_segments of the kernels.
    """

    first: int
    last: int
    parts: Tensor
    tiles: tuple[Tensor, Tensor, Tensor, Tensor]


def _chunks(
    blocks: Tensor, num_blocks: int, heads: HeadShape, tokens: int, like: Tensor, channels: int
) -> Iterator[_Chunk]:
    """As many queries at a time as the buffer may hold; `tokens` choices make a tile."""
    choices_of_query = heads.num_kv_heads * blocks.shape[2]
    bytes_of_query = choices_of_query * heads.group_size * channels * like.element_size()
    size = max(1, _BUFFER_BYTES // bytes_of_query)
    for first in range(0, len(blocks), size):
        last = min(first + size, len(blocks))
        choices, starts = sort_choices(blocks[first:last], num_blocks)
        first_tiles, tile_segments = cut_lists(starts, tokens, len(choices), whole=True)
        parts = like.new_empty(len(choices), heads.group_size, channels)
        yield _Chunk(first, last, parts, (choices, starts, first_tiles, tile_segments))


def _column_grid(num_rows: int, columns: int) -> tuple[tuple[int, int], int]:
    """A grid of rows and pieces of their columns, and the size of a piece."""
    piece = min(_MOST_COLUMNS, triton.next_power_of_2(columns))
    return (num_rows, triton.cdiv(columns, piece)), piece


@on_device_of_first_argument
def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: SelectionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """
    Args:
        query: `[N, H, D]`, contiguous.
        key: `[N, H_kv, D]`, contiguous, in the order of `selection`.
        value: `[N, H_kv, D_v]`, contiguous, in the order of `selection`.
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, distinct block numbers, then -1; rows as in `query`.
        selection: the tokens in blocks.
        scale: factor of the scores, positive.

    Returns:
        The output `[N, H, D_v]`, and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`.
    """
    heads = HeadShape.of(query, key, value)
    shape, k = choice_shape(heads, query.dtype), blocks.shape[2]
    output = value.new_empty(*query.shape[:2], heads.value_dim)
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
    for chunk in _chunks(blocks, selection.num_blocks, heads, heads.tokens(shape.rows), value, heads.value_dim):
        part_log_sums = log_sum.new_empty(chunk.parts.shape[:2])
        _forward_kernel[(len(chunk.tiles[-1]),)](
            query,
            key,
            value,
            chunk.parts,
            part_log_sums,
            *chunk.tiles,
            selection.cu_seqlens,
            selection.num_blocks,
            chunk.first,
            k,
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            ROWS=shape.rows,
            KEYS=shape.keys,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        grid, columns = _column_grid(chunk.last - chunk.first, output[0].numel())
        _combine_kernel[grid](
            chunk.parts,
            part_log_sums,
            blocks,
            output,
            log_sum,
            chunk.first,
            k,
            num_kv_heads=heads.num_kv_heads,
            group_size=heads.group_size,
            value_dim=heads.value_dim,
            COLUMNS=columns,
        )
    return output, log_sum


def _query_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    grad_query: Tensor | None,
) -> Tensor:
    """The gradient of the query, see `attend_backward`."""
    heads = HeadShape.of(query, key, value)
    shape, k = choice_shape(heads, query.dtype), blocks.shape[2]
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    for chunk in _chunks(blocks, selection.num_blocks, heads, heads.tokens(shape.rows), query, heads.dim):
        _backward_query_kernel[(len(chunk.tiles[-1]),)](
            query,
            key,
            value,
            inputs.gradient,
            inputs.log_sum,
            inputs.product,
            chunk.parts,
            *chunk.tiles,
            selection.cu_seqlens,
            selection.num_blocks,
            chunk.first,
            k,
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            ROWS=shape.rows,
            KEYS=shape.keys,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        grid, columns = _column_grid(chunk.last - chunk.first, query[0].numel())
        _add_query_gradients_kernel[grid](
            chunk.parts,
            blocks,
            grad_query,
            chunk.first,
            k,
            scale,
            num_kv_heads=heads.num_kv_heads,
            group_size=heads.group_size,
            dim=heads.dim,
            COLUMNS=columns,
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
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values, see `attend_backward`."""
    heads = HeadShape.of(query, key, value)
    shape = backward_shape(heads, query.dtype)
    grad_key = torch.empty_like(key, dtype=torch.float32)
    grad_value = torch.empty_like(value, dtype=torch.float32)
    num_blocks = selection.num_blocks
    num_segments, key_tiles = num_blocks * heads.num_kv_heads, triton.cdiv(selection.max_seqlen, shape.keys)
    choices, starts = sort_choices(blocks, num_blocks)
    first_parts, part_segments = cut_lists(starts, _LIST_PART, len(choices), whole=False)
    pieces = torch.arange(len(part_segments), dtype=torch.int32, device=key.device)
    part_rows = key_tiles * shape.keys
    part_grad_key = grad_key.new_empty(len(part_segments), part_rows, heads.dim)
    part_grad_value = grad_key.new_empty(len(part_segments), part_rows, heads.value_dim)
    _backward_key_kernel[num_segments + len(part_segments), key_tiles](
        query,
        key,
        value,
        *inputs,
        grad_key,
        grad_value,
        part_grad_key,
        part_grad_value,
        torch.div(choices, heads.num_kv_heads * blocks.shape[2], rounding_mode="floor"),
        starts,
        part_segments,
        # The first part of a list is not among the further ones.
        pieces - first_parts[part_segments] + 1,
        selection.cu_seqlens,
        num_blocks,
        part_rows,
        scale * LOG2_E,
        scale,
        **heads.arguments(query.dtype),
        ROWS=shape.rows,
        KEYS=shape.keys,
        PART=_LIST_PART,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if len(part_segments):
        sizes = heads.arguments(query.dtype)
        for grad, part_grad, dim, padded in (
            (grad_key, part_grad_key, heads.dim, sizes["DIM"]),
            (grad_value, part_grad_value, heads.value_dim, sizes["VALUE_DIM"]),
        ):
            _add_parts_kernel[num_segments, key_tiles](
                grad,
                part_grad,
                first_parts,
                selection.cu_seqlens,
                num_blocks,
                part_rows,
                num_kv_heads=heads.num_kv_heads,
                dim=dim,
                DIM=padded,
                KEYS=shape.keys,
            )
    return grad_key, grad_value


@on_device_of_first_argument
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        query, key, value, blocks, selection, scale: as in `attend`.
        inputs: of its results and the gradient of the output.
        grad_query: added to, in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[N, H_kv, D]` and value `[N, H_kv, D_v]`, the latter two in float32 and in
        the order of `selection`.
    """
    arguments = (query, key, value, blocks, inputs, selection, scale)
    if not len(query):
        grads = torch.empty_like(key, dtype=torch.float32), torch.empty_like(value, dtype=torch.float32)
        return torch.empty_like(query) if grad_query is None else grad_query, *grads
    return _query_gradients(*arguments, grad_query), *_key_gradients(*arguments)


class SelectedAttention(torch.autograd.Function):
    """`attend` with gradients of query, key and value, all in the row order of the query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: SelectionPlan, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key[selection.order], value[selection.order]
        blocks = blocks.contiguous()
        output, log_sum = attend(query, key, value, blocks, selection, scale)
        ctx.save_for_backward(query, key, value, blocks, output, log_sum)
        ctx.selection, ctx.scale = selection, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, blocks, output, log_sum = ctx.saved_tensors
        inputs, _ = prepare_backward(output, log_sum, grad_output.contiguous(), ctx.scale)
        grad_query, grad_key, grad_value = attend_backward(query, key, value, blocks, inputs, ctx.selection, ctx.scale)
        inverse = ctx.selection.inverse
        return grad_query, grad_key[inverse].to(key.dtype), grad_value[inverse].to(value.dtype), None, None, None
