"""How tiles of tokens with all their heads are read and written: what both kernels share."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...runtime.dispatch import next_power_of_2


# Values of a tile, at most, if they are not those of one token.
_TILE = 4096


@triton.jit
def tile_of_heads(
    first,
    num_rows,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Places and masks of a tile of tokens.

    Args:
        first: the first token of the tile.
        num_rows: tokens of the tensor.
        H, D: heads and channels of a head.
        HEADS, DIM: the same, padded to powers of two.
        ROWS: tokens of the tile.

    Returns:
        `[ROWS, 1, 1]` int64 tokens, `[1, HEADS, DIM]` places in a token, `[1, HEADS, DIM]` whether they exist, and
        `[ROWS, HEADS, DIM]` whether token and place exist.
    """
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    heads, channels = tl.arange(0, HEADS)[None, :, None], tl.arange(0, DIM)[None, None, :]
    exists = (heads < H) & (channels < D)
    return rows, heads * D + channels, exists, (rows < num_rows) & exists


@triton.jit
def lengths_of_heads(values):
    """`[ROWS, HEADS]` float32: the length of each head `[ROWS, HEADS, DIM]`."""
    return tl.sqrt(tl.sum(values * values, 2))


def tile_constants(heads: int, dim: int) -> dict[str, Any]:
    """The compile-time constants of a kernel for tokens of `heads` heads of `dim` channels."""
    padded = next_power_of_2(heads), next_power_of_2(dim)
    rows = max(1, _TILE // (padded[0] * padded[1]))
    return {"H": heads, "D": dim, "HEADS": padded[0], "DIM": padded[1], "ROWS": rows}
