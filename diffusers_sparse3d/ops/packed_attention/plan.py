"""Plans of the attention kernels for segments whose lengths the host does not know. They need the package triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spatial_sparse_attention.kernels.arguments import AttentionShapes, HeadShape
from ..spatial_sparse_attention.kernels.segment_plan import SegmentPlan
from ..spatial_sparse_attention.kernels.tile_shapes import shapes_for
from .kernels.segment_tiles import segment_tiles


def forward_plan(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, order_q: Tensor | None, heads: HeadShape
) -> SegmentPlan:
    """The plan of the forward pass.

    Args:
        query: `[M, H, D]`.
        cu_seqlens_q: `[S + 1]` int32, where each segment starts among the queries.
        cu_seqlens_k: `[S + 1]` int32, the same for keys and values.
        order_q: `[M]` int64, the rows of the queries grouped by segment; None if they are.
        heads: sizes of the heads.

    Returns:
        A plan without the tiles of the backward pass.
    """
    shapes = _shapes(heads, query)
    tiles = segment_tiles(cu_seqlens_q, len(query), heads.tokens(shapes.forward.rows))
    no_tiles = tiles[:0]
    return SegmentPlan(order_q, cu_seqlens_q, _with_empty_segment(cu_seqlens_k), tiles, no_tiles, no_tiles, shapes)


def backward_plan(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    order_q: Tensor | None,
    heads: HeadShape,
) -> SegmentPlan:
    """The plan of the backward pass, without the tiles of the forward pass.

    Args:
        query, cu_seqlens_q, cu_seqlens_k, order_q, heads: as in `forward_plan`.
        key: `[N, H_kv, D]`.
    """
    shapes = _shapes(heads, query)
    query_tiles = segment_tiles(cu_seqlens_q, len(query), heads.tokens(shapes.query_gradient.rows))
    key_tiles = segment_tiles(cu_seqlens_k, len(key), shapes.key_gradient.keys)
    boundaries = _with_empty_segment(cu_seqlens_q), _with_empty_segment(cu_seqlens_k)
    return SegmentPlan(order_q, *boundaries, query_tiles[:0], query_tiles, key_tiles, shapes)


def _with_empty_segment(cu_seqlens: Tensor) -> Tensor:
    """`[S + 1]` -> `[S + 2]`: one empty segment more, for tiles of rows that belong to no segment."""
    return torch.cat([cu_seqlens, cu_seqlens[-1:]])


def _shapes(heads: HeadShape, tensor: Tensor) -> AttentionShapes:
    return shapes_for(heads, tensor.dtype, tensor.device).of("window")
