"""Spatial Sparse Attention (Direct3D-S2, arXiv 2505.17412, section 3.3) in plain PyTorch: oracle and CPU path.

Every branch is a few large tensor operations. What grows with queries times keys is bounded by working on chunks of
queries, and is computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gather import gather_rows
from ..packed_attention import partitioned_attention
from ..packed_attention.reference import segment_rows, size_classes


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache
    from ..coordinates import Partition


# Elements of the largest intermediate tensors: about what fits a CPU's caches, respectively fills a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
# Queries that attend to one selection block together, as one tile.
_TILE_QUERIES = 32


def rows_per_chunk(elements_per_query: int, device: torch.device) -> int:
    """How many queries fit in a chunk, at least one."""
    return max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cpu"]) // max(1, elements_per_query))


@torch.no_grad()
def select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """The selection blocks that each query attends to.

    The probability of every compressed key, summed over the query heads that share a key/value head and over the
    compressed blocks inside each selection block, gives the score of the block; the `topk` best are taken.

    Args:
        query: `[N, H, D]`.
        compressed_key: `[M, H_kv, D]`, rows as in `cache.downsample(compression_block_size)`.
        cache: the N voxels.
        compression_block_size: edge of a compression block.
        selection_block_size: edge of a selection block, a multiple of `compression_block_size`.
        topk: blocks per query and key/value head.
        scale: factor of the scores; 1 / sqrt(D) if None.
        query_chunk_size: queries of each sample that are worked on at once; by a memory budget if None.

    Returns:
        `[N, H_kv, k]` int64, k = min(topk, most blocks of a sample): block numbers of
        `cache.partition(selection_block_size)`, best first; -1 where the sample has fewer blocks.
    """
    num_heads, num_kv_heads, device = query.shape[1], compressed_key.shape[1], query.device
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    compressed, _ = cache.downsample(compression_block_size)
    _, block_of_compressed = compressed.downsample(selection_block_size // compression_block_size)
    samples, selection = cache.batch_partition(), cache.partition(selection_block_size)

    lengths = torch.stack([cache.seqlens, compressed.seqlens, selection.batch_cu_blocks.diff().long()])
    host_lengths = torch.tensor(selection.rows_per_sample)
    longest, num_compressed = samples.max_seqlen, compressed.batch_partition().max_seqlen
    num_blocks = max(selection.blocks_per_sample, default=0)
    k = min(topk, num_blocks)
    # One row more, for the queries that fill up a chunk.
    num_queries = query.shape[0]
    chosen = torch.full((num_queries + 1, num_kv_heads, k), -1, dtype=torch.int64, device=device)
    if longest == 0:
        return chosen[:num_queries]

    # Samples are padded to a batch, longest first, so that those that reach a chunk are always the first few.
    sorted_lengths, by_length = host_lengths.sort(descending=True, stable=True)
    by_length = by_length.to(device)
    sample_starts = samples.cu_seqlens[:-1].long()[by_length]
    block_starts = selection.batch_cu_blocks[:-1].long()[by_length]
    lengths = lengths[:, by_length]
    rows, is_key = segment_rows(compressed.cu_seqlens[:-1].long()[by_length], lengths[1], num_compressed)
    # `[B, H_kv, M, D]`; rows of compressed caches are ascending, hence grouped by sample.
    dtype = torch.promote_types(query.dtype, torch.float32)
    padded_key = compressed_key[rows].to(dtype).transpose(1, 2)
    # Which compressed block lies in which selection block of its sample, `[B, 1, M, S]` of 0 and 1.
    local_block = torch.where(is_key, block_of_compressed[rows] - block_starts[:, None], -1)
    membership = (local_block[..., None] == torch.arange(num_blocks, device=device)).to(dtype)[:, None]
    is_block = torch.arange(num_blocks, device=device) < lengths[2][:, None]

    if query_chunk_size is None:
        query_chunk_size = rows_per_chunk(cache.batch_size * num_heads * num_compressed, device)
    for start in range(0, longest, query_chunk_size):
        active = int((sorted_lengths > start).sum())
        width = min(query_chunk_size, longest - start)
        positions, is_query = segment_rows(sample_starts[:active] + start, lengths[0, :active] - start, width)
        query_rows = samples.order[positions]
        # `[B, H_kv, G * width, D]`: the heads of a group are rows.
        grouped = (
            gather_rows(query.flatten(1), query_rows).to(dtype).view(active, width, num_kv_heads, -1, query.shape[2])
        )
        grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)
        with torch.autocast(device.type, enabled=False):
            scores = (grouped * scale) @ padded_key[:active].transpose(-1, -2)
            scores.masked_fill_(~is_key[:active, None, None], float("-inf"))
            probabilities = scores.softmax(-1).unflatten(2, (-1, width)).sum(2)
            block_scores = probabilities @ membership[:active]
        block_scores.masked_fill_(~is_block[:active, None, None], -1.0)
        best, blocks = block_scores.topk(k, dim=-1)
        blocks = torch.where(best >= 0, blocks + block_starts[:active, None, None, None], -1)
        chosen[torch.where(is_query, query_rows, num_queries)] = blocks.transpose(1, 2)
    return chosen[:num_queries]


class _Tiles:
    """Which tokens attend to which block: (query, key/value head, block) triples grouped by block and cut into tiles.

    A tile is a fixed number of queries that chose the same block for the same head, so that attending to the block is
    a matrix product. Iterating yields batches of tiles whose blocks are about equally long, as `(places, query_rows,
    key_rows, is_query, is_key)`: `places` is a slice of the tiles; `query_rows [T, tile]` and `key_rows [T, L]` are
    token * H_kv + head.

    Args:
        rows: `[M]` int64, the tokens whose queries are meant.
        blocks: `[M, H_kv, k]` int64, their blocks.
        selection: the partition of the tokens into blocks.
        group_size: query heads per key/value head.
    """

    def __init__(self, rows: Tensor, blocks: Tensor, selection: Partition, group_size: int):
        _, num_kv_heads, k = blocks.shape
        device, num_blocks = blocks.device, selection.coords.shape[0]
        block_starts, block_lengths = selection.cu_seqlens[:-1].long(), selection.cu_seqlens.diff().long()
        num_segments = num_kv_heads * num_blocks

        # Triples sorted by (head, block); those without a block come last.
        heads = torch.arange(num_kv_heads, device=device)[:, None]
        segment = torch.where(blocks >= 0, heads * num_blocks + blocks, num_segments).flatten()
        segment, triples = segment.sort(stable=True)
        counts = torch.bincount(segment, minlength=num_segments + 1)
        starts = counts.cumsum(0) - counts

        # Tiles, sorted by the length of their block.
        tiles = torch.div(counts[:-1] + _TILE_QUERIES - 1, _TILE_QUERIES, rounding_mode="floor")
        tile_segment = torch.repeat_interleave(tiles)
        first_tile = tiles.cumsum(0) - tiles
        lengths = block_lengths[tile_segment % num_blocks]
        lengths, order = lengths.sort(stable=True)
        number = (torch.arange(tile_segment.numel(), device=device) - first_tile[tile_segment])[order]
        segment_of_tile = tile_segment[order]
        self.head = torch.div(segment_of_tile, num_blocks, rounding_mode="floor")[:, None]
        self.key_starts, self.key_lengths = block_starts[segment_of_tile % num_blocks], lengths
        offset = number * _TILE_QUERIES
        positions, self.is_query = segment_rows(
            starts[segment_of_tile] + offset, counts[segment_of_tile] - offset, _TILE_QUERIES
        )
        tokens = rows[torch.div(triples[positions], num_kv_heads * k, rounding_mode="floor")]
        self.query_rows = tokens * num_kv_heads + self.head
        self.token_order, self.num_kv_heads = selection.order, num_kv_heads

        # Where each triple lies among the tiles, flat `[M * H_kv * k]`; 0 where there is no block.
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
        offset = torch.arange(segment.numel(), device=device) - starts[segment]
        tile = first_tile[segment.clamp(max=num_segments - 1)] + offset // _TILE_QUERIES
        place = rank[tile.clamp(max=order.numel() - 1)] * _TILE_QUERIES + offset % _TILE_QUERIES
        place = torch.where(segment < num_segments, place, 0)
        self.place = torch.empty_like(place).scatter_(0, triples, place)

        # Batches: equal size class of the block, and no more scores than the budget.
        class_sizes = size_classes(lengths).unique_consecutive(return_counts=True)[1]
        ends = class_sizes.cumsum(0)
        longest = lengths[ends - 1]
        self.batches = []
        budget = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cpu"])
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


class _SelectedAttention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp, and computes the scores again in the backward pass.

    Inside, tensors of queries are `[N * H_kv, G * D]`, the G query heads that share a key/value head side by side, and
    those of keys and values `[N * H_kv, D]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Tensor,
        selection: Partition,
        scale: float,
        query_chunk_size: int,
    ) -> Tensor:
        (num_queries, num_heads, dim), num_kv_heads, value_dim = query.shape, key.shape[1], value.shape[2]
        group_size = num_heads // num_kv_heads
        dtype = torch.promote_types(query.dtype, torch.float32)
        flat_query = query.reshape(-1, group_size * dim)
        flat_key, flat_value = key.reshape(-1, dim), value.reshape(-1, value_dim)
        output = value.new_empty(num_queries, num_kv_heads, group_size, value_dim)
        log_sum = query.new_empty(num_queries, num_kv_heads, group_size, dtype=dtype)
        # Neighbouring queries choose the same blocks, which fills the tiles.
        for rows in selection.order.split(query_chunk_size):
            chunk_blocks = blocks[rows]
            tiles = _Tiles(rows, chunk_blocks, selection, group_size)
            parts = query.new_empty(len(tiles), _TILE_QUERIES * group_size, value_dim, dtype=dtype)
            sums = query.new_empty(len(tiles), _TILE_QUERIES * group_size, 1, dtype=dtype)
            for places, query_rows, key_rows, _, is_key in tiles:
                tile_query = gather_rows(flat_query, query_rows).to(dtype).view(len(query_rows), -1, dim)
                scores = _tile_scores(tile_query, gather_rows(flat_key, key_rows).to(dtype), is_key, scale)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                torch.bmm(weights, gather_rows(flat_value, key_rows).to(dtype), out=parts[places]).div_(total)
                torch.add(largest, total.log_(), out=sums[places])
            # A query's parts are put together by their log-sum-exp: [M, H_kv, k, G].
            chunk_sums = (
                gather_rows(sums.view(-1, group_size), tiles.place).to(dtype).view(*chunk_blocks.shape, group_size)
            )
            chunk_sums.masked_fill_((chunk_blocks < 0)[..., None], float("-inf"))
            chunk_log_sum = chunk_sums.logsumexp(2)
            weights = chunk_sums.sub_(chunk_log_sum[:, :, None]).exp_()
            parts = (
                gather_rows(parts.view(-1, group_size * value_dim), tiles.place)
                .to(dtype)
                .view(*weights.shape, value_dim)
            )
            output[rows] = parts.mul_(weights[..., None]).sum(2).to(output.dtype)
            log_sum[rows] = chunk_log_sum
        output = output.flatten(1, 2)
        ctx.save_for_backward(query, key, value, blocks, output, log_sum)
        ctx.selection, ctx.scale, ctx.query_chunk_size = selection, scale, query_chunk_size
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, blocks, output, log_sum = ctx.saved_tensors
        (_, num_heads, dim), num_kv_heads, value_dim = query.shape, key.shape[1], value.shape[2]
        group_size, dtype = num_heads // num_kv_heads, log_sum.dtype
        flat_query, flat_key = query.reshape(-1, group_size * dim), key.reshape(-1, dim)
        flat_value, flat_grad = value.reshape(-1, value_dim), grad_output.reshape(-1, group_size * value_dim)
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1).view(-1, group_size)
        log_sum = log_sum.view(-1, group_size)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key = torch.zeros_like(flat_key, dtype=dtype)
        grad_value = torch.zeros_like(flat_value, dtype=dtype)
        for rows in ctx.selection.order.split(ctx.query_chunk_size):
            chunk_blocks = blocks[rows]
            tiles = _Tiles(rows, chunk_blocks, ctx.selection, group_size)
            parts = query.new_empty(len(tiles), _TILE_QUERIES * group_size, dim, dtype=dtype)
            for places, query_rows, key_rows, is_query, is_key in tiles:
                num_tiles = len(query_rows)
                tile_query = gather_rows(flat_query, query_rows).to(dtype).view(num_tiles, -1, dim)
                tile_key, tile_value = (
                    gather_rows(flat_key, key_rows).to(dtype),
                    gather_rows(flat_value, key_rows).to(dtype),
                )
                # Without a gradient, the queries that fill up a tile add nothing.
                tile_grad = (gather_rows(flat_grad, query_rows).to(dtype) * is_query[..., None]).view(
                    num_tiles, -1, value_dim
                )
                tile_delta = (gather_rows(delta, query_rows).to(dtype) * is_query[..., None]).view(num_tiles, -1, 1)
                tile_log_sum = gather_rows(log_sum, query_rows).to(dtype).view(num_tiles, -1, 1)
                weights = _tile_scores(tile_query, tile_key, is_key, ctx.scale).sub_(tile_log_sum).exp_()
                tile_grad_value = torch.bmm(weights.transpose(1, 2), tile_grad)
                grad_scores = torch.bmm(tile_grad, tile_value.transpose(1, 2))
                grad_scores.sub_(tile_delta).mul_(weights).mul_(ctx.scale)
                torch.bmm(grad_scores, tile_key, out=parts[places])
                tile_grad_key = torch.bmm(grad_scores.transpose(1, 2), tile_query)
                # Padding repeats a token, with weight zero.
                grad_key.index_add_(0, key_rows.flatten(), tile_grad_key.flatten(0, 1))
                grad_value.index_add_(0, key_rows.flatten(), tile_grad_value.flatten(0, 1))
            parts = gather_rows(parts.view(-1, group_size * dim), tiles.place).to(dtype).view(*chunk_blocks.shape, -1)
            parts.masked_fill_((chunk_blocks < 0)[..., None], 0)
            grad_query[rows] = parts.sum(2).view(-1, num_heads, dim).to(query.dtype)
        grad_key, grad_value = grad_key.view(key.shape).to(key.dtype), grad_value.view(value.shape).to(value.dtype)
        return grad_query, grad_key, grad_value, None, None, None, None


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    selection: Partition,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Attention of every query to all tokens of its blocks, differentiable (once) in `query`, `key` and `value`.

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
        query_chunk_size = rows_per_chunk(query.shape[1] * blocks.shape[-1] * value.shape[-1], query.device)
    with torch.autocast(query.device.type, enabled=False):
        return _SelectedAttention.apply(query, key, value, blocks, selection, scale, query_chunk_size)


def spatial_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    window_size: int,
    window_shift: int = 0,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `ops.spatial_sparse_attention.spatial_sparse_attention`."""
    if query.shape[0] == 0:
        return value.new_zeros(0, query.shape[1], value.shape[-1])
    samples, windows = cache.batch_partition(), cache.partition(window_size, window_shift)
    selection, (compressed, _) = cache.partition(selection_block_size), cache.downsample(compression_block_size)

    compressed_output = partitioned_attention(
        query, compressed_key, compressed_value, samples, compressed.batch_partition(), scale=scale
    )

    blocks = select_blocks(
        query,
        compressed_key,
        cache,
        compression_block_size,
        selection_block_size,
        topk,
        scale=scale,
        query_chunk_size=query_chunk_size,
    )
    selected_output = selected_attention(
        query, key, value, blocks, selection, scale=scale, query_chunk_size=query_chunk_size
    )

    window_output = partitioned_attention(query, key, value, windows, windows, scale=scale)

    compressed_gate, selected_gate, window_gate = gate[..., None, None].unbind(1)
    return compressed_gate * compressed_output + selected_gate * selected_output + window_gate * window_output
