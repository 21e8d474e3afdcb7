"""Queries and keys grouped by segment, and their tiles, for the kernels of attention inside segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import AttentionShapes, HeadShape


def segment_tiles(cu_seqlens: Tensor, size: int) -> Tensor:
    """Segments cut into tiles of at most `size` rows: `[tiles, 3]` int32 (segment, first row, row after the last)."""
    lengths = cu_seqlens.diff()
    counts = torch.div(lengths + size - 1, size, rounding_mode="floor")
    segment = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    number = torch.arange(segment.numel(), device=segment.device) - first[segment]
    start = cu_seqlens[segment] + number * size
    end = torch.minimum(start + size, cu_seqlens[segment + 1])
    return torch.stack([segment, start, end], 1).int()


class SegmentPlan(NamedTuple):
    """Which queries attend to which keys; depends on the coordinates and the tile shapes alone.

    Attributes:
        order: `[N]` int64, the queries grouped by segment; None if they are.
        cu_queries: `[S + 1]` int32, where each segment starts among them.
        cu_keys: `[S + 1]` int32, the same of the keys, which are grouped already.
        query_tiles, backward_query_tiles, key_tiles: as `segment_tiles` makes them, for the three kernels.
        shapes: of the tiles.
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
        """`query_tiles` are those of the forward pass, if there are some."""
        forward_rows, backward_rows = shapes.forward.rows, shapes.query_gradient.rows
        if query_tiles is None:
            query_tiles = segment_tiles(cu_queries, heads.tokens(forward_rows))
        same = forward_rows == backward_rows
        backward_query_tiles = query_tiles if same else segment_tiles(cu_queries, heads.tokens(backward_rows))
        key_tiles = segment_tiles(cu_keys, shapes.key_gradient.keys)
        return cls(order, cu_queries, cu_keys, query_tiles, backward_query_tiles, key_tiles, shapes)
