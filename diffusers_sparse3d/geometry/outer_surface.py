"""
The surface of a mesh as seen from outside, on a grid.

The sign of the distance comes from a flood fill from outside, so it needs neither a watertight nor a consistently
oriented mesh:

1. Samples within half a spacing of the surface are a barrier that no axis-parallel step can cross. The fill runs
   through all other samples: sample by sample in the blocks near the surface, from block to block elsewhere.
2. The barrier's outer side is then released: a barrier sample is outside if a grid edge that no triangle crosses leads
   from it to the outside.
3. What the fill cannot reach is solid: faces inside it are no surface. Where both sides of a face are outside (open
   sheets, plates thinner than the grid) there is a sheet.
"""

import numpy as np
import torch
import trimesh
from tqdm.auto import tqdm

from .distance import SurfaceDistance
from .mesh import load_mesh


# In grid spacings. A step of the grid that crosses the surface has an endpoint within half a spacing of it; a little
# more absorbs rounding where a sheet lies exactly between two layers of samples.
BARRIER = 0.502
# What the samples around a point of the surface are.
OUTSIDE, SOLID, SHEET = np.uint8(1), np.uint8(2), np.uint8(4)


class BlockGrid:
    """Flat storage for the samples of active blocks: slot = row of the block * block_size^3 + index in the block."""

    def __init__(self, coords: np.ndarray, resolution: int, block_size: int):
        self.resolution, self.block_size = resolution, block_size
        self.blocks_per_axis = resolution // block_size
        self.table = np.full((self.blocks_per_axis,) * 3, -1, dtype=np.int64)
        self.table[tuple((coords // block_size).T)] = 0
        self.blocks = np.argwhere(self.table == 0)
        self.table[tuple(self.blocks.T)] = np.arange(len(self.blocks))
        self.size = len(self.blocks) * block_size**3

    def slots(self, coords: np.ndarray) -> np.ndarray:
        """Slots `[n]` of samples `[n, 3]`; `self.size` where there is no active block or the grid has ended."""
        size = self.block_size
        inside = ((coords >= 0) & (coords < self.resolution)).all(axis=1)
        block, local = np.divmod(np.where(inside[:, None], coords, 0), size)
        row = self.table[block[:, 0], block[:, 1], block[:, 2]]
        slot = row * size**3 + (local[:, 0] * size + local[:, 1]) * size + local[:, 2]
        return np.where(inside & (row >= 0), slot, self.size)

    def full(self, value: float | bool | int, dtype: type) -> np.ndarray:
        """One value per slot, and one more that stands for every sample outside the active blocks."""
        return np.full(self.size + 1, value, dtype=dtype)

    def tiles(self, values: np.ndarray) -> np.ndarray:
        return values[: self.size].reshape(len(self.blocks), *(self.block_size,) * 3)

    def flood_from_outside(self, free: np.ndarray) -> np.ndarray:
        """
        Free samples of the active blocks that a 6-connected path through free samples joins to the outside. Inactive
        blocks are free as a whole.
        """
        from scipy import ndimage, sparse

        size, count, per_axis = self.block_size, len(self.blocks), self.blocks_per_axis
        padded = np.zeros((count, size + 1, size, size), dtype=bool)
        padded[:, :size] = self.tiles(free)
        labels, _ = ndimage.label(padded.reshape(-1, size, size))
        labels = labels.reshape(count, size + 1, size, size)[:, :size]
        regions, region_count = ndimage.label(self.table < 0)

        # Nodes: 0 is the outside of the grid, then the regions of inactive blocks, then the labels.
        edges = []
        for axis in range(3):
            for side, border in ((0, 0), (-1, per_axis - 1)):
                face = np.unique(regions.take(border, axis=axis))
                edges.append(np.stack([face, np.zeros_like(face)]))
                labels_of_face = labels.take(side, axis=axis + 1).reshape(count, -1)
                neighbour = self.blocks.copy()
                neighbour[:, axis] += 1 if side else -1
                at_border = self.blocks[:, axis] == border
                outside = labels_of_face[at_border].ravel()
                edges.append(np.stack([outside + region_count, np.zeros_like(outside)])[:, outside > 0])
                neighbour_row = self.table[tuple(neighbour[~at_border].T)]
                inner = labels_of_face[~at_border]
                inactive = neighbour_row < 0
                region = regions[tuple(neighbour[~at_border][inactive].T)]
                pairs = np.stack([inner[inactive], np.broadcast_to(region[:, None], inner[inactive].shape)])
                pairs = pairs.reshape(2, -1)[:, inner[inactive].ravel() > 0]
                pairs[0] += region_count
                edges.append(_without_repeats(pairs))
                if side:
                    opposite = labels.take(0, axis=axis + 1).reshape(count, -1)[neighbour_row[~inactive]]
                    pairs = np.stack([inner[~inactive].ravel(), opposite.ravel()])
                    edges.append(_without_repeats(pairs[:, (pairs > 0).all(axis=0)]) + region_count)
        edges = np.concatenate(edges, axis=1)
        nodes = 1 + region_count + int(labels.max())
        graph = sparse.coo_matrix((np.ones(edges.shape[1], dtype=bool), tuple(edges)), shape=(nodes, nodes))
        component = sparse.csgraph.connected_components(graph, directed=False)[1]
        reached = component == component[0]
        outside = self.full(False, bool)
        outside[: self.size] = (reached[labels + region_count] & (labels > 0)).ravel()
        return outside


def _without_repeats(pairs: np.ndarray) -> np.ndarray:
    """Drops the columns of `pairs [2, n]` that equal the one before."""
    return pairs[:, np.r_[True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)][: pairs.shape[1]]]


def _grid_crossings(corners: np.ndarray, resolution: int, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Where the grid lines along one axis cross triangles, by scan conversion: rows of the projected triangle first, then
    the samples of each row, so the work is proportional to the number of crossings and rows.

    Args:
        corners: `[F, 3, 3]` triangle corners in units of the grid spacing.

    Returns:
        base `[n, 3]` int32 (the lower sample of the crossed grid edge), offset `[n]` in [0, 1] above it, and the
        triangle `[n]`.
    """
    u_axis, v_axis = (axis + 1) % 3, (axis + 2) % 3
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    faces = np.flatnonzero(np.abs(normal[:, axis]) > 1e-6)
    u, v = corners[faces][:, :, u_axis], corners[faces][:, :, v_axis]

    first = np.ceil(u.min(axis=1)).clip(0).astype(np.int64)
    last = np.floor(u.max(axis=1)).clip(None, resolution - 1).astype(np.int64)
    row_face, row = _ranges(first, last)
    low, high = np.full(len(row), np.inf), np.full(len(row), -np.inf)
    for start, end in ((0, 1), (1, 2), (2, 0)):
        u0, u1 = u[row_face, start], u[row_face, end]
        v0, v1 = v[row_face, start], v[row_face, end]
        spans = (np.minimum(u0, u1) <= row) & (row <= np.maximum(u0, u1))
        flat = u0 == u1
        along = np.where(flat, 0, (row - u0) / np.where(flat, 1, u1 - u0))
        at = v0 + along * (v1 - v0)
        low = np.where(spans, np.minimum(low, np.where(flat, np.minimum(v0, v1), at)), low)
        high = np.where(spans, np.maximum(high, np.where(flat, np.maximum(v0, v1), at)), high)

    valid = low <= high
    row_face, row, low, high = row_face[valid], row[valid], low[valid], high[valid]
    # Inclusive by a rounding error, so that no line slips through between two triangles.
    first = np.ceil(low - 1e-9).clip(0).astype(np.int64)
    last = np.floor(high + 1e-9).clip(None, resolution - 1).astype(np.int64)
    parent, column = _ranges(first, last)
    row = row[parent]
    face = faces[row_face[parent]]

    plane = normal[face]
    height = (
        corners[face, 0, axis]
        - (
            plane[:, u_axis] * (row - corners[face, 0, u_axis])
            + plane[:, v_axis] * (column - corners[face, 0, v_axis])
        )
        / plane[:, axis]
    )
    height = height.clip(corners[face][:, :, axis].min(axis=1), corners[face][:, :, axis].max(axis=1))
    keep = (height >= 0) & (height <= resolution - 1)
    height, row, column, face = height[keep], row[keep], column[keep], face[keep]
    base = np.empty((len(height), 3), dtype=np.int32)
    base[:, axis] = np.floor(height).clip(0, resolution - 2)
    base[:, u_axis], base[:, v_axis] = row, column
    return base, height - base[:, axis], face


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the intervals [first, last], with the interval each belongs to."""
    counts = (last - first + 1).clip(0)
    parent = np.repeat(np.arange(len(first)), counts)
    starts = np.cumsum(counts) - counts
    return parent, np.arange(len(parent)) - starts[parent] + first[parent]


def _weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges vertices that agree to 1e-6 in model space and drops the faces that collapse."""
    _, first, inverse = np.unique(np.round(vertices, 6), axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    proper = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return vertices[first], faces[proper]


def _crossed_edges(grid: BlockGrid, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Grid edges that a triangle crosses: the slots of their lower and upper samples `[2, n]`, axis `[n]`, crossing point
    `[n, 3]` in grid spacings, triangle `[n]`.
    """
    slots, axes, points, faces = [], [], [], []
    for axis in range(3):
        base, offset, face = _grid_crossings(corners, grid.resolution, axis)
        step = np.eye(3, dtype=np.int32)[axis]
        slots.append(np.stack([grid.slots(base), grid.slots(base + step)]))
        axes.append(np.full(len(base), axis, dtype=np.int8))
        points.append(base + offset[:, None] * step)
        faces.append(face)
    return np.concatenate(slots, axis=1), np.concatenate(axes), np.concatenate(points), np.concatenate(faces)


def _release_barrier(grid: BlockGrid, outside: np.ndarray, coords: np.ndarray, crossed: np.ndarray) -> None:
    """
    Marks barrier samples `coords` as outside where an edge that is not crossed joins them to the outside. Three steps
    reach into concave corners, and keep what leaks through a crack local.
    """
    here = grid.slots(coords)
    neighbours, edges = [], []
    for axis in range(3):
        for sign in (-1, 1):
            neighbour = grid.slots(coords + sign * np.eye(3, dtype=coords.dtype)[axis])
            neighbours.append(neighbour)
            edges.append(crossed[axis, here if sign > 0 else neighbour])
    open_neighbours = np.where(np.stack(edges), grid.size, np.stack(neighbours))
    for _ in range(3):
        outside[here[outside[open_neighbours].any(axis=0)]] = True


def _thin_edges(
    slots: np.ndarray, axes: np.ndarray, points: np.ndarray, faces: np.ndarray, normals: np.ndarray
) -> np.ndarray:
    """
    Of the crossed edges with both ends outside, those that pierce a sheet: once, or through two nearly parallel faces.
    Edges that graze a surface, or cut off a ridge between two samples, do not count.

    Returns:
        The slots at both ends, `[m]`.
    """
    if len(faces) == 0:
        return np.empty(0, dtype=np.int64)
    height = np.take_along_axis(points, axes[:, None].astype(np.int64), axis=1)[:, 0]
    order = np.lexsort((height, axes, slots[0]))
    slots, axes, faces = slots[:, order], axes[order], faces[order]
    new = np.r_[True, (slots[0, 1:] != slots[0, :-1]) | (axes[1:] != axes[:-1])]
    first = np.flatnonzero(new)
    last = np.r_[first[1:], len(axes)] - 1
    axis = axes[first]
    normal_in, normal_out = normals[faces[first]], normals[faces[last]]
    rows = np.arange(len(first))
    pierced = (
        (np.abs(normal_in[rows, axis]) > 0.5)
        & (np.abs(normal_out[rows, axis]) > 0.5)
        & (np.abs((normal_in * normal_out).sum(axis=1)) > 0.5)
    )
    return slots[:, first[pierced]].reshape(-1)


class OuterSurface:
    """
    Which side of the surface of a mesh each grid sample near it is on, and which part of the surface is outer surface:
    what can be reached from infinity through gaps wider than one grid spacing.

    Args:
        mesh: a mesh in the model cube.
        resolution: samples per axis, a multiple of `block_size`.
        reach: the distance in model space up to which samples are looked at, at least two spacings (the default).
        block_size: samples per block and axis, a power of two.
        progress: a bar to report to.
        device: see `SurfaceDistance`.

    Attributes:
        vertices, faces: the mesh, welded, without degenerate faces.
        coords: `[n, 3]` int32, the samples nearer than `reach`.
        slot: `[n]` their slots in `grid`.
        distance, face, cell: `[n]`, `[n]`, `[n, 3]`: distance to the closest point, its face, and its grid cell.
        outside: per slot, whether the outside reaches the sample.
        code: per slot, `OUTSIDE` or `SOLID`, with `SHEET` set at the ends of grid edges that pierce a sheet.
        boundary: `[k, 3]` points in model space where grid edges cross the surface from outside to solid.

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

        self.coords, self.distance, self.face, self.cell = SurfaceDistance(
            self.vertices, self.faces, device
        ).samples_within(resolution, 2 * self.spacing if reach is None else reach, progress)
        self.grid = BlockGrid(self.coords, resolution, block_size)
        self.slot = self.grid.slots(self.coords)

        barrier = self.distance <= BARRIER * self.spacing
        free = self.grid.full(True, bool)
        free[self.slot[barrier]] = False
        self.outside = self.grid.flood_from_outside(free)
        ends, axes, points, faces = _crossed_edges(self.grid, (corners + 1) / self.spacing)
        crossed = np.zeros((3, self.grid.size + 1), dtype=bool)
        crossed[axes, ends[0]] = True
        _release_barrier(self.grid, self.outside, self.coords[barrier], crossed)

        ends_outside = self.outside[ends]
        self.boundary = points[ends_outside[0] != ends_outside[1]] * self.spacing - 1
        thin = ends_outside.all(axis=0)
        self.code = np.where(self.outside, OUTSIDE, SOLID)
        self.code[_thin_edges(ends[:, thin], axes[thin], points[thin], faces[thin], normals)] |= SHEET
        self.code[self.grid.size] = 0

    def cells_of(self, points: np.ndarray) -> np.ndarray:
        """Grid cells `[n, 3]` int32 that hold the points `[n, 3]`."""
        return np.floor((points + 1) / self.spacing).clip(0, self.resolution - 2).astype(np.int32)

    def code_around(self, cells: np.ndarray, reach: int = 1) -> np.ndarray:
        """
        Bitwise or of `code` over the samples around grid cells `[n, 3]` near the surface: their 8 corners, or 4^3
        samples for `reach=2`.
        """
        # Looked up once per distinct cell.
        base = self.grid.slots(cells)
        representative = np.full(self.grid.size + 1, -1, dtype=np.int64)
        representative[base] = np.arange(len(base))
        distinct = np.flatnonzero(representative >= 0)
        corner = cells[representative[distinct]]
        result = np.zeros(self.grid.size + 1, dtype=np.uint8)
        span = range(1 - reach, 1 + reach)
        for offset in ((x, y, z) for x in span for y in span for z in span):
            result[distinct] |= self.code[self.grid.slots(corner + np.array(offset, dtype=cells.dtype))]
        return result[base]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Whether points `[n, 3]` of the surface are on the outer surface: a corner of their grid cell is outside."""
        return self.code_around(self.cells_of(points)) & OUTSIDE > 0
