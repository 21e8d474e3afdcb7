"""The plan of attention inside segments: queries and keys grouped by window or by sample, and their tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import AttentionShapes, HeadShape


def segment_tiles(cu_seqlens: Tensor, size: int) -> Tensor:
    """Segments cut into tiles.

    Args:
        cu_seqlens: `[S + 1]` int32, where each segment starts.
        size: places of a tile at most.

    Returns:
        `[tiles, 3]` int32: segment, first place, place after the last.
    """
    lengths = cu_seqlens.diff()
    counts = torch.div(lengths + size - 1, size, rounding_mode="floor")
    segment = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    number = torch.arange(segment.numel(), device=segment.device) - first[segment]
    start = cu_seqlens[segment] + number * size
    end = torch.minimum(start + size, cu_seqlens[segment + 1])
    return torch.stack([segment, start, end], 1).int()


class SegmentPlan(NamedTuple):
    """Queries and keys in segments, and their tiles; depends on the coordinates and the tile shapes alone.

    Attributes:
        order: `[N]` int64, the queries grouped by segment; None if they are.
        cu_queries: `[S + 1]` int32, where the queries of each segment start in `order`.
        cu_keys: `[S + 1]` int32, where the keys of each segment start; keys are grouped by segment.
        query_tiles: see `segment_tiles`; tiles of queries of the forward kernel.
        backward_query_tiles: tiles of queries of the kernel of their gradient.
        key_tiles: tiles of keys of the kernel of their gradient.
        shapes: of the tiles of the three kernels.
    """

    order: Tensor | None
    cu_queries: Tensor
    cu_keys: Tensor
    query_tiles: Tensor
    backward_query_tiles: Tensor
    key_tiles: Tensor
    shapes: AttentionShapes

    @classmethod
    def make(
        cls,
        order: Tensor | None,
        cu_queries: Tensor,
        cu_keys: Tensor,
        heads: HeadShape,
        shapes: AttentionShapes,
        query_tiles: Tensor | None = None,
    ) -> SegmentPlan:
        """The plan of segments.

        Args:
            order, cu_queries, cu_keys, shapes: see the attributes.
            heads: sizes.
            query_tiles: tiles of queries of the forward kernel, if they exist already.
        """
        forward_rows, backward_rows = shapes.forward.rows, shapes.query_gradient.rows
        if query_tiles is None:
            query_tiles = segment_tiles(cu_queries, heads.tokens(forward_rows))
        same = forward_rows == backward_rows
        backward_query_tiles = query_tiles if same else segment_tiles(cu_queries, heads.tokens(backward_rows))
        key_tiles = segment_tiles(cu_keys, shapes.key_gradient.keys)
        return cls(order, cu_queries, cu_keys, query_tiles, backward_query_tiles, key_tiles, shapes)
