"""The plan of selected attention: tokens grouped by selection block, and queries in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2
from .arguments import AttentionShapes, HeadShape
from .choice_lists import most_pieces


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...coordinates import Partition


# Bytes of the buffer of the parts that queries get from each of their blocks.
_BUFFER_BYTES = 1 << 27
# Channels, of all its heads together, of a program that adds up parts.
_MOST_COLUMNS = 1024


class SelectionPlan(NamedTuple):
    """The tokens grouped by selection block, as in `Partition`, and the tile shapes.

    Attributes:
        order: `[N]` int64, the tokens grouped by block.
        inverse: `[N]` int64, the place of each token in `order`.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts in `order`.
        max_seqlen: tokens of the largest block.
        shapes: of the tiles of the three kernels.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    shapes: AttentionShapes

    @classmethod
    def of(cls, partition: Partition, shapes: AttentionShapes) -> SelectionPlan:
        """The plan of a partition into selection blocks."""
        return cls(partition.order, partition.inverse, partition.cu_seqlens, partition.max_seqlen, shapes)

    @property
    def num_blocks(self) -> int:
        """The number of selection blocks of all samples."""
        return self.cu_seqlens.shape[0] - 1


class Chunk(NamedTuple):
    """Consecutive queries whose parts fit in the buffer.

    Attributes:
        number: of the chunk.
        first, last: its first query, and the query after its last one.
        first_choice: the number of the first choice of its first query.
        most_pieces: pieces that the lists of its choices have at most.
    """

    number: int
    first: int
    last: int
    first_choice: int
    most_pieces: int


def chunks_of(shape: torch.Size, chunk_size: int, num_blocks: int, piece_size: int) -> Iterator[Chunk]:
    """The chunks of the queries.

    Args:
        shape: `[N, H_kv, k]`, of the chosen blocks.
        chunk_size: queries of a chunk.
        num_blocks: selection blocks of all samples.
        piece_size: choices of a piece.
    """
    num_queries, num_kv_heads, k = shape
    for number, first in enumerate(range(0, num_queries, chunk_size)):
        last = min(first + chunk_size, num_queries)
        num_choices = (last - first) * num_kv_heads * k
        # One more, because the choices of a chunk may start anywhere in a piece.
        pieces = most_pieces(num_choices, num_kv_heads * num_blocks, piece_size) + 1
        yield Chunk(number, first, last, first * num_kv_heads * k, pieces)


def chunk_size_of(shape: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> int:
    """The number of queries whose parts, outputs or gradients, fit in the buffer at once.

    Args:
        shape: `[N, H_kv, k]`, of the chosen blocks.
        heads: sizes.
        dtype: of the parts.
    """
    num_queries, num_kv_heads, k = shape
    bytes_of_query = num_kv_heads * k * heads.group_size * max(heads.dim, heads.value_dim) * dtype.itemsize
    # Sizes may be symbols while an operator is traced.
    return torch.sym_min(num_queries, max(1, _BUFFER_BYTES // bytes_of_query))


def head_grid(num_rows: int, heads: HeadShape, padded_dim: int) -> tuple[tuple[int, int], int]:
    """The grid of a kernel whose programs have some query heads of one row, and the number of these heads."""
    num_heads = heads.num_kv_heads * heads.group_size
    heads_of_program = min(max(1, _MOST_COLUMNS // padded_dim), next_power_of_2(num_heads))
    return (num_rows, cdiv(num_heads, heads_of_program)), heads_of_program
