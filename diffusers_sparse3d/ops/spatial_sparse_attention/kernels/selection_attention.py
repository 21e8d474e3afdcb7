"""Attention of every query to the tokens of the blocks that were chosen for it.

Forward pass and gradient of the queries: a program has a few neighbouring tokens with all heads of a group, and loops
over the union of their blocks, each query masked to its own. Gradient of keys and values: a program has (a tile of)
one block and loops over the queries that chose it, from lists that are made by sorting. Long lists are cut into parts,
whose sums are added in a fixed order, so there are no atomics, and no program has more than its share.

Floor: at 131,072 tokens, 2 key/value heads, top-k 8 and 62 tokens in a block of D = 32 half-precision channels, a
program of one token reads 63 KB of keys and values for 16 heads, 16.6 GB in total, all from the L2 cache (the keys and
values are 34 MB): 3 ms at 5.5 TB/s, against 0.3 ms of matrix products and 0.5 ms of exponentials. Tokens that share
blocks divide the traffic, but where they do not they multiply the exponentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...triton_dispatch import on_device_of_first_argument
from .common import LOG2_E, AttentionShapes, HeadShape, TileShape, load_matrix, query_rows, store_matrix


if TYPE_CHECKING:
    from ...coordinates import Partition


# Queries of an inverse list that one program works on.
_LIST_PART = 2048


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    output,
    log_sum,
    order,
    lists,
    members,
    counts,
    cu_blocks,
    num_tokens,
    list_width,
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
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    start = tl.program_id(0) * TOKENS
    rows, _, valid = query_rows(order, start, num_tokens, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    member = tl.arange(0, ROWS) // GROUP
    queries = load_matrix(query, rows, valid, dim, DIM)
    list_number = tl.program_id(0).to(tl.int64) * num_kv_heads + kv_head
    key += kv_head * dim
    value += kv_head * value_dim

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    for entry in range(0, tl.load(counts + list_number)):
        block = tl.load(lists + list_number * list_width + entry)
        attends = (tl.load(members + list_number * list_width + entry) >> member) & 1
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * num_kv_heads
        for begin in range(0, num_keys, KEYS):
            places = begin + tl.arange(0, KEYS)
            is_key = places < num_keys
            keys = load_matrix(key + first_row * dim, places * num_kv_heads, is_key, dim, DIM)
            values = load_matrix(value + first_row * value_dim, places * num_kv_heads, is_key, value_dim, VALUE_DIM)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if TOKENS > 1:
                scores = tl.where(is_key[None, :] & (attends == 1)[:, None], scores, float("-inf"))
                new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
                # A query that has attended to nothing yet: any finite number will do.
                offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            else:
                scores = tl.where(is_key[None, :], scores, float("-inf"))
                new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
                offset = new_largest
            weights = tl.exp2(scores * scale - offset[:, None])
            correction = tl.exp2(largest - offset)
            total = total * correction + tl.sum(weights, 1)
            attended = attended * correction[:, None]
            attended = tl.dot(weights.to(values.dtype), values, attended, input_precision=PRECISION)
            largest = new_largest

    store_matrix(output, rows, valid, attended / total[:, None], value_dim, VALUE_DIM)
    tl.store(log_sum + rows, largest + tl.log2(total), mask=valid)


@triton.jit
def _backward_query_kernel(
    query,
    key,
    value,
    output,
    log_sum,
    grad_output,
    gate,
    grad_query,
    product,
    order,
    lists,
    members,
    counts,
    cu_blocks,
    num_tokens,
    list_width,
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
    GATED: tl.constexpr,
    ADD: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    start = tl.program_id(0) * TOKENS
    rows, tokens, valid = query_rows(order, start, num_tokens, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    member = tl.arange(0, ROWS) // GROUP
    queries = load_matrix(query, rows, valid, dim, DIM)
    gradients = load_matrix(grad_output, rows, valid, value_dim, VALUE_DIM)
    outputs = load_matrix(output, rows, valid, value_dim, VALUE_DIM)
    products = tl.sum(gradients.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(product + rows, products, mask=valid)
    log_sums = tl.load(log_sum + rows, mask=valid, other=float("inf"))
    list_number = tl.program_id(0).to(tl.int64) * num_kv_heads + kv_head
    key += kv_head * dim
    value += kv_head * value_dim

    grad_queries = tl.zeros((ROWS, DIM), tl.float32)
    for entry in range(0, tl.load(counts + list_number)):
        block = tl.load(lists + list_number * list_width + entry)
        attends = (tl.load(members + list_number * list_width + entry) >> member) & 1
        first_key = tl.load(cu_blocks + block)
        num_keys = tl.load(cu_blocks + block + 1) - first_key
        first_row = first_key.to(tl.int64) * num_kv_heads
        for begin in range(0, num_keys, KEYS):
            places = begin + tl.arange(0, KEYS)
            mask = (places < num_keys)[None, :]
            keys = load_matrix(key + first_row * dim, places * num_kv_heads, places < num_keys, dim, DIM)
            values = load_matrix(
                value + first_row * value_dim, places * num_kv_heads, places < num_keys, value_dim, VALUE_DIM
            )
            if TOKENS > 1:
                mask = mask & (attends == 1)[:, None]
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            weights = tl.exp2(tl.where(mask, scores * scale - log_sums[:, None], float("-inf")))
            grad_weights = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - products[:, None])
            grad_queries = tl.dot(grad_scores.to(keys.dtype), keys, grad_queries, input_precision=PRECISION)
    grad_queries *= score_scale
    if GATED:
        grad_queries *= tl.load(gate + tokens, mask=valid, other=0.0)[:, None]
    if ADD:
        grad_queries += load_matrix(grad_query, rows, valid, dim, DIM).to(tl.float32)
    store_matrix(grad_query, rows, valid, grad_queries, dim, DIM)


@triton.jit
def _backward_key_kernel(
    query,
    key,
    value,
    log_sum,
    grad_output,
    gate,
    product,
    grad_key,
    grad_value,
    part_grad_key,
    part_grad_value,
    chooser,
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
    GATED: tl.constexpr,
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
                rows, tokens, valid = query_rows(
                    chooser, begin, last_query, kv_head, num_kv_heads, group_size, GROUP, ROWS
                )
                queries = load_matrix(query, rows, valid, dim, DIM)
                gradients = load_matrix(grad_output, rows, valid, value_dim, VALUE_DIM)
                products = tl.load(product + rows, mask=valid, other=0.0)
                # Rows that are not valid get the weight 0.
                log_sums = tl.load(log_sum + rows, mask=valid, other=float("inf"))
                scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
                weights = tl.exp2(scores * scale - log_sums[None, :])
                if GATED:
                    weights *= tl.load(gate + tokens, mask=valid, other=0.0)[None, :]
                grad_values = tl.dot(weights.to(gradients.dtype), gradients, grad_values, input_precision=PRECISION)
                grad_weights = tl.dot(values, tl.trans(gradients), input_precision=PRECISION)
                grad_scores = weights * (grad_weights - products[None, :])
                grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys, input_precision=PRECISION)

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


def query_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """Of the kernels whose programs have queries: as few tokens as fill the smallest matrix product."""
    rows, widest = max(16, heads.group), max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(rows, 32, 2 if widest <= 64 else 8, 1)
    return TileShape(rows, 64, 2, 2) if widest <= 64 else TileShape(rows, 64, 4, 1)


def query_lists(blocks: Tensor, order: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of `tokens` neighbouring queries together.

    Args:
        blocks: `[N, H_kv, k]`, -1 for none.
        order: `[N]`, which queries are neighbours.
        tokens: at most 31.

    Returns:
        Blocks `[ceil(N / tokens), H_kv, tokens * k]` int32, each once, whose bit t says that token t of the tile chose
        it `[...]` int32, and how many there are, `[ceil(N / tokens), H_kv]` int32.
    """
    num_queries, num_kv_heads, k = blocks.shape
    lists = blocks[order].int()
    if tokens == 1:
        is_block = lists >= 0
        return lists, is_block.int(), is_block.sum(2, dtype=torch.int32)
    nothing = torch.iinfo(torch.int32).max
    lists = torch.nn.functional.pad(lists, (0, 0, 0, 0, 0, -num_queries % tokens), value=-1)
    lists = lists.view(-1, tokens, num_kv_heads, k).transpose(1, 2).flatten(2)
    lists, places = torch.where(lists >= 0, lists, nothing).sort(-1)
    is_first = torch.cat([torch.ones_like(lists[..., :1], dtype=torch.bool), lists[..., 1:] != lists[..., :-1]], -1)
    run = is_first.cumsum(-1) - 1
    bits = torch.where(lists != nothing, torch.ones_like(lists) << torch.div(places, k, rounding_mode="floor"), 0)
    # Integers: the order in which they are added has no influence.
    members = torch.zeros_like(lists).scatter_add_(-1, run, bits.int())
    counts = (is_first & (lists != nothing)).sum(-1, dtype=torch.int32)
    return torch.zeros_like(lists).scatter_(-1, run, lists), members, counts


