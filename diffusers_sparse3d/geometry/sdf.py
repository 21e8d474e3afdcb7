"""
Mesh to sparse signed distance field.

The distance is exact point-triangle distance from libigl's AABB tree (MPL-2.0, wheels on PyPI, multi-threaded; the
environment variable `IGL_NUM_THREADS`, which is libigl's own, limits its threads). The sign comes from a flood fill
from outside, so it needs neither a watertight nor a consistently oriented mesh:

1. An octree finds the samples near the surface; nothing that is as large as the grid is ever stored.
2. Samples within half a spacing of the surface are a barrier that no axis-parallel step can cross. The fill runs
   through all other samples: block by block near the surface, and from block to block elsewhere.
3. The barrier's outer side is then released: a barrier sample is outside if a grid edge that no triangle crosses leads
   from it to the outside.
4. What the fill cannot reach is solid: faces inside it are no surface. Where both sides of a face are outside (open
   sheets, plates thinner than the grid) the surface becomes a closed shell, half a spacing around the face.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..sparse_tensor import SparseTensor
from .mesh import MeshLike, load_mesh, normalize_mesh


# In grid spacings. A step of the grid that crosses the surface has an endpoint within half a spacing of it; a little
# more absorbs rounding where a sheet lies exactly between two layers of samples.
BARRIER = 0.502
SHELL_OFFSET = 0.51
# Something thinner than a spacing in two directions can pass between the samples at up to sqrt(1/2) spacings.
WIRE_OFFSET = 0.72
SHARP_ANGLE = 30.0
# What the samples around a surface point are.
OUTSIDE, SOLID, SHEET = np.uint8(1), np.uint8(2), np.uint8(4)
QUERY_CHUNK = 1 << 19

CELL_CORNERS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(8, 3)


@dataclass
class SDFBlocks:
    """
    A narrow band stored as full blocks of samples.

    Attributes:
        coords: `[M, 3]` int32, block coordinates in ascending (x, y, z) order; block b holds the samples
            `b * block_size .. b * block_size + block_size - 1`.
        values: `[M, block_size, block_size, block_size]` float32 in [-1, 1]: s / tau inside the band, exactly 1
            outside of it and -1 inside the object.
        sharp: like `values`, bool: band samples within tau of a sharp edge.
        resolution: samples per axis of the grid.
    """

    coords: Tensor
    values: Tensor
    sharp: Tensor
    resolution: int

    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates `[N, 3]` int32, values `[N, 1]` float32 and sharp flags `[N]` bool of the band's samples."""
        mask = self.values.abs() < 1
        block, *local = mask.nonzero(as_tuple=True)
        coords = self.coords[block] * self.values.shape[-1] + torch.stack(local, dim=1)
        return coords.to(torch.int32), self.values[mask].unsqueeze(1), self.sharp[mask]


def narrow_band_width(resolution: int) -> float:
    """tau, the half width of the narrow band in model space: 1/128, and at least two grid spacings."""
    return max(1 / 128, 4 / (resolution - 1))


