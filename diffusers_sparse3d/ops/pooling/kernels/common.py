"""Sizes of the tiles of the pooling kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton.language as tl

from ...runtime.dispatch import cdiv, next_power_of_2


# Values of a tile, and channels of a tile at most.
_TILE_VALUES = 2048
_MOST_COLUMNS = 128


class Sizes(NamedTuple):
    """Compile-time constants of the kernels.

    Attributes:
        CHANNELS: channels of the features.
        ROWS: rows of a tile.
        COLUMNS: channels of a tile.
        EXTRA: what is added to the number of children in the divisor: 1, or 0 for an exact mean.
    """

    CHANNELS: tl.constexpr
    ROWS: tl.constexpr
    COLUMNS: tl.constexpr
    EXTRA: tl.constexpr


@functools.lru_cache
def make_sizes(num_channels: int, exact_mean: bool) -> Sizes:
    """The constants, made once: objects of constants take the host time."""
    columns = min(_MOST_COLUMNS, next_power_of_2(num_channels))
    sizes = num_channels, _TILE_VALUES // columns, columns, int(not exact_mean)
    return Sizes(*(tl.constexpr(size) for size in sizes))


def make_grid(num_rows: int, sizes: Sizes) -> tuple[int, int]:
    """Tiles of rows, and tiles of channels."""
    return cdiv(num_rows, sizes.ROWS.value), cdiv(sizes.CHANNELS.value, sizes.COLUMNS.value)
