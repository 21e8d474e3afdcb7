"""
Which triangle each pixel shows: the nearest one at its centre.

Every triangle is compared with the pixels of the small square tiles that its bounding box touches. A pixel keeps the
greatest of integers that have the nearness of a triangle in their upper and its number in their lower half, which one
atomic maximum finds, in any order and with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .projection import Screen, cross


# Pixels that are compared at a time; they take about 0.2 GB of work space on a CPU and 2 GB on a GPU.
CPU_PIXEL_CHUNK, GPU_PIXEL_CHUNK = 1 << 20, 1 << 24
# Twice the area in pixels below which a triangle is seen from its edge.
LEAST_AREA = 1e-9
# Barycentric coordinates from which on a pixel is inside: a pixel on an edge must not be missed by both sides of it.
INSIDE = -1e-4
EMPTY = -1


class _Edges(NamedTuple):
    """
    Triangles that can be seen, in the form in which pixels are compared with them.

    Attributes:
        row: `[n]` int64, their rows in the screen.
        corner: `[n, 2]`, the first corner.
        slopes: `[n, 3, 2]`, the change of the second and of the third barycentric coordinate, and that of the
            nearness, for a pixel to the right and a pixel down.
        nearness: `[n, 3]`, that of the first corner, the least and the greatest.
        tile: `[n, 2]` int64, the first tile of the bounding box.
        tiles: `[n, 2]` int64, the number of tiles along each axis.
    """

    row: Tensor
    corner: Tensor
    slopes: Tensor
    nearness: Tensor
    tile: Tensor
    tiles: Tensor


def depth_buffer(
    screen: Screen, tile_size: int = 8, is_solid: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """
    The nearest triangle at the centre of each pixel.

    Triangles that are seen from the edge or have corners that are not finite are not seen.

    Args:
        screen: the triangles.
        tile_size: edge of a tile in pixels: about that of a triangle is fastest.
        is_solid: says of some triangles `[n]` int64 and of places `[n, 2]` on the screen in them whether there is
            something of the triangle, `[n]` bool; all is solid if None.

    Returns:
        `[B * size * size]` int64, picture by picture and row by row: the bits of the nearness as float32 times 2^32,
        plus the number of the triangle; `EMPTY` where there is none.
    """
    pixels = screen.num_pictures * screen.size**2
    buffer = torch.full((pixels,), EMPTY, dtype=torch.int64, device=screen.corners.device)
    edges = _edges(screen, tile_size)
    pairs = edges.tiles.prod(1)
    ends = pairs.cumsum(0)
    chunk = (CPU_PIXEL_CHUNK if buffer.device.type == "cpu" else GPU_PIXEL_CHUNK) // tile_size**2
    for start in range(0, int(ends[-1]) if len(ends) else 0, chunk):
        index = torch.arange(start, min(start + chunk, int(ends[-1])), device=buffer.device)
        triangle = torch.searchsorted(ends, index, right=True)
        local = index - (ends - pairs)[triangle]
        columns = edges.tiles[triangle, 0]
        tile = edges.tile[triangle] + torch.stack([local % columns, local // columns], 1)
        _draw_tiles(buffer, screen, edges, triangle, tile * tile_size, tile_size, is_solid)
    return buffer


def nearness_of(buffer: Tensor) -> Tensor:
    """The nearness of each pixel of a depth buffer, float32; 0 where there is nothing."""
    return torch.where(buffer == EMPTY, 0, buffer >> 32).int().view(torch.float32)


def _edges(screen: Screen, tile_size: int) -> _Edges:
    corners = screen.corners
    # The pixels whose centres are in the bounding box.
    low = (corners.amin(1) - 0.5).ceil().clamp(min=0)
    high = (corners.amax(1) - 0.5).floor().clamp(max=screen.size - 1)
    area = cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    seen = (area.abs() > LEAST_AREA) & (high >= low).all(1) & corners.isfinite().all(2).all(1)
    row = seen.nonzero()[:, 0]
    area = area[row]
    first, second, third = corners[row].unbind(1)
    along, across = second - first, third - first
    near = screen.nearness[row]
    slope_second = torch.stack([across[:, 1] / area, -across[:, 0] / area], 1)
    slope_third = torch.stack([-along[:, 1] / area, along[:, 0] / area], 1)
    slope_near = slope_second * (near[:, 1:2] - near[:, :1]) + slope_third * (near[:, 2:] - near[:, :1])
    tile, last = (torch.div(bound[row], tile_size, rounding_mode="floor").long() for bound in (low, high))
    return _Edges(
        row=row,
        corner=first,
        slopes=torch.stack([slope_second, slope_third, slope_near], 1),
        nearness=torch.stack([near[:, 0], near.amin(1), near.amax(1)], 1),
        tile=tile,
        tiles=last - tile + 1,
    )


def _draw_tiles(
    buffer: Tensor,
    screen: Screen,
    edges: _Edges,
    triangle: Tensor,
    origin: Tensor,
    tile_size: int,
    is_solid: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    """
    Compares the pixels of tiles with a triangle each, and notes in a depth buffer what is nearer.

    Args:
        buffer: the depth buffer, changed in place.
        screen: the triangles.
        edges: those that can be seen.
        triangle: `[m]` int64, the row in `edges` of the triangle of each tile.
        origin: `[m, 2]` int64, the first pixel of each tile.
        tile_size: edge of a tile.
        is_solid: see `depth_buffer`.
    """
    steps = torch.arange(tile_size, device=buffer.device)
    x, y = origin[:, 0, None, None] + steps, origin[:, 1, None, None] + steps[:, None]
    # [m, 1, tile] and [m, tile, 1]: from the first corner to the centres of the pixels.
    corner, slopes = edges.corner[triangle, :, None, None], edges.slopes[triangle, :, :, None, None]
    right, down = x + 0.5 - corner[:, 0], y + 0.5 - corner[:, 1]
    second = slopes[:, 0, 0] * right + slopes[:, 0, 1] * down
    third = slopes[:, 1, 0] * right + slopes[:, 1, 1] * down
    inside = (second >= INSIDE) & (third >= INSIDE) & (second + third <= 1 - INSIDE)
    tile, line, column = (inside & (x < screen.size) & (y < screen.size)).nonzero().unbind(1)
    triangle = triangle[tile]
    right, down = right[tile, 0, column], down[tile, line, 0]
    first, least, greatest = edges.nearness[triangle].unbind(1)
    slope = edges.slopes[triangle, 2]
    # Slopes of thin triangles are steep, and pixels of the border beyond the corners.
    near = (first + slope[:, 0] * right + slope[:, 1] * down).clamp(least, greatest)
    row = edges.row[triangle]
    x, y = x[tile, 0, column], y[tile, line, 0]
    place = (screen.picture[row] * screen.size + y) * screen.size + x
    value = (near.view(torch.int32).long() << 32) | row
    if is_solid is not None:
        solid = is_solid(row, torch.stack([x, y], 1) + 0.5).nonzero()[:, 0]
        place, value = place[solid], value[solid]
    buffer.scatter_reduce_(0, place, value, "amax")