class _Surface:
    """Closest-point queries against a set of triangles or segments."""

    def __init__(self, vertices: np.ndarray, elements: np.ndarray):
        try:
            import igl
        except ImportError as error:
            raise ImportError(
                "The distance to a mesh needs libigl: `pip install libigl` or `pip install diffusers-sparse3d[train]`."
            ) from error
        self.vertices = np.ascontiguousarray(vertices, dtype=np.float64)
        self.elements = np.ascontiguousarray(elements, dtype=np.int64)
        self.tree = igl.AABB()
        self.tree.init(self.vertices, self.elements)

    def closest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance `[n]`, element `[n]` and closest point `[n, 3]` of points `[n, 3]`."""
        squared, element, closest = self.tree.squared_distance(self.vertices, self.elements, points)
        return np.sqrt(squared), element.reshape(-1), closest

    def samples_within(
        self, resolution: int, reach: float, progress: tqdm
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        All grid samples nearer than `reach`, by descending an octree: a cell is dropped when the distance at its
        centre exceeds its radius by `reach`, which the distance, being 1-Lipschitz, makes exact.

        Returns:
            coords `[n, 3]` int32, distance `[n]` float64, element `[n]` int32, and the grid cell that holds the
            closest point, `[n, 3]` int32.
        """
        spacing = 2 / (resolution - 1)
        size = 1 << (resolution - 1).bit_length()
        cells = np.zeros((1, 3), dtype=np.int32)
        while size > 1:
            size //= 2
            radius = (size - 1) / 2 * spacing * 3**0.5
            progress.total = (progress.total or 0) + 8 * len(cells)
            kept = []
            for start in range(0, len(cells), QUERY_CHUNK // 8):
                parents = cells[start : start + QUERY_CHUNK // 8]
                children = (parents[:, None] * 2 + CELL_CORNERS.astype(np.int32)).reshape(-1, 3)
                children = children[(children * size < resolution).all(axis=1)]
                distance, element, closest = self.closest((children * size + (size - 1) / 2) * spacing - 1)
                near = distance < reach + radius
                if size > 1:
                    kept.append((children[near],))
                else:
                    cell = np.floor((closest[near] + 1) / spacing).clip(0, resolution - 2).astype(np.int32)
                    kept.append((children[near], distance[near], element[near].astype(np.int32), cell))
                progress.update(8 * len(parents))
            results = [np.concatenate(part) for part in zip(*kept)]
            cells = results[0]
        return tuple(results)


class _BlockGrid:
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


def _sharp_segments(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """
    Sharp edges `[S, 2]` of a welded mesh: edges where two faces deviate from a plane by more than 30 degrees, whatever
    their orientation, and edges with one face or more than two.
    """
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    opposite = faces[:, [2, 0, 1]].reshape(-1)
    order = np.lexsort(edges.T[::-1])
    edges, opposite = edges[order], opposite[order]
    starts = np.flatnonzero(np.r_[True, (edges[1:] != edges[:-1]).any(axis=1)])
    counts = np.diff(np.r_[starts, len(edges)])
    # The direction of each face away from the edge; the two are opposite where the surface is flat.
    origin = vertices[edges[:, 0]]
    direction = vertices[edges[:, 1]] - origin
    direction /= np.linalg.norm(direction, axis=1, keepdims=True).clip(1e-12)
    away = vertices[opposite] - origin
    away -= (away * direction).sum(axis=1, keepdims=True) * direction
    away /= np.linalg.norm(away, axis=1, keepdims=True).clip(1e-12)
    pair = starts[counts == 2]
    folded = (away[pair] * away[pair + 1]).sum(axis=1) > -np.cos(np.radians(SHARP_ANGLE))
    return np.concatenate([edges[pair[folded]], edges[starts[counts != 2]]])


def _weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges vertices that agree to 1e-6 in model space and drops the faces that collapse."""
    _, first, inverse = np.unique(np.round(vertices, 6), axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    proper = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return vertices[first], faces[proper]


def _crossed_edges(grid: _BlockGrid, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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


def _release_barrier(grid: _BlockGrid, outside: np.ndarray, coords: np.ndarray, crossed: np.ndarray) -> None:
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


def mesh_to_sdf_blocks(
    mesh: MeshLike,
    resolution: int,
    block_size: int = 8,
    *,
    normalize: bool = True,
    progress: bool | None = None,
) -> SDFBlocks:
    """
    Signed distance to the outer surface of a mesh in a narrow band, as full blocks of samples.

    Any mesh will do: open, self-intersecting, with inconsistent orientation, of many parts. What the outside cannot
    reach through a gap wider than one grid spacing is solid, its zero level lies on the surface, and faces inside it
    are ignored. Sheets, and plates thinner than the grid, become closed shells of half a spacing on either side.
    Grid sample i lies at `-1 + 2 i / (resolution - 1)`. Memory grows with the surface.

    Args:
        mesh: a Trimesh, a Scene, or a path.
        resolution: samples per axis, a multiple of `block_size`.
        block_size: samples per block and axis, a power of two; 8 gives the latent grid.
        normalize: centre the mesh and scale its longest side to 1.9 first; without it, `mesh` must lie in [-1, 1]^3.
        progress: show a progress bar; by default one appears after a second.

    Returns:
        The blocks that hold at least one sample with |s| < tau, tau = max(1/128, 2 spacings), on the CPU.

    Raises:
        ValueError: if `mesh` has no usable triangle or leaves the cube, or `resolution` or `block_size` does not fit.
        ImportError: if libigl or scipy is missing.
    """
    if block_size < 2 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two and at least 2, got {block_size}.")
    if resolution % block_size or not 2 * block_size <= resolution <= 2048:
        raise ValueError(
            f"`resolution` must be a multiple of {block_size} from {2 * block_size} to 2048, got {resolution}."
        )
    mesh = load_mesh(mesh)
    if normalize:
        mesh, _, _ = normalize_mesh(mesh)
    elif np.abs(mesh.vertices).max() > 1:
        raise ValueError("`mesh` must lie in the cube [-1, 1]^3 with `normalize=False`.")
    vertices, faces = _weld(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    proper = np.linalg.norm(normals, axis=1) > 1e-14
    vertices, faces, corners, normals = vertices, faces[proper], corners[proper], normals[proper]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    if len(faces) == 0:
        raise ValueError("`mesh` has no triangle with a positive area at this scale.")

    spacing, tau = 2 / (resolution - 1), narrow_band_width(resolution)
    bar = tqdm(
        desc=f"SDF {resolution}", unit=" samples", unit_scale=True, leave=False, delay=1, disable=progress is False
    )
    with bar:
        reach = tau + SHELL_OFFSET * spacing
        coords, distance, face, cell = _Surface(vertices, faces).samples_within(resolution, reach, bar)
        grid = _BlockGrid(coords, resolution, block_size)
        slot = grid.slots(coords)

        # Sign.
        barrier = distance <= BARRIER * spacing
        free = grid.full(True, bool)
        free[slot[barrier]] = False
        outside = grid.flood_from_outside(free)
        edge_slots, edge_axes, points, edge_faces = _crossed_edges(grid, (corners + 1) / spacing)
        crossed = np.zeros((3, grid.size + 1), dtype=bool)
        crossed[edge_axes, edge_slots[0]] = True
        _release_barrier(grid, outside, coords[barrier], crossed)

        # What the cells that hold the closest points look like from outside.
        ends_outside = outside[edge_slots]
        thin = ends_outside.all(axis=0)
        sheet = grid.full(False, bool)
        sheet[_thin_edges(edge_slots[:, thin], edge_axes[thin], points[thin], edge_faces[thin], normals)] = True
        sheet[grid.size] = False
        code = np.where(outside, OUTSIDE, SOLID) | np.where(sheet, SHEET, np.uint8(0))
        code[grid.size] = 0
        touches = _neighbourhood(grid, code, cell, reach=1)

        # Solid samples whose closest face is inside the solid: measure to the outer surface instead.
        is_outside = outside[slot]
        inner = np.flatnonzero(~is_outside & (touches & OUTSIDE == 0))
        if len(inner):
            visible = np.unique(face[touches & OUTSIDE > 0])
            distance[inner] = np.inf
            if len(visible):
                again, _, closest = _Surface(vertices, faces[visible]).closest(coords[inner] * spacing - 1)
                cell_again = np.floor((closest + 1) / spacing).clip(0, resolution - 2).astype(np.int32)
                seen = _neighbourhood(grid, code, cell_again, reach=1) & OUTSIDE > 0
                distance[inner[seen]] = again[seen]
                boundary = ends_outside[0] != ends_outside[1]
                hidden = inner[~seen & (again < tau)]
                if len(hidden) and boundary.any():
                    # The nearest face is only partly visible: the crossings on the visible part stand for it.
                    distance[hidden] = _nearest_point(points[boundary] * spacing - 1, coords[hidden] * spacing - 1)

        # Thin features become shells.
        offset = np.where(touches & SHEET, SHELL_OFFSET, 0.0)
        unseen = np.flatnonzero(is_outside & (touches & (SOLID | SHEET) == 0))
        if len(unseen):
            around = _neighbourhood(grid, code, cell[unseen], reach=2)
            offset[unseen[around & SOLID == 0]] = WIRE_OFFSET
            offset[unseen[around & SHEET > 0]] = SHELL_OFFSET

        signed = np.where(is_outside, distance, -distance) - offset * spacing
        band = np.abs(signed) < tau
        values = np.where(outside, 1.0, -1.0).astype(np.float32)
        # A value that rounds to 1 would leave the band.
        values[slot[band]] = (signed[band] / tau).astype(np.float32).clip(-1 + 2**-24, 1 - 2**-24)

        sharp = grid.full(False, bool)
        segments = _sharp_segments(vertices, faces)
        if len(segments):
            near_edge = _Surface(vertices, segments).samples_within(resolution, tau, bar)[0]
            sharp[grid.slots(near_edge)] = True
            sharp &= np.abs(values) < 1

    values, sharp = grid.tiles(values), grid.tiles(sharp)
    kept = (np.abs(values) < 1).any(axis=(1, 2, 3))
    return SDFBlocks(
        coords=torch.from_numpy(grid.blocks[kept].astype(np.int32)),
        values=torch.from_numpy(values[kept]),
        sharp=torch.from_numpy(sharp[kept]),
        resolution=resolution,
    )


def _neighbourhood(grid: _BlockGrid, code: np.ndarray, cells: np.ndarray, reach: int) -> np.ndarray:
    """
    Bitwise or of `code` over the samples around grid cells `[n, 3]`: the 8 corners for `reach=1`, 4^3 samples for
    `reach=2`. Looked up once per distinct cell.
    """
    base = grid.slots(cells)
    first = np.full(grid.size + 1, -1, dtype=np.int64)
    first[base] = np.arange(len(base))
    distinct = np.flatnonzero(first >= 0)
    representative = cells[first[distinct]]
    result = np.zeros(grid.size + 1, dtype=np.uint8)
    span = range(1 - reach, 1 + reach)
    for offset in ((x, y, z) for x in span for y in span for z in span):
        result[distinct] |= code[grid.slots(representative + np.array(offset, dtype=cells.dtype))]
    return result[base]


def _nearest_point(points: np.ndarray, queries: np.ndarray) -> np.ndarray:
    from scipy.spatial import cKDTree

    return cKDTree(points).query(queries)[0]


def mesh_to_sparse_sdf(
    mesh: MeshLike,
    resolution: int,
    *,
    normalize: bool = True,
    return_sharp: bool = False,
    progress: bool | None = None,
) -> SparseTensor | tuple[SparseTensor, Tensor]:
    """
    Sparse signed distance field of any mesh: the band part of [`mesh_to_sdf_blocks`], which explains the method.

    Args:
        mesh: a Trimesh, a Scene, or a path.
        resolution: samples per axis, a multiple of 8; sample i lies at `-1 + 2 i / (resolution - 1)`.
        normalize: centre the mesh and scale its longest side to 1.9 first.
        return_sharp: also return which samples lie within tau of a sharp edge (dihedral deviation above 30 degrees, or
            the border of a sheet).
        progress: show a progress bar; by default one appears after a second.

    Returns:
        A `SparseTensor` with `feats [N, 1]` float32, s / tau in (-1, 1), positive outside, and `coords [N, 4]` int32
        with batch index 0; with `return_sharp`, also a bool tensor `[N]`.

    Raises:
        ValueError: as [`mesh_to_sdf_blocks`].
    """
    blocks = mesh_to_sdf_blocks(mesh, resolution, normalize=normalize, progress=progress)
    coords, feats, sharp = blocks.band()
    tensor = SparseTensor(feats=feats, coords=torch.nn.functional.pad(coords, (1, 0)))
    return (tensor, sharp) if return_sharp else tensor
