"""
The outer surface of a mesh on a grid: which samples are outside, and which part of the surface bounds the outside.

The sign of the distance comes from a flood fill from outside, so the mesh need be neither watertight nor consistently
oriented:

1. Samples within half a spacing of the surface form a barrier that no axis-parallel step can cross. The flood fill
   runs
   through all other samples: sample by sample in the blocks near the surface, block by block elsewhere.
2. Barrier samples on the outer side are then released: one that a grid edge without a crossing connects to the outside
   is outside, too.
3. What the flood cannot reach is solid, and faces inside it are not surface. A face with the outside on both sides, as
   of an open sheet or a plate thinner than the grid, is a sheet.
"""

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor
from tqdm.auto import tqdm

from ..distance import SurfaceDistance
from ..mesh import load_mesh
from .block_grid import BlockGrid
from .grid_crossings import CrossedEdges, crossed_edges


# Half thickness of the barrier in grid spacings. A step of the grid that crosses the surface has an end within half a
# spacing of it; a little more absorbs rounding where a sheet lies midway between two layers of samples.
BARRIER = 0.502
# Bits of the code of a sample, see `OuterSurface`.
OUTSIDE, SOLID, SHEET = 1, 2, 4


def _weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Merges vertices that agree when rounded to 1e-6 in model space, and drops the faces that collapse.

    The result does not depend on the order of vertices, faces and corners: ties and rounding in what follows would.
    """
    x, y, z = np.rint((vertices + 1) * 1e6).astype(np.int64).T
    # Sorting one integer of 63 bits is many times faster than sorting three columns.
    key = x << 42 | y << 21 | z
    _, first, inverse, counts = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    merged = np.flatnonzero(counts[inverse] > 1)
    # Of vertices that are merged the lowest remains.
    merged = merged[np.lexsort((*vertices[merged].T[::-1], inverse[merged]))]
    starts = np.flatnonzero(np.diff(inverse[merged], prepend=-1))
    first[inverse[merged[starts]]] = merged[starts]
    faces = np.sort(inverse[faces], axis=1)
    faces = faces[(faces[:, 0] < faces[:, 1]) & (faces[:, 1] < faces[:, 2])]
    return vertices[first], faces[np.lexsort(faces.T[::-1])]


def _release_barrier(grid: BlockGrid, outside: Tensor, coords: Tensor, crossed: Tensor) -> None:
    """
    Marks those barrier samples as outside that grid edges without a crossing connect to the outside.

    Three steps are enough for concave corners, and keep a leak through a crack local.

    Args:
        grid: the blocks near the surface.
        outside: `[grid.size + 1]` bool, changed in place.
        coords: `[n, 3]` int32, the barrier samples.
        crossed: `[3, grid.size + 1]` bool, whether the surface crosses the edge from a sample along each axis.
    """
    steps = torch.eye(3, dtype=coords.dtype, device=coords.device)
    steps = torch.cat([-steps, steps, torch.zeros_like(steps[:1])])
    slots = grid.slots((coords + steps[:, None]).flatten(0, 1)).view(7, -1)
    neighbours, here = slots[:6], slots[6]
    closed = torch.cat([crossed.gather(1, neighbours[:3]), crossed.gather(1, here.expand(3, -1))])
    neighbours = torch.where(closed, grid.size, neighbours)
    for _ in range(3):
        outside[here] = outside[here] | outside[neighbours].any(dim=0)


def _thin_edges(edges: CrossedEdges, normals: Tensor) -> Tensor:
    """
    The ends of the grid edges that pierce a sheet, once or through two nearly parallel faces.

    Edges that graze a surface, or cut off a ridge between two samples, do not count.

    Args:
        edges: crossings of edges whose ends are both outside.
        normals: `[F, 3]`, unit normals of all faces.

    Returns:
        The slots at both ends, `[m]` int64.
    """
    order = edges.point.gather(1, edges.axis[:, None])[:, 0].argsort(stable=True)
    order = order[(3 * edges.ends[0] + edges.axis)[order].argsort(stable=True)]
    slots, axes, faces = edges.ends[:, order], edges.axis[order], edges.face[order]
    edge = 3 * slots[0] + axes
    new = F.pad(edge[1:] != edge[:-1], (1, 0), value=True)[: len(edge)]
    first = new.nonzero()[:, 0]
    last = F.pad(first[1:], (0, 1), value=len(edge))[: len(first)] - 1
    axis = axes[first, None]
    normal_in, normal_out = normals[faces[first]], normals[faces[last]]
    pierced = (
        (normal_in.gather(1, axis)[:, 0].abs() > 0.5)
        & (normal_out.gather(1, axis)[:, 0].abs() > 0.5)
        & ((normal_in * normal_out).sum(dim=1).abs() > 0.5)
    )
    return slots[:, first[pierced]].reshape(-1)


class OuterSurface:
    """
    The outer surface of a mesh: the part that can be reached from infinity through gaps wider than one grid spacing.

    Args:
        mesh: a mesh in the model cube.
        resolution: samples per axis, a multiple of `block_size`.
        reach: the distance in model space within which samples are examined, at least two spacings (the default).
        block_size: samples per block and axis, a power of two.
        progress: a bar that counts the queries of distances.
        device: the device of the computation and of all tensors.

    Attributes:
        vertices: `[V, 3]` float64 array, the vertices, welded.
        faces: `[F, 3]` int64 array, the faces without degenerate ones.
        grid: the blocks that hold a sample nearer than `reach`.
        coords: `[n, 3]` int32, the samples nearer than `reach`.
        slot: `[n]` int64, their slots in `grid`.
        distance: `[n]` float64, their distances to the mesh in model space.
        face: `[n]` int32, the nearest face of each.
        cell: `[n, 3]` int32, the grid cell that holds the closest point on it.
        outside: `[grid.size + 1]` bool, whether a sample is outside.
        code: `[grid.size + 1]` uint8: `OUTSIDE` or `SOLID`, plus `SHEET` for the ends of grid edges that pierce a
            sheet; 0 outside the blocks of `grid`.
        boundary: `[k, 3]` float64, the points in model space where grid edges cross the surface from outside to solid.

    Raises:
        ValueError: if `mesh` leaves the cube [-1, 1]^3 or has no usable triangle.
    """

    def __init__(
        self,
        mesh: trimesh.Trimesh,
        resolution: int,
        reach: float | None = None,
        block_size: int = 8,
        progress: tqdm | None = None,
        device: torch.device | str = "cpu",
    ):
        mesh = load_mesh(mesh)
        if np.abs(mesh.vertices).max() > 1:
            raise ValueError("`mesh` must lie in the cube [-1, 1]^3.")
        self.resolution, self.spacing = resolution, 2 / (resolution - 1)
        self.vertices, self.faces = _weld(np.asarray(mesh.vertices), np.asarray(mesh.faces))
        corners = self.vertices[self.faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        proper = np.linalg.norm(normals, axis=1) > 1e-14
        if not proper.any():
            raise ValueError("`mesh` has no triangle with a positive area at this scale.")
        self.faces, corners, normals = self.faces[proper], corners[proper], normals[proper]
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)

        near = SurfaceDistance(self.vertices, self.faces, device)
        self.coords, self.distance, self.face, self.cell = near.samples_within(
            resolution, 2 * self.spacing if reach is None else reach, progress
        )
        self.grid = BlockGrid(self.coords, resolution, block_size)
        self.slot = self.grid.slots(self.coords)

        barrier = (self.distance <= BARRIER * self.spacing).nonzero()[:, 0]
        free = self.grid.full(True, torch.bool)
        free[self.slot[barrier]] = False
        self.outside = self.grid.flood_from_outside(free)
        edges = crossed_edges(self.grid, (torch.from_numpy(corners).to(device) + 1) / self.spacing)
        crossed = torch.zeros(3, self.grid.size + 1, dtype=torch.bool, device=device)
        crossed[edges.axis, edges.ends[0]] = True
        _release_barrier(self.grid, self.outside, self.coords[barrier], crossed)

        ends_outside = self.outside[edges.ends]
        self.boundary = edges.point[ends_outside[0] != ends_outside[1]] * self.spacing - 1
        thin = ends_outside.all(dim=0).nonzero()[:, 0]
        thin_edges = CrossedEdges(edges.ends[:, thin], edges.axis[thin], edges.point[thin], edges.face[thin])
        self.code = torch.where(self.outside, OUTSIDE, SOLID).to(torch.uint8)
        self.code[_thin_edges(thin_edges, torch.from_numpy(normals).to(device))] |= SHEET
        self.code[self.grid.size] = 0

    def cells_of(self, points: np.ndarray) -> Tensor:
        """The grid cells `[n, 3]` int32 that hold `points [n, 3]` in model space."""
        cells = np.floor((points + 1) / self.spacing).clip(0, self.resolution - 2).astype(np.int32)
        return torch.from_numpy(cells).to(self.code.device)

    def code_around(self, cells: Tensor, reach: int = 1) -> Tensor:
        """
        The bitwise or of `code` over the samples around grid cells.

        Args:
            cells: `[n, 3]` int32, cells whose lowest corner lies in a block of `grid`.
            reach: 1 for the 8 corners of each cell, 2 for the 4^3 samples around it.

        Returns:
            `[n]` uint8.
        """
        return self.grid.bits_around(self.code, cells, range(1 - reach, 1 + reach))

    def contains(self, points: np.ndarray) -> np.ndarray:
        """
        Whether points of the mesh belong to the outer surface, which they do if a corner of their grid cell is
        outside.

        Args:
            points: `[n, 3]` in model space, on the mesh.

        Returns:
            `[n]` bool.
        """
        return (self.code_around(self.cells_of(points)) & OUTSIDE > 0).cpu().numpy()
