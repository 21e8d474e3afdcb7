"""Spatial Sparse Attention (Direct3D-S2, arXiv 2505.17412, section 3.3) in plain PyTorch: oracle and CPU path.

Every branch is a few large tensor operations. What grows with queries times keys is bounded by working on chunks of
queries, and is computed again in the backward pass instead of being kept. The choice of the blocks and the attention
to them are operators of their own for PyTorch: their loops depend on the data, which `torch.compile` cannot trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather import gather_rows
from ..packed_attention import partitioned_attention
from ..packed_attention.reference import chunk_elements, segment_rows, size_classes
from ..runtime.operators import operator


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache
    from ..coordinates import Partition


# Queries that attend to one selection block together, as one tile.
_TILE_QUERIES = 32
# Elements of the partial results of a chunk of queries. The more queries, the better they fill their tiles.
_PARTS_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


def rows_per_chunk(elements_per_query: int, device: torch.device) -> int:
    """How many queries fit in a chunk, at least one."""
    return max(1, chunk_elements(device) // max(1, elements_per_query))


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
    compressed, _ = cache.downsample(compression_block_size)
    # Blocks of the same size are the same blocks in the same order.
    block_of_compressed = None
    if compression_block_size != selection_block_size:
        _, block_of_compressed = compressed.downsample(selection_block_size // compression_block_size)
    samples, selection = cache.batch_partition(), cache.partition(selection_block_size)
    return _select_blocks(
        query.detach(),
        compressed_key.detach(),
        samples.order,
        block_of_compressed,
        samples.cu_seqlens,
        compressed.cu_seqlens,
        selection.batch_cu_blocks,
        selection.rows_per_sample,
        compressed.batch_partition().max_seqlen,
        selection.most_blocks,
        topk,
        query.shape[-1] ** -0.5 if scale is None else scale,
        0 if query_chunk_size is None else query_chunk_size,
    )


@operator(
    "diffusers_sparse3d::select_blocks",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor compressed_key, Tensor order, Tensor? block_of_compressed, "
        "Tensor cu_queries, Tensor cu_keys, Tensor cu_blocks, SymInt[] queries_per_sample, SymInt most_keys, "
        "SymInt most_blocks, SymInt topk, float scale, SymInt query_chunk_size) -> Tensor"
    ),
)
def _select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    order: Tensor,
    block_of_compressed: Tensor | None,
    cu_queries: Tensor,
    cu_keys: Tensor,
    cu_blocks: Tensor,
    queries_per_sample: Sequence[int],
    most_keys: int,
    most_blocks: int,
    topk: int,
    scale: float,
    query_chunk_size: int,
) -> Tensor:
    """What `select_blocks` does, with what it takes from the coordinates.

    Args:
        query: `[N, H, D]`.
        compressed_key: `[M, H_kv, D]`, grouped by sample.
        order: `[N]` int64, the queries grouped by sample.
        block_of_compressed: `[M]` int64, the selection block of each compression block; None if they are the same.
        cu_queries: `[B + 1]` int32, where each sample starts in `order`.
        cu_keys: `[B + 1]` int32, the same of compressed keys.
        cu_blocks: `[B + 1]` int32, the same of selection blocks.
        queries_per_sample: lengths of `cu_queries` on the host.
        most_keys: compressed keys of a sample at most.
        most_blocks: blocks of a sample at most.
        topk: blocks per query and key/value head.
        scale: factor of the scores.
        query_chunk_size: queries of each sample that are worked on at once; 0: by a memory budget.

    Returns:
        `[N, H_kv, min(topk, most_blocks)]` int64.
    """
    num_heads, num_kv_heads, device = query.shape[1], compressed_key.shape[1], query.device
    batch_size, longest, k = len(queries_per_sample), max(queries_per_sample, default=0), min(topk, most_blocks)
    # One row more, for the queries that fill up a chunk.
    num_queries = query.shape[0]
    chosen = torch.full((num_queries + 1, num_kv_heads, k), -1, dtype=torch.int64, device=device)
    if longest == 0:
        return chosen[:num_queries]

    # Samples are padded to a batch, longest first, so that those that reach a chunk are always the first few.
    sorted_lengths, by_length = torch.tensor(queries_per_sample).sort(descending=True, stable=True)
    by_length = by_length.to(device)
    query_starts, key_starts, block_starts = (
        boundaries[:-1].long()[by_length] for boundaries in (cu_queries, cu_keys, cu_blocks)
    )
    query_lengths, key_lengths, block_lengths = (
        boundaries.diff().long()[by_length] for boundaries in (cu_queries, cu_keys, cu_blocks)
    )
    rows, is_key = segment_rows(key_starts, key_lengths, most_keys)
    # `[B, H_kv, M, D]`; rows of compressed caches are ascending, hence grouped by sample.
    dtype = torch.promote_types(query.dtype, torch.float32)
    padded_key = compressed_key[rows].to(dtype).transpose(1, 2)
    has_padding, membership = batch_size > 1, None
    if block_of_compressed is not None:
        # Which compressed block lies in which selection block of its sample, `[B, 1, M, S]` of 0 and 1.
        local_block = torch.where(is_key, block_of_compressed[rows] - block_starts[:, None], -1)
        membership = (local_block[..., None] == torch.arange(most_blocks, device=device)).to(dtype)[:, None]
    is_block = torch.arange(most_blocks, device=device) < block_lengths[:, None]

    chunk = query_chunk_size or rows_per_chunk(batch_size * num_heads * most_keys, device)
    for start in range(0, longest, chunk):
        active = int((sorted_lengths > start).sum())
        width = min(chunk, longest - start)
        positions, is_query = segment_rows(query_starts[:active] + start, query_lengths[:active] - start, width)
        query_rows = order[positions]
        # `[B, H_kv, G * width, D]`: the heads of a group are rows.
        grouped = (
            gather_rows(query.flatten(1), query_rows).to(dtype).view(active, width, num_kv_heads, -1, query.shape[2])
        )
        grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)
        with torch.autocast(device.type, enabled=False):
            scores = (grouped * scale) @ padded_key[:active].transpose(-1, -2)
            if has_padding:
                scores.masked_fill_(~is_key[:active, None, None], float("-inf"))
            block_scores = scores.softmax(-1).unflatten(2, (-1, width)).sum(2)
            if membership is not None:
                block_scores = block_scores @ membership[:active]
        if has_padding:
            block_scores.masked_fill_(~is_block[:active, None, None], -1.0)
        best, blocks = block_scores.topk(k, dim=-1)
        blocks = torch.where(best >= 0, blocks + block_starts[:active, None, None, None], -1)
        chosen[torch.where(is_query, query_rows, num_queries)] = blocks.transpose(1, 2)
    return chosen[:num_queries]


@_select_blocks.register_fake
def _(query: Tensor, compressed_key: Tensor, *plan: Any) -> Tensor:
    *_, most_blocks, topk, _, _ = plan
    return query.new_empty(
        query.shape[0], compressed_key.shape[1], torch.sym_min(topk, most_blocks), dtype=torch.int64
    )


class _Tiles:
    """Which tokens attend to which block: (query, key/value head, block) triples grouped by block and cut into tiles.

    A tile is a fixed number of queries that chose the same block for the same head, so that attending to the block is
    a matrix product. Iterating yields batches of tiles whose blocks are about equally long, as `(places, query_rows,
    key_rows, is_query, is_key)`: `places` is a slice of the tiles; `query_rows [T, tile]` and `key_rows [T, L]` are
    token * H_kv + head.

    Args:
        rows: `[M]` int64, the tokens whose queries are meant.
        blocks: `[M, H_kv, k]` int64, their blocks.
        order: `[N]` int64, the tokens grouped by block.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts in `order`.
        group_size: query heads per key/value head.
    """

    def __init__(self, rows: Tensor, blocks: Tensor, order: Tensor, cu_seqlens: Tensor, group_size: int):
        _, num_kv_heads, k = blocks.shape
        device, num_blocks = blocks.device, len(cu_seqlens) - 1
        block_starts, block_lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
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
        lengths, by_length = lengths.sort(stable=True)
        number = (torch.arange(tile_segment.numel(), device=device) - first_tile[tile_segment])[by_length]
        segment_of_tile = tile_segment[by_length]
        self.head = torch.div(segment_of_tile, num_blocks, rounding_mode="floor")[:, None]
        self.key_starts, self.key_lengths = block_starts[segment_of_tile % num_blocks], lengths
        offset = number * _TILE_QUERIES
        positions, self.is_query = segment_rows(
            starts[segment_of_tile] + offset, counts[segment_of_tile] - offset, _TILE_QUERIES
        )
        tokens = rows[torch.div(triples[positions], num_kv_heads * k, rounding_mode="floor")]
        self.query_rows = tokens * num_kv_heads + self.head
        self.token_order, self.num_kv_heads = order, num_kv_heads

        # Where each triple lies among the tiles, flat `[M * H_kv * k]`; 0 where there is no block.
        rank = torch.empty_like(by_length).scatter_(0, by_length, torch.arange(by_length.numel(), device=device))
        offset = torch.arange(segment.numel(), device=device) - starts[segment]
        tile = first_tile[segment.clamp(max=num_segments - 1)] + offset // _TILE_QUERIES
        place = rank[tile.clamp(max=by_length.numel() - 1)] * _TILE_QUERIES + offset % _TILE_QUERIES
        place = torch.where(segment < num_segments, place, 0)
        self.place = torch.empty_like(place).scatter_(0, triples, place)

        # Batches: equal size class of the block, and no more scores than the budget.
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


@operator("diffusers_sparse3d::selected_attention", mutates_args=())
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
    """What `selected_attention` does, and the log-sum-exp `[N, H_kv, G]`.

    Inside, tensors of queries are `[N * H_kv, G * D]`, the G query heads that share a key/value head side by side, and
    those of keys and values `[N * H_kv, D]`. `order` and `cu_seqlens` are those of the selection blocks.
    """
    (num_queries, num_heads, dim), num_kv_heads, value_dim = query.shape, key.shape[1], value.shape[2]
    group_size = num_heads // num_kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    flat_query = query.reshape(-1, group_size * dim)
    flat_key, flat_value = key.reshape(-1, dim), value.reshape(-1, value_dim)
    output = value.new_empty(num_queries, num_kv_heads, group_size, value_dim)
    log_sum = query.new_empty(num_queries, num_kv_heads, group_size, dtype=dtype)
    # Neighbouring queries choose the same blocks, which fills the tiles.
    for rows in order.split(query_chunk_size):
        chunk_blocks = blocks[rows]
        tiles = _Tiles(rows, chunk_blocks, order, cu_seqlens, group_size)
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
        # The weighted sum over k of the parts of each query head, without a copy of them.
        heads = torch.arange(group_size, device=query.device)[:, None]
        places = tiles.place.view(-1, 1, chunk_blocks.shape[2]) * group_size + heads
        chunk_output = F.embedding_bag(
            places.flatten(0, 1),
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
    """Gradients of query, key and value; computes the scores again, from the log-sum-exp."""
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
            # Without a gradient, the queries that fill up a tile add nothing.
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
            # Padding repeats a token, with weight zero.
            grad_key.index_add_(0, key_rows.flatten(), tile_grad_key.flatten(0, 1))
            grad_value.index_add_(0, key_rows.flatten(), tile_grad_value.flatten(0, 1))
        parts = gather_rows(parts.view(-1, group_size * dim), tiles.place).to(dtype).view(*chunk_blocks.shape, -1)
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
        elements = query.shape[1] * blocks.shape[-1] * value.shape[-1]
        query_chunk_size = max(1, _PARTS_ELEMENTS.get(query.device.type, _PARTS_ELEMENTS["cpu"]) // elements)
    plan = (selection.order, selection.cu_seqlens)
    with torch.autocast(query.device.type, enabled=False):
        return _attend(query, key, value, blocks, *plan, scale, query_chunk_size)[0]


def plan_attention(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    window_size: int,
    window_shift: int,
) -> None:
    """Have `cache` derive all that `spatial_sparse_attention` takes from the coordinates."""
    cache.batch_partition()
    cache.partition(window_size, window_shift)
    selection, (compressed, _) = cache.partition(selection_block_size), cache.downsample(compression_block_size)
    compressed.batch_partition()
    if compression_block_size != selection_block_size:
        compressed.downsample(selection_block_size // compression_block_size)
    # Transferred to the host at the first use.
    _ = selection.rows_per_sample, selection.most_blocks


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
    """The sum of the three branches; arguments and result as in `api.spatial_sparse_attention`."""
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
    output = torch.addcmul(compressed_gate * compressed_output, selected_gate, selected_output)
    return torch.addcmul(output, window_gate, window_output)
