"""Functions of dense volumes computed tile by tile, each tile with the margin that its result depends on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def apply_in_tiles(
    function: Callable[[Tensor], Tensor], volume: Tensor, tile_size: int, halo: int, scale: Fraction = Fraction(1)
) -> Tensor:
    """
    The result of a convolutional function, the same as of the whole volume.

    Args:
        function: of `[B, C, X, Y, Z]`; what a cell of its result depends on is near, and zeros are beyond the volume.
        volume: `[B, C, X, Y, Z]`.
        tile_size: edge of a tile in cells of the volume.
        halo: margin around a tile in cells of the volume; both are such that `scale` makes whole numbers of them.
        scale: cells of the result for each cell of the volume, along an axis.

    Returns:
        `[B, C', X * scale, Y * scale, Z * scale]`.
    """
    sizes = volume.shape[2:]
    result: Tensor | None = None
    for corner in itertools.product(*(range(0, size, tile_size) for size in sizes)):
        bounds = [(start, min(size, start + tile_size), size) for start, size in zip(corner, sizes)]
        wide = [(max(0, start - halo), min(size, end + halo)) for start, end, size in bounds]
        tile = function(_part(volume, wide))
        if result is None:
            result = tile.new_empty(*tile.shape[:2], *(int(size * scale) for size in sizes))
        scaled = [(int(start * scale), int(end * scale)) for start, end, _ in bounds]
        offsets = [int(start * scale) for start, _ in wide]
        inner = [(start - offset, end - offset) for (start, end), offset in zip(scaled, offsets)]
        _part(result, scaled).copy_(_part(tile, inner))
    assert result is not None  # the volume has cells
    return result


def apply_in_slices(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The result of a function for each sample of `batch [B, ...]` by itself."""
    return torch.cat([function(sample) for sample in batch.split(1)])


def _part(volume: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """The view of `volume [B, C, X, Y, Z]` from a start up to an end along each axis."""
    for axis, (start, end) in enumerate(bounds, start=2):
        volume = volume.narrow(axis, start, end - start)
    return volume
