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
import torch.nn.functional as F
import trimesh
from torch import Tensor
from tqdm.auto import tqdm

from .distance import SurfaceDistance
from .mesh import load_mesh


# In grid spacings. A step of the grid that crosses the surface has an endpoint within half a spacing of it; a little
# more absorbs rounding where a sheet lies exactly between two layers of samples.
BARRIER = 0.502
# What the samples around a point of the surface are.
OUTSIDE, SOLID, SHEET = 1, 2, 4
# Samples in one pass over their addresses.
SLOT_CHUNK = 1 << 22
# Steps of the flood on a GPU between two looks at whether it has ended.
FLOOD_STEPS = 4


class BlockGrid:
    """Flat storage for the samples of active blocks: slot = row of the block * block_size^3 + index in the block."""

    def __init__(self, coords: Tensor, resolution: int, block_size: int):
        self.resolution, self.block_size = resolution, block_size
        self.blocks_per_axis = resolution // block_size
        self.table = torch.full((self.blocks_per_axis,) * 3, -1, dtype=torch.int32, device=coords.device)
        self.table[(coords // block_size).long().unbind(1)] = 0
        self.blocks = (self.table == 0).nonzero()
        self.table[self.blocks.unbind(1)] = torch.arange(len(self.blocks), dtype=torch.int32, device=coords.device)
        self.size = len(self.blocks) * block_size**3

    def slots(self, coords: Tensor) -> Tensor:
        """Slots `[n]` int64 of samples `[n, 3]`; `self.size` where there is no active block or the grid has ended."""
        size, per_axis = self.block_size, self.blocks_per_axis
        bits = size.bit_length() - 1
        slots = []
        for part in coords.split(SLOT_CHUNK):
            x, y, z = part.T.contiguous().int()
            low, high = torch.minimum(torch.minimum(x, y), z), torch.maximum(torch.maximum(x, y), z)
            block = (x >> bits).mul_(per_axis).add_(y >> bits).mul_(per_axis).add_(z >> bits)
            row = self.table.view(-1).index_select(0, block.clamp_(0, self.table.numel() - 1)).long()
            local = (x & size - 1).mul_(size).add_(y & size - 1).mul_(size).add_(z & size - 1)
            stored = (low >= 0) & (high < self.resolution) & (row >= 0)
            slots.append(torch.where(stored, row.mul_(size**3).add_(local), self.size))
        return torch.cat(slots)

    def coords(self, slots: Tensor) -> Tensor:
        """Samples `[n, 3]` int32 at slots `[n]`."""
        size = self.block_size
        local = slots % size**3
        place = torch.stack([local // size**2, local // size % size, local % size], dim=1)
        return (self.blocks[slots // size**3] * size + place).int()

    def full(self, value: float | bool | int, dtype: torch.dtype) -> Tensor:
        """One value per slot, and one more that stands for every sample outside the active blocks."""
        return torch.full((self.size + 1,), value, dtype=dtype, device=self.table.device)

    def tiles(self, values: Tensor) -> Tensor:
        return values[: self.size].view(len(self.blocks), *(self.block_size,) * 3)

    def flood_from_outside(self, free: Tensor) -> Tensor:
        """
        Free samples of the active blocks that a 6-connected path through free samples joins to the outside, per slot.
        Inactive blocks are free as a whole.
        """
        outside = self.full(False, torch.bool)
        if free.device.type == "cpu":
            reached = torch.from_numpy(
                _flood_by_labels(self.tiles(free).numpy(), self.blocks.numpy(), self.table.numpy())
            )
        else:
            reached = _flood_by_steps(self.tiles(free), self.blocks, self.table)
        self.tiles(outside).copy_(reached)
        return outside


def _flood_by_labels(free: np.ndarray, blocks: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The flood `[M, s, s, s]` by labels of connected samples in each block, and of connected labels; on a CPU."""
    from scipy import ndimage, sparse

    count, size, per_axis = len(blocks), free.shape[-1], len(table)
    padded = np.zeros((count, size + 1, size, size), dtype=bool)
    padded[:, :size] = free
    labels, _ = ndimage.label(padded.reshape(-1, size, size))
    labels = labels.reshape(count, size + 1, size, size)[:, :size]
    regions, region_count = ndimage.label(table < 0)

    # Nodes: 0 is the outside of the grid, then the regions of inactive blocks, then the labels.
    edges = []
    for axis in range(3):
        for side, border in ((0, 0), (-1, per_axis - 1)):
            face = np.unique(regions.take(border, axis=axis))
            edges.append(np.stack([face, np.zeros_like(face)]))
            labels_of_face = labels.take(side, axis=axis + 1).reshape(count, -1)
            neighbour = blocks.copy()
            neighbour[:, axis] += 1 if side else -1
            at_border = blocks[:, axis] == border
            outside = labels_of_face[at_border].ravel()
            edges.append(np.stack([outside + region_count, np.zeros_like(outside)])[:, outside > 0])
            neighbour_row = table[tuple(neighbour[~at_border].T)]
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
    return reached[labels + region_count] & (labels > 0)


def _flood_by_steps(free: Tensor, blocks: Tensor, table: Tensor) -> Tensor:
    """The flood `[M, s, s, s]` step by step from all that it has reached at once; on a GPU."""
    device, size = free.device, free.shape[-1]
    # With a margin of blocks that stand for the outside of the grid.
    inactive = F.pad(table < 0, (1,) * 6, value=True)
    reached_blocks = F.pad(torch.zeros_like(table, dtype=torch.bool), (1,) * 6, value=True)
    rows = F.pad(table, (1,) * 6, value=-1)
    sides = [(axis, side) for axis in range(3) for side in (0, -1)]
    steps = [(1 if side else -1) * torch.eye(3, dtype=torch.long, device=device)[axis] for axis, side in sides]
    places = [(blocks + 1 + step).unbind(1) for step in steps]
    neighbours = [rows[place].long() for place in places]
    reached = torch.zeros_like(free)
    known = -1
    while True:
        # As far as it gets through whole blocks, one at a time.
        blocks_before = -1
        while blocks_before != (blocks_before := int(reached_blocks.sum())):
            for _ in range(FLOOD_STEPS):
                for axis in range(3):
                    here, width = reached_blocks.clone(), len(reached_blocks) - 1
                    reached_blocks.narrow(axis, 1, width).logical_or_(here.narrow(axis, 0, width))
                    reached_blocks.narrow(axis, 0, width).logical_or_(here.narrow(axis, 1, width))
                    reached_blocks &= inactive
        if known == (known := int(reached.sum()) + blocks_before):
            return reached
        for _ in range(FLOOD_STEPS):
            # From the samples beside each block, and through the block.
            for (axis, side), place, row in zip(sides, places, neighbours):
                beside = reached.select(axis + 1, -1 - side)[row.clamp(min=0)]
                beside = torch.where((row < 0)[:, None, None], reached_blocks[place][:, None, None], beside)
                reached.select(axis + 1, side).logical_or_(beside & free.select(axis + 1, side))
            for axis in range(1, 4):
                for layers in (range(1, size), range(size - 2, -1, -1)):
                    for layer in layers:
                        before = layer - layers.step
                        here = reached.select(axis, layer)
                        here |= reached.select(axis, before) & free.select(axis, layer)
        # Out of the blocks.
        for (axis, side), place in zip(sides, places):
            leaving = reached.select(axis + 1, side).flatten(1).any(dim=1) & inactive[place]
            reached_blocks[tuple(index[leaving] for index in place)] = True


def _without_repeats(pairs: np.ndarray) -> np.ndarray:
    """Drops the columns of `pairs [2, n]` that equal the one before."""
    return pairs[:, np.r_[True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)][: pairs.shape[1]]]


def _grid_crossings(corners: Tensor, resolution: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
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
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= normal.norm(dim=1, keepdim=True)
    faces = (normal[:, axis].abs() > 1e-6).nonzero()[:, 0]
    u, v = corners[faces][:, :, u_axis], corners[faces][:, :, v_axis]

    first = u.amin(dim=1).ceil().clamp(min=0).long()
    last = u.amax(dim=1).floor().clamp(max=resolution - 1).long()
    row_face, row = _ranges(first, last)
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
    # Inclusive by a rounding error, so that no line slips through between two triangles.
    first = (low - 1e-9).ceil().clamp(min=0).long()
    last = (high + 1e-9).floor().clamp(max=resolution - 1).long()
    parent, column = _ranges(first, last)
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


def _ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """All integers of the intervals [first, last], with the interval each belongs to."""
    counts = (last - first + 1).clamp(min=0)
    parent = torch.arange(len(first), device=first.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return parent, torch.arange(len(parent), device=first.device) - starts[parent] + first[parent]


def _weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges vertices that agree to 1e-6 in model space and drops the faces that collapse."""
    x, y, z = np.rint((vertices + 1) * 1e6).astype(np.int64).T
    # One integer of 63 bits is sorted many times faster than three columns.
    _, first, inverse = np.unique(x << 42 | y << 21 | z, return_index=True, return_inverse=True)
    faces = inverse[faces]
    proper = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return vertices[first], faces[proper]


def _crossed_edges(grid: BlockGrid, corners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Grid edges that a triangle crosses: the slots of their lower and upper samples `[2, n]`, axis `[n]`, crossing point
    `[n, 3]` in grid spacings, triangle `[n]`.
    """
    slots, axes, points, faces = [], [], [], []
    for axis in range(3):
        base, offset, face = _grid_crossings(corners, grid.resolution, axis)
        step = torch.eye(3, dtype=torch.int32, device=base.device)[axis]
        slots.append(torch.stack([grid.slots(base), grid.slots(base + step)]))
        axes.append(torch.full_like(face, axis))
        points.append(base + offset[:, None] * step)
        faces.append(face)
    return torch.cat(slots, dim=1), torch.cat(axes), torch.cat(points), torch.cat(faces)


def _release_barrier(grid: BlockGrid, outside: Tensor, coords: Tensor, crossed: Tensor) -> None:
    """
    Marks barrier samples `coords` as outside where an edge that is not crossed joins them to the outside. Three steps
    reach into concave corners, and keep what leaks through a crack local.
    """
    here = grid.slots(coords)
    open_neighbours = []
    for axis in range(3):
        for sign in (-1, 1):
            neighbour = grid.slots(coords + sign * torch.eye(3, dtype=coords.dtype, device=coords.device)[axis])
            closed = crossed[axis, here if sign > 0 else neighbour]
            open_neighbours.append(torch.where(closed, grid.size, neighbour))
    for _ in range(3):
        reached = torch.zeros(len(here), dtype=torch.bool, device=here.device)
        for neighbour in open_neighbours:
            reached |= outside[neighbour]
        outside[here[reached]] = True


def _thin_edges(slots: Tensor, axes: Tensor, points: Tensor, faces: Tensor, normals: Tensor) -> Tensor:
    """
    Of the crossed edges with both ends outside, those that pierce a sheet: once, or through two nearly parallel faces.
    Edges that graze a surface, or cut off a ridge between two samples, do not count.

    Returns:
        The slots at both ends, `[m]`.
    """
    order = points.gather(1, axes[:, None])[:, 0].argsort(stable=True)
    order = order[(3 * slots[0] + axes)[order].argsort(stable=True)]
    slots, axes, faces = slots[:, order], axes[order], faces[order]
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
        vertices, faces: the mesh, welded, without degenerate faces, as arrays; all others are tensors on the device.
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

        barrier = (self.distance <= BARRIER * self.spacing).nonzero()[:, 0]
        free = self.grid.full(True, torch.bool)
        free[self.slot[barrier]] = False
        self.outside = self.grid.flood_from_outside(free)
        corners, normals = torch.from_numpy(corners).to(device), torch.from_numpy(normals).to(device)
        ends, axes, points, faces = _crossed_edges(self.grid, (corners + 1) / self.spacing)
        crossed = torch.zeros(3, self.grid.size + 1, dtype=torch.bool, device=device)
        crossed[axes, ends[0]] = True
        _release_barrier(self.grid, self.outside, self.coords[barrier], crossed)

        ends_outside = self.outside[ends]
        self.boundary = points[ends_outside[0] != ends_outside[1]] * self.spacing - 1
        thin = ends_outside.all(dim=0).nonzero()[:, 0]
        self.code = torch.where(self.outside, OUTSIDE, SOLID).to(torch.uint8)
        self.code[_thin_edges(ends[:, thin], axes[thin], points[thin], faces[thin], normals)] |= SHEET
        self.code[self.grid.size] = 0

    def cells_of(self, points: np.ndarray) -> Tensor:
        """Grid cells `[n, 3]` int32 that hold the points `[n, 3]`."""
        cells = np.floor((points + 1) / self.spacing).clip(0, self.resolution - 2).astype(np.int32)
        return torch.from_numpy(cells).to(self.code.device)

    def code_around(self, cells: Tensor, reach: int = 1) -> Tensor:
        """
        Bitwise or of `code` over the samples around grid cells `[n, 3]` near the surface: their 8 corners, or 4^3
        samples for `reach=2`.
        """
        # Looked up once per distinct cell.
        base = self.grid.slots(cells)
        is_base = self.grid.full(False, torch.bool)
        is_base[base] = True
        is_base[self.grid.size] = False
        distinct = is_base.nonzero()[:, 0]
        corner = self.grid.coords(distinct)
        codes = torch.zeros(len(distinct), dtype=torch.uint8, device=base.device)
        span = range(1 - reach, 1 + reach)
        for offset in ((x, y, z) for x in span for y in span for z in span):
            codes |= self.code[self.grid.slots(corner + torch.tensor(offset, dtype=torch.int32, device=base.device))]
        result = self.grid.full(0, torch.uint8)
        result[distinct] = codes
        return result[base]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Whether points `[n, 3]` of the surface are on the outer surface: a corner of their grid cell is outside."""
        return (self.code_around(self.cells_of(points)) & OUTSIDE > 0).cpu().numpy()
