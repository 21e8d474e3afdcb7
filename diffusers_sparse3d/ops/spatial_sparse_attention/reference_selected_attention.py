"""The attention of every query to the tokens of its chosen selection blocks, in plain PyTorch.

The number of queries times keys that are in memory at once is bounded: queries are worked on in chunks, and scores are
computed again in the backward pass. The loops depend on the data, which `torch.compile` cannot trace: the forward and
the backward pass are operators of their own for PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather import gather_rows
from ..packed_attention.reference import chunk_elements, segment_rows, size_classes
from ..runtime.operators import operator


if TYPE_CHECKING:
    from ..coordinates import Partition


# Exponentials of scores of this magnitude, and sums of many, are far from the limits of float32.
_LARGEST_SCORE = 60.0
# Choices of a tile, which attend to their block together.
_TILE_QUERIES = 32
# Elements of the parts of a chunk of queries, by type of device. The more queries, the better they fill their tiles.
_PARTS_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


class _Tiles:
    """The choices of some queries, sorted into lists by key/value head and block, and cut into tiles.

    A tile is a fixed number of choices of the same block for the same head, so that attending to the block is a matrix
    product. Iterating yields batches of tiles whose blocks are about equally long, as `(places, query_rows, key_rows,
    is_query, is_key)`: `places` is a slice of the tiles; `query_rows [T, tile]` and `key_rows [T, L]` are
    token * H_kv + head.

    Args:
        rows: `[M]` int64, the queries.
        blocks: `[M, H_kv, k]` int64, their chosen blocks, then -1.
        order: `[N]` int64, the tokens grouped by block.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts in `order`.
        group_size: query heads per key/value head.
    """

    def __init__(self, rows: Tensor, blocks: Tensor, order: Tensor, cu_seqlens: Tensor, group_size: int):
        _, num_kv_heads, k = blocks.shape
        device, num_blocks = blocks.device, len(cu_seqlens) - 1
        block_starts, block_lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        num_lists = num_kv_heads * num_blocks

        # Choices sorted by (head, block); places without a block come last.
        heads = torch.arange(num_kv_heads, device=device)[:, None]
        lists = torch.where(blocks >= 0, heads * num_blocks + blocks, num_lists).flatten()
        lists, choices = lists.sort(stable=True)
        counts = torch.bincount(lists, minlength=num_lists + 1)
        starts = counts.cumsum(0) - counts

        # Tiles, sorted by the length of their block.
        tiles = torch.div(counts[:-1] + _TILE_QUERIES - 1, _TILE_QUERIES, rounding_mode="floor")
        tile_list = torch.repeat_interleave(tiles)
        first_tile = tiles.cumsum(0) - tiles
        lengths = block_lengths[tile_list % num_blocks]
        lengths, by_length = lengths.sort(stable=True)
        number = (torch.arange(tile_list.numel(), device=device) - first_tile[tile_list])[by_length]
        list_of_tile = tile_list[by_length]
        self.head = torch.div(list_of_tile, num_blocks, rounding_mode="floor")[:, None]
        self.key_starts, self.key_lengths = block_starts[list_of_tile % num_blocks], lengths
        offset = number * _TILE_QUERIES
        positions, self.is_query = segment_rows(
            starts[list_of_tile] + offset, counts[list_of_tile] - offset, _TILE_QUERIES
        )
        tokens = rows[torch.div(choices[positions], num_kv_heads * k, rounding_mode="floor")]
        self.query_rows = tokens * num_kv_heads + self.head
        self.token_order, self.num_kv_heads = order, num_kv_heads

        # The place of each choice among those of the tiles, `[M * H_kv * k]`; 0 where there is no block.
        rank = torch.empty_like(by_length).scatter_(0, by_length, torch.arange(by_length.numel(), device=device))
        offset = torch.arange(lists.numel(), device=device) - starts[lists]
        tile = first_tile[lists.clamp(max=num_lists - 1)] + offset // _TILE_QUERIES
        place = rank[tile.clamp(max=by_length.numel() - 1)] * _TILE_QUERIES + offset % _TILE_QUERIES
        place = torch.where(lists < num_lists, place, 0)
        self.place = torch.empty_like(place).scatter_(0, choices, place)

        # A batch has blocks of one size class, and no more scores than the budget.
        class_sizes = size_classes(lengths).unique_consecutive(return_counts=True)[1]
        ends = class_sizes.cumsum(0)
        longest = lengths[ends - 1]
        self.batches = []
        budget = chunk_elements(device)
        for end, size, width in zip(ends.tolist(), class_sizes.tolist(), longest.tolist()):
            step = max(1, budget // (_TILE_QUERIES * group_size * width))
            for start in range(end - size, end, step):
                self.batches.append((slice(start, min(start + step, end)), width))

    def __len__(self) -> int:
        return self.head.shape[0]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        for tiles, width in self.batches:
            key_rows, is_key = segment_rows(self.key_starts[tiles], self.key_lengths[tiles], width)
            key_rows = self.token_order[key_rows] * self.num_kv_heads + self.head[tiles]
            yield tiles, self.query_rows[tiles], key_rows, self.is_query[tiles], is_key


def _tile_scores(tile_query: Tensor, tile_key: Tensor, is_key: Tensor, scale: float) -> Tensor:
    """`[T, tile * G, D]` and `[T, L, D]` -> scaled scores `[T, tile * G, L]`, minus infinity for padding."""
    padding = torch.zeros_like(is_key, dtype=tile_key.dtype).masked_fill_(~is_key, float("-inf"))
    return torch.baddbmm(padding[:, None], tile_query, tile_key.transpose(1, 2), alpha=scale)


def _longest(vectors: Tensor) -> Tensor:
    """The largest norm of vectors `[..., D]`, a scalar; not a number if one of them is none."""
    return torch.linalg.vector_norm(vectors, dim=-1).amax()


@operator("diffusers_sparse3d::selected_attention", kept_by_checkpoints=True, mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    order: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    query_chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The operator behind `selected_attention`.

    Inside, queries are `[N * H_kv, G * D]`, the G query heads that share a key/value head side by side, and keys and
    values are `[N * H_kv, D]`.

    Args:
        query, key, value, blocks, scale, query_chunk_size: as in `selected_attention`.
        order, cu_seqlens: the tokens grouped by selection block, see `Partition`.

    Returns:
        The output `[N, H, D_v]`, and the log-sum-exp of the scores `[N, H_kv, G]`.
    """
    (num_queries, num_heads, dim), num_kv_heads, value_dim = query.shape, key.shape[1], value.shape[2]
    group_size = num_heads // num_kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = value.new_empty(num_queries, num_kv_heads, group_size, value_dim)
    log_sum = query.new_empty(num_queries, num_kv_heads, group_size, dtype=dtype)
    query, key, value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    # If no score can be large, exponentials need not be relative to the largest one.
    is_bounded = num_queries > 0 and bool(_longest(query) * _longest(key) < _LARGEST_SCORE)
    flat_query = query.reshape(-1, group_size * dim)
    flat_key, flat_value = key.reshape(-1, dim), value.reshape(-1, value_dim)
    # Neighbouring queries choose the same blocks, which fills the tiles.
    for rows in order.split(query_chunk_size):
        chunk_blocks = blocks[rows]
        tiles = _Tiles(rows, chunk_blocks, order, cu_seqlens, group_size)
        parts = flat_query.new_empty(len(tiles), _TILE_QUERIES * group_size, value_dim)
        sums = flat_query.new_empty(len(tiles), _TILE_QUERIES * group_size, 1)
        for places, query_rows, key_rows, _, is_key in tiles:
            tile_query = gather_rows(flat_query, query_rows).view(len(query_rows), -1, dim)
            scores = torch.bmm(tile_query, gather_rows(flat_key, key_rows).transpose(1, 2))
            # Keys that fill up a block repeat one of it: they change no maximum, and count nothing in the sums.
            largest = None if is_bounded else scores.amax(-1, keepdim=True)
            weights = (scores if largest is None else scores.sub_(largest)).exp_()
            total = weights.mul_(is_key[:, None].to(dtype)).sum(-1, keepdim=True)
            part = torch.bmm(weights, gather_rows(flat_value, key_rows), out=parts[places])
            torch.log(total, out=sums[places])
            if largest is not None:
                part.div_(total)
                sums[places] += largest
        # The log-sum-exp of each part weighs it, unless the parts are sums already: [M, H_kv, k, G].
        chunk_sums = gather_rows(sums.view(-1, group_size), tiles.place).view(*chunk_blocks.shape, group_size)
        is_missing = (chunk_blocks < 0)[..., None]
        chunk_sums.masked_fill_(is_missing, float("-inf"))
        chunk_log_sum = chunk_sums.logsumexp(2)
        if is_bounded:
            chunk_sums.masked_fill_(~is_missing, 0.0)
        weights = chunk_sums.sub_(chunk_log_sum[:, :, None]).exp_()
        # The weighted sum over k of the parts of each query head, without a copy of the parts.
        heads = torch.arange(group_size, device=query.device)[:, None]
        part_rows = tiles.place.view(-1, 1, chunk_blocks.shape[2]) * group_size + heads
        chunk_output = F.embedding_bag(
            part_rows.flatten(0, 1),
            parts.view(-1, value_dim),
            mode="sum",
            per_sample_weights=weights.movedim(-1, 2).flatten(0, 2),
        )
        output[rows] = chunk_output.view(-1, num_kv_heads, group_size, value_dim).to(output.dtype)
        log_sum[rows] = chunk_log_sum
    return output.flatten(1, 2), log_sum


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    (num_queries, num_heads, _), num_kv_heads = query.shape, key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        value.new_empty(num_queries, num_heads, value.shape[2]),
        query.new_empty(num_queries, num_kv_heads, num_heads // num_kv_heads, dtype=dtype),
    )


