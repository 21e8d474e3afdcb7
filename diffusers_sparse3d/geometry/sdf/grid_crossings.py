"""
Crossings of a mesh with the edges of a grid, by scan conversion of its triangles along each axis.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .block_grid import BlockGrid


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
    ends, axes, points, faces = [], [], [], []
    for axis in range(3):
        base, offset, face = _grid_crossings(corners, grid.resolution, axis)
        step = torch.eye(3, dtype=torch.int32, device=base.device)[axis]
        ends.append(torch.stack([grid.slots(base), grid.slots(base + step)]))
        axes.append(torch.full_like(face, axis))
        points.append(base + offset[:, None] * step)
        faces.append(face)
    return CrossedEdges(torch.cat(ends, dim=1), torch.cat(axes), torch.cat(points), torch.cat(faces))


def _grid_crossings(corners: Tensor, resolution: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    The crossings of the grid lines along one axis with triangles.

    Scan conversion of each triangle, projected along the axis, finds the rows of grid points that it covers and then
    the points of each row. The work is proportional to the number of rows and crossings.

    Args:
        corners: `[F, 3, 3]` float64, triangle corners in grid spacings.
        resolution: samples per axis.
        axis: direction of the grid lines.

    Returns:
        - The lower sample of the crossed grid edge, `[n, 3]` int32.
        - The distance from it to the crossing, `[n]` float64, in [0, 1] grid spacings.
        - The triangle, `[n]` int64.
    """
    u_axis, v_axis = (axis + 1) % 3, (axis + 2) % 3
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= normal.norm(dim=1, keepdim=True)
    faces = (normal[:, axis].abs() > 1e-6).nonzero()[:, 0]
    u, v = corners[faces][:, :, u_axis], corners[faces][:, :, v_axis]

    first = u.amin(dim=1).ceil().clamp(min=0).long()
    last = u.amax(dim=1).floor().clamp(max=resolution - 1).long()
    row_face, row = _integers_between(first, last)
    low, high = u.new_full((len(row),), torch.inf), u.new_full((len(row),), -torch.inf)
    for start, end in ((0, 1), (1, 2), (2, 0)):
        u0, u1 = u[row_face, start], u[row_face, end]
        v0, v1 = v[row_face, start], v[row_face, end]
        spans = (torch.minimum(u0, u1) <= row) & (row <= torch.maximum(u0, u1))
        flat = u0 == u1
        along = torch.where(flat, 0, (row - u0) / torch.where(flat, 1, u1 - u0))
        at = v0 + along * (v1 - v0)
        low = torch.where(spans, torch.minimum(low, torch.where(flat, torch.minimum(v0, v1), at)), low)
        high = torch.where(spans, torch.maximum(high, torch.where(flat, torch.maximum(v0, v1), at)), high)

    valid = low <= high
    row_face, row, low, high = row_face[valid], row[valid], low[valid], high[valid]
    # Widened by more than a rounding error, so that no grid line passes between two adjacent triangles.
    first = (low - 1e-9).ceil().clamp(min=0).long()
    last = (high + 1e-9).floor().clamp(max=resolution - 1).long()
    parent, column = _integers_between(first, last)
    row = row[parent]
    face = faces[row_face[parent]]

    plane, corner = normal[face], corners[face]
    rise = plane[:, u_axis] * (row - corner[:, 0, u_axis]) + plane[:, v_axis] * (column - corner[:, 0, v_axis])
    height = corner[:, 0, axis] - rise / plane[:, axis]
    height = height.clamp(corner[:, :, axis].amin(dim=1), corner[:, :, axis].amax(dim=1))
    keep = (height >= 0) & (height <= resolution - 1)
    height, row, column, face = height[keep], row[keep], column[keep], face[keep]
    base = torch.empty(len(height), 3, dtype=torch.int32, device=corners.device)
    base[:, axis] = height.floor().clamp(0, resolution - 2).int()
    base[:, u_axis], base[:, v_axis] = row.int(), column.int()
    return base, height - base[:, axis], face


def _integers_between(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """
    The integers of closed intervals.

    Args:
        first, last: `[n]` int64, the bounds of each interval, which is empty if `first` exceeds `last`.

    Returns:
        The interval of each integer, `[m]` int64, and the integers, `[m]` int64.
    """
    counts = (last - first + 1).clamp(min=0)
    parent = torch.arange(len(first), device=first.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return parent, torch.arange(len(parent), device=first.device) - starts[parent] + first[parent]
