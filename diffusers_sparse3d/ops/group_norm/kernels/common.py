"""Sizes of tiles, arguments that belong together, and functions that several group norm kernels call."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, num_multiprocessors


# Values of a tile, channels of a tile at most, and parts of a sample at most.
_TILE_VALUES = 4096
_MOST_COLUMNS = 128
MOST_PARTS = 512
# Channels that are loaded at once, at most: 16 bytes in half precision.
_MOST_VECTOR = 8


class Affine(NamedTuple):
    """The parameters of the layer: scale `weight [C]` and shift `bias [C]`."""

    weight: Tensor
    bias: Tensor


class Statistics(NamedTuple):
    """Statistics of each sample and group: `mean [B, G]` and inverse standard deviation `scale [B, G]`, float32."""

    mean: Tensor
    scale: Tensor


class Sizes(NamedTuple):
    """Compile-time constants of the kernels.

    Attributes:
        ROWS: rows of a tile.
        COLUMNS: channels of a tile.
        VECTOR: a divisor of the number of channels, so that as many can be loaded at once.
    """

    ROWS: tl.constexpr
    COLUMNS: tl.constexpr
    VECTOR: tl.constexpr


@functools.lru_cache
def _make_sizes(*sizes: int) -> Sizes:
    """The constants, made once: objects of constants take the host time."""
    return Sizes(*(tl.constexpr(size) for size in sizes))


class Tiles(NamedTuple):
    """How the kernels cut their work.

    Attributes:
        rows: rows of a tile.
        column_tiles: tiles that the channels make.
        channel_vectors: vectors of `sizes.VECTOR` channels that the channels make.
        parts: parts of each sample.
        sizes: what the kernels are compiled for.
    """

    rows: int
    column_tiles: int
    channel_vectors: int
    parts: int
    sizes: Sizes

    @classmethod
    def of(cls, feats: Tensor, batch_size: int) -> Tiles:
        """The tiles for features `[N, C]`."""
        num_rows, num_channels = feats.shape
        columns = min(_MOST_COLUMNS, next_power_of_2(num_channels))
        column_tiles = cdiv(num_channels, columns)
        rows = _TILE_VALUES // columns
        parts = cdiv(8 * num_multiprocessors(feats.device), batch_size * column_tiles)
        parts = next_power_of_2(min(parts, cdiv(num_rows, rows), MOST_PARTS))
        vector = math.gcd(num_channels, _MOST_VECTOR)
        return cls(rows, column_tiles, num_channels // vector, parts, _make_sizes(rows, columns, vector))


@triton.jit
def part_range(plan, sample, part, num_parts):
    """The places start..end of a part of a sample, in the order of the plan."""
    first = tl.load(plan.cu_rows + sample)
    last = tl.load(plan.cu_rows + sample + 1)
    share = (last - first + num_parts - 1) // num_parts
    start = tl.minimum(first + part * share, last)
    return start, tl.minimum(start + share, last)


@triton.jit
def sigmoid(values):
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def silu_gradient(gradient, normalized, weight, bias):
    """The gradient of `normalized * weight + bias`, from that of its SiLU."""
    activated = normalized * weight + bias
    slope = sigmoid(activated)
    return gradient * slope * (1.0 + activated * (1.0 - slope))
