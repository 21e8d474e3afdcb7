"""Spatial Sparse Attention (Direct3D-S2, arXiv 2505.17412, section 3.3) in plain PyTorch: oracle and CPU path.

Every branch is a few large tensor operations. What grows with tokens times keys is bounded by working on chunks of
queries; in training a chunk is recomputed in the backward pass instead of being kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..packed_attention import packed_attention
from ..packed_attention.reference import segment_rows, size_classes


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache
    from ..coordinates import Partition


# Elements of the largest intermediate tensor of a chunk of queries: 256 MiB on the CPU, 1 GiB on a GPU, in float32.
_CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}
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
    host_lengths = lengths.cpu()
    longest, num_compressed, num_blocks = host_lengths.amax(1).tolist() if cache.batch_size else (0, 0, 0)
    k = min(topk, num_blocks)
    chosen = torch.full((query.shape[0], num_kv_heads, k), -1, dtype=torch.int64, device=device)
    if longest == 0:
        return chosen

    # Samples are padded to a batch, longest first, so that those that reach a chunk are always the first few.
    by_length = host_lengths[0].argsort(descending=True, stable=True)
    sorted_lengths = host_lengths[0, by_length]
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
        grouped = query[query_rows].to(dtype).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = (grouped * scale) @ padded_key[:active].transpose(-1, -2)
        scores.masked_fill_(~is_key[:active, None, None], float("-inf"))
        probabilities = scores.softmax(-1).unflatten(2, (-1, width)).sum(2)
        block_scores = probabilities @ membership[:active]
        block_scores.masked_fill_(~is_block[:active, None, None], -1.0)
        best, blocks = block_scores.topk(k, dim=-1)
        blocks = torch.where(best >= 0, blocks + block_starts[:active, None, None, None], -1)
        chosen[query_rows[is_query]] = blocks.transpose(1, 2)[is_query]
    return chosen


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    selection: Partition,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query to all tokens of its blocks.

    (query, key/value head, block) triples are grouped by block: queries that chose the same block form tiles, a tile
    attends to its block as a matrix product, and the parts of a query are put together by their log-sum-exp.

    Args:
        query: `[M, H, D]`, any subset of the tokens.
        key: `[N, H_kv, D]`, all tokens.
        value: `[N, H_kv, D_v]`.
        blocks: `[M, H_kv, k]` int64 block numbers of `selection`, -1 where there is none.
        selection: the partition of the N tokens into blocks.
        scale: factor of the scores; 1 / sqrt(D) if None.

    Returns:
        `[M, H, D_v]` in the dtype of `value`.
    """
    num_queries, num_kv_heads, k = blocks.shape
    device, num_blocks = query.device, selection.coords.shape[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    block_starts, block_lengths = selection.cu_seqlens[:-1].long(), selection.cu_seqlens.diff().long()

    # Triples sorted by (head, block); those without a block come last.
    num_segments = num_kv_heads * num_blocks
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    segment = torch.where(blocks >= 0, heads * num_blocks + blocks, num_segments).flatten()
    segment, triples = segment.sort(stable=True)
    counts = torch.bincount(segment, minlength=num_segments + 1)
    starts = counts.cumsum(0) - counts
    tiles = torch.div(counts[:-1] + _TILE_QUERIES - 1, _TILE_QUERIES, rounding_mode="floor")
    first_tile = tiles.cumsum(0) - tiles
    tile_segment = torch.repeat_interleave(tiles)
    tile_number = torch.arange(tile_segment.numel(), device=device) - first_tile[tile_segment]
    positions, _ = segment_rows(
        starts[tile_segment] + tile_number * _TILE_QUERIES,
        counts[tile_segment] - tile_number * _TILE_QUERIES,
        _TILE_QUERIES,
    )
    tile_rows = torch.div(triples[positions], num_kv_heads * k, rounding_mode="floor")
    tile_head = torch.div(tile_segment, num_blocks, rounding_mode="floor")
    tile_block = tile_segment - tile_head * num_blocks

    # Tiles whose blocks have about the same number of tokens are one batch.
    tile_lengths = block_lengths[tile_block]
    tile_class, tile_order = size_classes(tile_lengths).sort(stable=True)
    class_sizes = tile_class.unique_consecutive(return_counts=True)[1].tolist()
    grouped_query = query.unflatten(1, (num_kv_heads, -1))
    outputs, log_sums = [], []
    for members in tile_order.split(class_sizes):
        lengths, head = tile_lengths[members], tile_head[members, None]
        key_rows, is_key = segment_rows(block_starts[tile_block[members]], lengths, int(lengths.max()))
        key_rows = selection.order[key_rows]
        tile_query = grouped_query[tile_rows[members], head].flatten(1, 2)  # [T, tile * G, D]
        scores = (tile_query @ key[key_rows, head].transpose(1, 2)).to(dtype) * scale
        scores = scores.masked_fill(~is_key[:, None], float("-inf"))
        log_sum = scores.logsumexp(-1, keepdim=True)
        output = (scores - log_sum).exp().to(value.dtype) @ value[key_rows, head]
        outputs.append(output.unflatten(1, (_TILE_QUERIES, -1)).flatten(0, 1))
        log_sums.append(log_sum.unflatten(1, (_TILE_QUERIES, -1)).flatten(0, 1).squeeze(-1))

    # Where each triple's result lies in the concatenated tiles.
    tile_place = torch.empty_like(tile_order).scatter_(0, tile_order, torch.arange(tile_order.numel(), device=device))
    num_triples = num_queries * num_kv_heads * k
    offset = torch.arange(num_triples, device=device) - starts[segment]
    tile = first_tile[segment.clamp(max=num_segments - 1)] + offset // _TILE_QUERIES
    place = tile_place[tile.clamp(max=tile_order.numel() - 1)] * _TILE_QUERIES + offset % _TILE_QUERIES
    place = torch.empty_like(place).scatter_(0, triples, torch.where(segment < num_segments, place, 0)).view_as(blocks)

    log_sums = torch.cat(log_sums)[place].masked_fill((blocks < 0)[..., None], float("-inf"))  # [M, H_kv, k, G]
    weights = log_sums.softmax(2).to(value.dtype)
    return (weights[..., None] * torch.cat(outputs)[place]).sum(2).flatten(1, 2)


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

    compressed_output = packed_attention(
        query[samples.order],
        compressed_key,
        compressed_value,
        samples.cu_seqlens,
        compressed.cu_seqlens,
        max_seqlen_q=samples.max_seqlen,
        max_seqlen_k=compressed.batch_partition().max_seqlen,
        scale=scale,
    )[samples.inverse]

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
    if query_chunk_size is None:
        tokens_per_block = query.shape[0] // selection.coords.shape[0] + 1
        elements_per_query = query.shape[1] * blocks.shape[-1] * (tokens_per_block + 2 * value.shape[-1])
        query_chunk_size = rows_per_chunk(elements_per_query, query.device)
    chunks = [
        checkpoint(selected_attention, query[rows], key, value, blocks[rows], selection, scale, use_reentrant=False)
        for rows in selection.order.split(query_chunk_size)
    ]
    selected_output = torch.cat(chunks)[selection.inverse]

    window_output = packed_attention(
        query[windows.order],
        key[windows.order],
        value[windows.order],
        windows.cu_seqlens,
        windows.cu_seqlens,
        max_seqlen_q=windows.max_seqlen,
        max_seqlen_k=windows.max_seqlen,
        scale=scale,
    )[windows.inverse]

    compressed_gate, selected_gate, window_gate = gate[..., None, None].unbind(1)
    return compressed_gate * compressed_output + selected_gate * selected_output + window_gate * window_output
