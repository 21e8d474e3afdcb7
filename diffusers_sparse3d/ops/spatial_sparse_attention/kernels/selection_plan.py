"""Tokens in selection blocks, and how the queries are worked on in chunks."""

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


# Bytes of the buffer of what queries get from each block.
_BUFFER_BYTES = 1 << 27
# Channels, of all its heads, of a program that adds up what is in the buffer.
_MOST_COLUMNS = 1024


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

    @property
    def num_blocks(self) -> int:
        return self.cu_seqlens.shape[0] - 1


class Chunk(NamedTuple):
    """Some queries.

    Attributes:
        number: of the chunk.
        first, last: its queries.
        first_choice: of its first query.
        most_pieces: of the lists of its choices, at most.
    """

    number: int
    first: int
    last: int
    first_choice: int
    most_pieces: int


def chunks_of(shape: torch.Size, chunk_size: int, num_blocks: int, piece_size: int) -> Iterator[Chunk]:
    """The chunks of choices `[N, H_kv, k]` of blocks."""
    num_queries, num_kv_heads, k = shape
    for number, first in enumerate(range(0, num_queries, chunk_size)):
        last = min(first + chunk_size, num_queries)
        num_choices = (last - first) * num_kv_heads * k
        # One more, as its choices may start anywhere in a piece.
        pieces = most_pieces(num_choices, num_kv_heads * num_blocks, piece_size) + 1
        yield Chunk(number, first, last, first * num_kv_heads * k, pieces)


def chunk_size_of(shape: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> int:
    """How many queries at a time leave what they get from each block, outputs or gradients, in the buffer.

    `shape` is that of the choices, `[N, H_kv, k]`.
    """
    num_queries, num_kv_heads, k = shape
    bytes_of_query = num_kv_heads * k * heads.group_size * max(heads.dim, heads.value_dim) * dtype.itemsize
    # Sizes may be symbols while an operator is traced.
    return torch.sym_min(num_queries, max(1, _BUFFER_BYTES // bytes_of_query))


def head_grid(num_rows: int, heads: HeadShape, padded_dim: int) -> tuple[tuple[int, int], int]:
    """A grid of rows and some of their heads, and how many heads that is."""
    num_heads = heads.num_kv_heads * heads.group_size
    piece = min(max(1, _MOST_COLUMNS // padded_dim), next_power_of_2(num_heads))
    return (num_rows, cdiv(num_heads, piece)), piece
