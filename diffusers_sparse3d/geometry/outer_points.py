"""
Cells of a latent grid near the outer surface of a mesh, from points on it, for many shapes that are made of one mesh.

The outer surface is found once, which takes most of the time. Its points are then moved as the shapes want it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import trimesh
from torch import Tensor

from .sdf import narrow_band_width
from .sdf.narrow_band import SHELL_OFFSET, WIRE_OFFSET
from .sdf.outer_surface import OUTSIDE, SHEET, SOLID, OuterSurface
from .silhouettes import surface_points
from .surface_cells import cells_near_points


# The mean distance of so many points on a thing that fills the model cube is below half the width of a band at 256^3.
NUM_POINTS = 200_000


class OuterPoints(NamedTuple):
    """
    Points on the outer surface of a mesh.

    Attributes:
        points: `[P, 3]` float32 in model space.
        offset: `[P]` float32, how far outside the zero level of the SDF lies, in grid spacings: sheets become shells,
            and wires tubes.
    """

    points: Tensor
    offset: Tensor


def outer_surface_points(
    mesh: trimesh.Trimesh, resolution: int, num_points: int = NUM_POINTS, device: torch.device | str = "cpu"
) -> OuterPoints:
    """
    Points spread evenly over a mesh, without those that the outside does not reach; the same ones for the same mesh.

    Args:
        mesh: a mesh in the model cube, its bounding box centred; it need be neither closed nor oriented.
        resolution: samples per axis of the grid on which the outside is found, as for an SDF of that resolution.
        num_points: on the whole mesh.
        device: where to compute.

    Raises:
        ValueError: if `mesh` leaves the cube [-1, 1]^3 or has no triangle with an area.
    """
    points = surface_points(mesh, num_points)
    surface = OuterSurface(mesh, resolution, device=device)
    cells = surface.cells_of(points.numpy())
    code, wider = surface.code_around(cells), surface.code_around(cells, reach=2)
    offset = torch.where(wider & (SOLID | SHEET) == 0, WIRE_OFFSET, torch.where(code & SHEET > 0, SHELL_OFFSET, 0.0))
    outer = code & OUTSIDE > 0
    return OuterPoints(points.to(outer.device)[outer], offset[outer])


def outer_cells(outer: OuterPoints, resolution: int, cell_size: int = 8) -> Tensor:
    """
    The cells that a sparse SDF of the surface touches, nearly: those with a sample in the narrow band around a point.

    Args:
        outer: points on the outer surface, in model space.
        resolution: samples per axis of the SDF.
        cell_size: samples per cell and axis.

    Returns:
        `[M, 3]` int32 cells in ascending (x, y, z) order, on the device of the points.

    Raises:
        ValueError: if `resolution` is out of range or not a multiple of `cell_size`.
    """
    near = torch.zeros((resolution // cell_size,) * 3, dtype=torch.bool, device=outer.points.device)
    width, spacing = narrow_band_width(resolution), 2 / (resolution - 1)
    for offset in outer.offset.unique().tolist():
        points = outer.points[outer.offset == offset]
        cells = cells_near_points(points, resolution, cell_size, width + offset * spacing)
        near[cells.long().unbind(1)] = True
    return near.nonzero().int()