def inverse_lists(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which queries chose each block, for each key/value head.

    Segment s is head s // num_blocks and block s % num_blocks. Nothing is transferred to the host: what depends on the
    lengths of the lists has an upper bound as its size.

    Args:
        blocks: `[N, H_kv, k]`, -1 for none.
        num_blocks: of the partition.

    Returns:
        The queries, segment by segment `[N * H_kv * k]` int64; where each segment starts `[segments + 1]` int32; of
        every further part of a long list, its segment (the number of segments if there is no such part) and its number
        in the list, `[parts]` int32 each; where the further parts of each segment start, `[segments + 1]` int32.
    """
    num_kv_heads, k = blocks.shape[1:]
    device, num_segments = blocks.device, num_kv_heads * num_blocks
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    segments = torch.where(blocks >= 0, heads * num_blocks + blocks, num_segments).int()
    segments, triples = segments.flatten().sort(stable=True)
    boundaries = torch.arange(num_segments + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(segments, boundaries, out_int32=True)
    further = torch.div(starts.diff() - 1, _LIST_PART, rounding_mode="floor").clamp(min=0)
    first_parts = torch.nn.functional.pad(further.cumsum(0, dtype=torch.int32), (1, 0))
    parts = torch.arange(triples.numel() // _LIST_PART, dtype=torch.int32, device=device)
    part_segments = torch.searchsorted(first_parts[1:], parts, right=True, out_int32=True)
    part_numbers = parts - first_parts[part_segments] + 1
    return (
        torch.div(triples, num_kv_heads * k, rounding_mode="floor"),
        starts,
        part_segments,
        part_numbers,
        first_parts,
    )


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


@on_device_of_first_argument
def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: SelectionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """
    Args:
        query: `[N, H, D]`, contiguous.
        key: `[N, H_kv, D]`, contiguous, in the order of `selection`.
        value: `[N, H_kv, D_v]`, contiguous, in the order of `selection`.
        blocks: `[N, H_kv, k]` int32 or int64, distinct block numbers, then -1; rows as in `query`.
        selection: the tokens in blocks.
        scale: factor of the scores, positive.

    Returns:
        The output `[N, H, D_v]`, and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`.
    """
    heads = HeadShape.of(query, key, value)
    shape = selection.shapes.forward
    output = value.new_empty(*query.shape[:2], heads.value_dim)
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
    lists, members, counts = query_lists(blocks, selection.order, heads.tokens(shape.rows))
    if len(lists):
        _forward_kernel[len(lists), heads.num_kv_heads](
            query,
            key,
            value,
            output,
            log_sum,
            selection.order,
            lists,
            members,
            counts,
            selection.cu_seqlens,
            len(query),
            lists.shape[2],
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            **shape.arguments,
        )
    return output, log_sum


@on_device_of_first_argument
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    output: Tensor,
    log_sum: Tensor,
    grad_output: Tensor,
    selection: SelectionPlan,
    scale: float,
    gate: Tensor | None = None,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Args:
        query, key, value, blocks, selection, scale: as in `attend`.
        output, log_sum: what it returned.
        grad_output: `[N, H, D_v]`, contiguous.
        gate: `[N]` float32, factor by which the output was multiplied before `grad_output` was taken.
        grad_query: added to, in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[N, H_kv, D]` and value `[N, H_kv, D_v]`, the latter two in float32 and in
        the order of `selection`; and the product of output and gradient, summed over channels, `[N, H]` float32.
    """
    heads = HeadShape.of(query, key, value)
    product = torch.empty_like(log_sum)
    add = grad_query is not None
    grad_query = grad_query if add else torch.empty_like(query)
    grad_key = torch.empty_like(key, dtype=torch.float32)
    grad_value = torch.empty_like(value, dtype=torch.float32)
    if not len(query):
        return grad_query, grad_key, grad_value, product

    shape = selection.shapes.query_gradient
    arguments = heads.arguments(query.dtype) | {"GATED": gate is not None}
    lists, members, counts = query_lists(blocks, selection.order, heads.tokens(shape.rows))
    _backward_query_kernel[len(lists), heads.num_kv_heads](
        query,
        key,
        value,
        output,
        log_sum,
        grad_output,
        gate,
        grad_query,
        product,
        selection.order,
        lists,
        members,
        counts,
        selection.cu_seqlens,
        len(query),
        lists.shape[2],
        scale * LOG2_E,
        scale,
        **arguments,
        **shape.arguments,
        ADD=add,
    )
    del lists, members, counts

    shape = selection.shapes.key_gradient
    num_blocks = len(selection.cu_seqlens) - 1
    num_segments, key_tiles = num_blocks * heads.num_kv_heads, triton.cdiv(selection.max_seqlen, shape.keys)
    chooser, starts, part_segments, part_numbers, first_parts = inverse_lists(blocks, num_blocks)
    part_rows = key_tiles * shape.keys
    part_grad_key = grad_key.new_empty(len(part_segments), part_rows, heads.dim)
    part_grad_value = grad_key.new_empty(len(part_segments), part_rows, heads.value_dim)
    _backward_key_kernel[num_segments + len(part_segments), key_tiles](
        query,
        key,
        value,
        log_sum,
        grad_output,
        gate,
        product,
        grad_key,
        grad_value,
        part_grad_key,
        part_grad_value,
        chooser,
        starts,
        part_segments,
        part_numbers,
        selection.cu_seqlens,
        num_blocks,
        part_rows,
        scale * LOG2_E,
        scale,
        **arguments,
        **shape.arguments,
        PART=_LIST_PART,
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
    return grad_query, grad_key, grad_value, product


class SelectedAttention(torch.autograd.Function):
    """`attend` with gradients of query, key and value, all in the row order of the query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: SelectionPlan, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key[selection.order], value[selection.order]
        output, log_sum = attend(query, key, value, blocks, selection, scale)
        ctx.save_for_backward(query, key, value, blocks, output, log_sum)
        ctx.selection, ctx.scale = selection, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _, key, value, *_ = ctx.saved_tensors
        grad_query, grad_key, grad_value, _ = attend_backward(
            *ctx.saved_tensors, grad_output.contiguous(), ctx.selection, ctx.scale
        )
        inverse = ctx.selection.inverse
        return grad_query, grad_key[inverse].to(key.dtype), grad_value[inverse].to(value.dtype), None, None, None
