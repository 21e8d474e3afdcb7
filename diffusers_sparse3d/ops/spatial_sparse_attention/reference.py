"""Spatial Sparse Attention (Direct3D-S2, arXiv 2505.17412, section 3.3) in plain PyTorch: oracle and CPU path.

Every branch is a few large tensor operations. The number of queries times keys that are in memory at once is bounded:
queries are worked on in chunks, and scores are computed again in the backward pass. The choice of the blocks is an
operator of its own for PyTorch, because its loop depends on the data, which `torch.compile` cannot trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gather import gather_rows
from ..packed_attention import partitioned_attention
from ..packed_attention.reference import chunk_elements, segment_rows
from ..runtime.operators import operator
from .reference_selected_attention import selected_attention


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


def rows_per_chunk(elements_per_query: int, device: torch.device) -> int:
    """The number of queries whose elements fit in memory at once, at least one."""
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
    """The selection blocks that each query attends to: those with the largest scores, equation (3) of the README.

    The score of a block is the probability of its compressed keys, summed over them and over the query heads that
    share a key/value head.

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
    # If both sizes are the same, so are the blocks and their order.
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
    """The operator behind `select_blocks`, with the tensors and sizes that depend on the coordinates.

    Args:
        query: `[N, H, D]`.
        compressed_key: `[M, H_kv, D]`, grouped by sample.
        order: `[N]` int64, the queries grouped by sample.
        block_of_compressed: `[M]` int64, the selection block of each compression block; None if they are the same.
        cu_queries: `[B + 1]` int32, where each sample starts in `order`.
        cu_keys: `[B + 1]` int32, the first compressed key of each sample.
        cu_blocks: `[B + 1]` int32, the first selection block of each sample.
        queries_per_sample: the number of queries of each sample.
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
    # One more row takes the results of the queries that fill up a chunk.
    num_queries = query.shape[0]
    chosen = torch.full((num_queries + 1, num_kv_heads, k), -1, dtype=torch.int64, device=device)
    if longest == 0:
        return chosen[:num_queries]

    # Samples are padded to a batch, the longest first: those with queries in a chunk are then the first few.
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
        # `[B, 1, M, S]`, one where a compressed key lies in a selection block of its sample, else zero.
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


def plan_attention(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    window_size: int,
    window_shift: int,
) -> None:
    """Makes `cache` derive all that `spatial_sparse_attention` needs from the coordinates."""
    cache.batch_partition()
    cache.partition(window_size, window_shift)
    selection, (compressed, _) = cache.partition(selection_block_size), cache.downsample(compression_block_size)
    compressed.batch_partition()
    if compression_block_size != selection_block_size:
        compressed.downsample(selection_block_size // compression_block_size)
    # The first use transfers these to the host.
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
