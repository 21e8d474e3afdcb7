"""
Crossings of a mesh with the edges of a grid, by scan conversion of its triangles along each axis.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .block_grid import BlockGrid


# Up to so many samples per axis the crossings along all axes are found in one pass on a GPU.
ONE_PASS_RESOLUTION = 512


class CrossedEdges(NamedTuple):
    """
    Crossings of grid edges with triangles; an edge that several triangles cross occurs several times.

    Attributes:
        ends: `[2, n]` int64, the slots of the lower and the upper sample of each edge, see `BlockGrid`.
        axis: `[n]` int64, the direction of each edge.
        point: `[n, 3]` float64, the crossing point in grid spacings.
        face: `[n]` int64, the triangle.
    """

    ends: Tensor
    axis: Tensor
    point: Tensor
    face: Tensor


def crossed_edges(grid: BlockGrid, corners: Tensor) -> CrossedEdges:
    """The crossings of grid edges with triangles `corners [F, 3, 3]`, float64 in grid spacings."""
    # All axes in one pass where a GPU has little to do and each operation costs a launch; else memory counts.
    together = corners.device.type != "cpu" and grid.resolution <= ONE_PASS_RESOLUTION
    passes: list[tuple[int, ...]] = [(0, 1, 2)] if together else [(0,), (1,), (2,)]
    found = [_grid_crossings(corners, grid.resolution, axes) for axes in passes]
    base, offset, axis, face = (torch.cat(parts) for parts in zip(*found))
    step = (torch.arange(3, device=axis.device) == axis[:, None]).int()
    ends = grid.slots(torch.cat([base, base + step])).view(2, -1)
    return CrossedEdges(ends, axis, base + offset[:, None] * step, face)


def _grid_crossings(corners: Tensor, resolution: int, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The crossings of the grid lines along some axes with triangles.

    Scan conversion of each triangle, projected along an axis, finds the rows of grid points that it covers and then
    the points of each row. The work is proportional to the number of rows and crossings.

    Args:
        corners: `[F, 3, 3]` float64, triangle corners in grid spacings.
        resolution: samples per axis.
        axes: directions of the grid lines, consecutive.

    Returns:
        The crossings in the order of axes, triangles, rows and columns:

        - The lower sample of the crossed grid edge, `[n, 3]` int32.
        - The distance from it to the crossing, `[n]` float64, in [0, 1] grid spacings.
        - The direction of the edge, `[n]` int64.
        - The triangle, `[n]` int64.
    """
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= normal.norm(dim=1, keepdim=True)
    # All triangles for each axis, turned so that the lines are along the last coordinate.
    turned = torch.cat([corners.roll(-axis - 1, dims=2) for axis in axes])
    normals = torch.cat([normal.roll(-axis - 1, dims=1) for axis in axes])
    crossed = (normals[:, 2].abs() > 1e-6).nonzero()[:, 0]
    u, v = turned[crossed, :, :2].unbind(2)

    first = u.amin(dim=1).ceil().clamp(min=0).long()
    last = u.amax(dim=1).floor().clamp(max=resolution - 1).long()
    row_triangle, row = _integers_between(first, last)
    low, high = _covered(u[row_triangle], v[row_triangle], row)

    # Widened by more than a rounding error, so that no grid line passes between two adjacent triangles.
    first = (low - 1e-9).ceil().clamp(0, resolution).long()
    last = (high + 1e-9).floor().clamp(-1, resolution - 1).long()
    parent, column = _integers_between(first, last)
    row = row[parent]
    triangle = crossed[row_triangle[parent]]

    plane, corner = normals[triangle], turned[:, 0][triangle]
    rise = plane[:, 0] * (row - corner[:, 0]) + plane[:, 1] * (column - corner[:, 1])
    lowest, highest = turned[:, :, 2].aminmax(dim=1)
    height = (corner[:, 2] - rise / plane[:, 2]).clamp(lowest[triangle], highest[triangle])
    kept = ((height >= 0) & (height <= resolution - 1)).nonzero()[:, 0]
    height, row, column, triangle = height[kept], row[kept], column[kept], triangle[kept]
    level = height.floor().clamp(0, resolution - 2).int()
    axis = triangle // len(corners) + axes[0]
    # Turned back.
    order = (torch.arange(3, device=corners.device) - axis[:, None] - 1) % 3
    base = torch.stack([row.int(), column.int(), level], dim=1).gather(1, order)
    return base, height - level, axis, triangle % len(corners)


def _covered(u: Tensor, v: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """
    The lowest and the highest v at which lines of constant u are in triangles.

    Args:
        u, v: `[n, 3]` float64, the corners of a triangle for each line.
        row: `[n]` int64, the u of each line; infinite and minus infinite for a line beside its triangle.

    Returns:
        Both `[n]` float64.
    """
    next_u, next_v = u.roll(-1, dims=1), v.roll(-1, dims=1)
    row = row[:, None]
    spans = (torch.minimum(u, next_u) <= row) & (row <= torch.maximum(u, next_u))
    flat = u == next_u
    along = torch.where(flat, 0, (row - u) / torch.where(flat, 1, next_u - u))
    at = v + along * (next_v - v)
    low = torch.where(spans, torch.where(flat, torch.minimum(v, next_v), at), torch.inf).amin(dim=1)
    high = torch.where(spans, torch.where(flat, torch.maximum(v, next_v), at), -torch.inf).amax(dim=1)
    return low, high


def _integers_between(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """
    The integers of closed intervals.

    Args:
        first, last: `[n]` int64, the bounds of each interval, which is empty if `first` exceeds `last`.

    Returns:
        The interval of each integer, `[m]` int64, and the integers, `[m]` int64.
    """
    counts = (last - first + 1).clamp(min=0)
    parent = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return parent, torch.arange(len(parent), device=first.device) - starts[parent] + first[parent]
