"""What the kernels share: how query rows are addressed, tiles of segments, tile shapes, launch arguments.

Tensors stay in the layout of the model, `[N, H, D]`. A tile of queries has `tokens` consecutive tokens of some order
and, of each, the `group_size` query heads that share a key/value head, padded to a power of two: row r is head
r % GROUP of token r // GROUP. Scores are kept in base 2 (scale times log2(e)), and so is the log-sum-exp.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import dot_precision, next_power_of_2


LOG2_E = 1.4426950408889634
# The smallest edge of a matrix product.
SMALLEST = 16


@triton.jit
def query_rows(
    order,
    start,
    end,
    kv_head,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr = False,
):
    """Rows of `[N * H]` int64 of the tokens at the places start..end of `order`, and which are real.

    Without an order (None), tokens are at their places. `FULL` promises that no place is past the end.
    """
    rows = tl.arange(0, ROWS)
    places = start + rows // GROUP
    head = rows % GROUP
    if FULL:
        valid = tl.full((ROWS,), True, tl.int1) if group_size == GROUP else head < group_size
    else:
        valid = (places < end) & (head < group_size)
    token = (places if order is None else tl.load(order + places, mask=valid, other=0)).to(tl.int64)
    return token * (num_kv_heads * group_size) + kv_head * group_size + head, valid


@triton.jit
def load_matrix(pointer, rows, valid, dim: tl.constexpr, DIM: tl.constexpr):
    """Rows of a `[R, dim]` matrix, zeros where not valid and in the columns from `dim` to `DIM`."""
    columns = tl.arange(0, DIM)
    mask = valid[:, None] if dim == DIM else valid[:, None] & (columns < dim)[None, :]
    return tl.load(pointer + rows[:, None] * dim + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_matrix(pointer, rows, valid, matrix, dim: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of `load_matrix`, in the dtype of the pointer."""
    columns = tl.arange(0, DIM)
    mask = valid[:, None] if dim == DIM else valid[:, None] & (columns < dim)[None, :]
    tl.store(pointer + rows[:, None] * dim + columns[None, :], matrix.to(pointer.dtype.element_ty), mask=mask)


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


class TileShape(NamedTuple):
    """Rows of queries (tokens times padded heads) and keys of a tile, and how a program runs."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @functools.lru_cache  # noqa: B019 - few shapes, and tuples
    def arguments(self) -> dict[str, int]:
        """Compile-time arguments of a kernel with such tiles. Not to be changed."""
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class AttentionShapes(NamedTuple):
    """Of the three kernels of an attention."""

    forward: TileShape
    query_gradient: TileShape
    key_gradient: TileShape


class HeadShape(NamedTuple):
    """The sizes that a kernel is compiled for.

    Attributes:
        num_kv_heads: key/value heads.
        group_size: query heads of each.
        dim: channels of queries and keys.
        value_dim: channels of values.
    """

    num_kv_heads: int
    group_size: int
    dim: int
    value_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> HeadShape:
        return cls(key.shape[1], query.shape[1] // key.shape[1], query.shape[2], value.shape[2])

    @property
    def group(self) -> int:
        """`group_size` padded to a power of two."""
        return next_power_of_2(self.group_size)

    def tokens(self, rows: int) -> int:
        """Tokens of a tile of so many rows."""
        return rows // self.group

    def arguments(self, dtype: torch.dtype) -> dict[str, int | str]:
        """Compile-time arguments of all kernels. Not to be changed."""
        return self._arguments(dot_precision(dtype))

    @functools.lru_cache  # noqa: B019 - few shapes, and tuples
    def _arguments(self, precision: str) -> dict[str, int | str]:
        return {
            "num_kv_heads": self.num_kv_heads,
            "group_size": self.group_size,
            "dim": self.dim,
            "value_dim": self.value_dim,
            "GROUP": self.group,
            "DIM": max(SMALLEST, next_power_of_2(self.dim)),
            "VALUE_DIM": max(SMALLEST, next_power_of_2(self.value_dim)),
            "PRECISION": precision,
        }
