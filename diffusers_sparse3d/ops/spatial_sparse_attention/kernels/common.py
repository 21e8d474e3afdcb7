"""Functions that all kernels share: how the rows of a tile of queries are found, loaded and stored.

Tensors stay in the layout of the model, `[N, H, D]`. A tile of queries has consecutive tokens of some order and, of
each token, the `group_size` query heads that share a key/value head, padded to a power of two: row r of the tile is
head r % GROUP of token r // GROUP.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_rows(order, start, end, kv_head, heads, ROWS: tl.constexpr, FULL: tl.constexpr = False):
    """The rows of the query, as a matrix `[N * H, D]`, that a tile of queries holds.

    Args:
        order: `[N]` int64, the tokens in some order; None where tokens are at their places.
        start, end: the first place of the tile in `order`, and the place after the last one of its segment.
        kv_head: the key/value head of the tile.
        heads: `HeadConstants`.
        ROWS: rows of the tile.
        FULL: promises that no place of the tile is past the end.

    Returns:
        `[ROWS]` int64 rows, and `[ROWS]` whether they exist.
    """
    # [ROWS]
    rows = tl.arange(0, ROWS)
    places = start + rows // heads.GROUP
    head = rows % heads.GROUP
    if FULL:
        valid = tl.full((ROWS,), True, tl.int1) if heads.group_size == heads.GROUP else head < heads.group_size
    else:
        valid = (places < end) & (head < heads.group_size)
    token = (places if order is None else tl.load(order + places, mask=valid, other=0)).to(tl.int64)
    return token * (heads.num_kv_heads * heads.group_size) + kv_head * heads.group_size + head, valid


@triton.jit
def load_matrix(pointer, rows, valid, dim: tl.constexpr, DIM: tl.constexpr):
    """`[ROWS, DIM]`: rows of a matrix of `dim` columns, zeros where not `valid` and in the columns from `dim` on."""
    columns = tl.arange(0, DIM)
    mask = valid[:, None] if dim == DIM else valid[:, None] & (columns < dim)[None, :]
    return tl.load(pointer + rows[:, None] * dim + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_matrix(pointer, rows, valid, matrix, dim: tl.constexpr, DIM: tl.constexpr):
    """Stores `matrix` `[ROWS, DIM]` where `load_matrix` would load it from, in the dtype of the pointer."""
    columns = tl.arange(0, DIM)
    mask = valid[:, None] if dim == DIM else valid[:, None] & (columns < dim)[None, :]
    tl.store(pointer + rows[:, None] * dim + columns[None, :], matrix.to(pointer.dtype.element_ty), mask=mask)