@operator("diffusers_sparse3d::selected_attention_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    order: Tensor,
    cu_seqlens: Tensor,
    output: Tensor,
    log_sum: Tensor,
    scale: float,
    query_chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Scores are computed again, and weights from the log-sum-exp."""
    (_, num_heads, dim), num_kv_heads, value_dim = query.shape, key.shape[1], value.shape[2]
    group_size, dtype = num_heads // num_kv_heads, log_sum.dtype
    flat_query, flat_key = query.reshape(-1, group_size * dim), key.reshape(-1, dim)
    flat_value, flat_grad = value.reshape(-1, value_dim), grad_output.reshape(-1, group_size * value_dim)
    delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1).view(-1, group_size)
    log_sum = log_sum.view(-1, group_size)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros_like(flat_key, dtype=dtype)
    grad_value = torch.zeros_like(flat_value, dtype=dtype)
    for rows in order.split(query_chunk_size):
        chunk_blocks = blocks[rows]
        tiles = _Tiles(rows, chunk_blocks, order, cu_seqlens, group_size)
        parts = query.new_empty(len(tiles), _TILE_QUERIES * group_size, dim, dtype=dtype)
        for places, query_rows, key_rows, is_query, is_key in tiles:
            num_tiles = len(query_rows)
            tile_query = gather_rows(flat_query, query_rows).to(dtype).view(num_tiles, -1, dim)
            tile_key, tile_value = (
                gather_rows(flat_key, key_rows).to(dtype),
                gather_rows(flat_value, key_rows).to(dtype),
            )
            # Queries that fill up a tile have a gradient of zero, so that they add nothing.
            tile_grad = (gather_rows(flat_grad, query_rows).to(dtype) * is_query[..., None]).view(
                num_tiles, -1, value_dim
            )
            tile_delta = (gather_rows(delta, query_rows).to(dtype) * is_query[..., None]).view(num_tiles, -1, 1)
            tile_log_sum = gather_rows(log_sum, query_rows).to(dtype).view(num_tiles, -1, 1)
            weights = _tile_scores(tile_query, tile_key, is_key, scale).sub_(tile_log_sum).exp_()
            tile_grad_value = torch.bmm(weights.transpose(1, 2), tile_grad)
            grad_scores = torch.bmm(tile_grad, tile_value.transpose(1, 2))
            grad_scores.sub_(tile_delta).mul_(weights).mul_(scale)
            torch.bmm(grad_scores, tile_key, out=parts[places])
            tile_grad_key = torch.bmm(grad_scores.transpose(1, 2), tile_query)
            # Keys that fill up a block repeat a token, with weight zero.
            grad_key.index_add_(0, key_rows.flatten(), tile_grad_key.flatten(0, 1))
            grad_value.index_add_(0, key_rows.flatten(), tile_grad_value.flatten(0, 1))
        parts = gather_rows(parts.view(-1, group_size * dim), tiles.place).to(dtype).view(*chunk_blocks.shape, -1)
        # Places without a block point to the part of another query.
        parts.masked_fill_((chunk_blocks < 0)[..., None], 0)
        grad_query[rows] = parts.sum(2).view(-1, num_heads, dim).to(query.dtype)
    grad_key, grad_value = grad_key.view(key.shape).to(key.dtype), grad_value.view(value.shape).to(value.dtype)
    return grad_query, grad_key, grad_value


@_attend_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.query_chunk_size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad_output.device.type, enabled=False):
        gradients = _attend_backward(grad_output, *ctx.saved_tensors, ctx.scale, ctx.query_chunk_size)
    return *gradients, *(None,) * 5


_attend.register_autograd(_gradients, setup_context=_keep)


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    selection: Partition,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Attention of every query to all tokens of its chosen blocks: equation (4) of the README.

    Differentiable (once) in `query`, `key` and `value`.

    Args:
        query: `[N, H, D]`.
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        blocks: `[N, H_kv, k]` int64, distinct block numbers of `selection` for each query and head, at least one; -1
            where there are no more.
        selection: the partition of the N tokens into blocks.
        scale: factor of the scores; 1 / sqrt(D) if None.
        query_chunk_size: queries that are worked on at once; by a memory budget if None.

    Returns:
        `[N, H, D_v]` in the dtype of `value`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query_chunk_size is None:
        elements = query.shape[1] * blocks.shape[-1] * value.shape[-1]
        query_chunk_size = max(1, _PARTS_ELEMENTS.get(query.device.type, _PARTS_ELEMENTS["cpu"]) // elements)
    plan = (selection.order, selection.cu_seqlens)
    with torch.autocast(query.device.type, enabled=False):
        return _attend(query, key, value, blocks, *plan, scale, query_chunk_size)[0]
