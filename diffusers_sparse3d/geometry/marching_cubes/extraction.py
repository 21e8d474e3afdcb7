"""
The iso-surface of a sparse signed distance field, by marching cubes on the crossed cells alone.

Memory and time grow with the surface. The crossed edges and cells are found in planes of bits; vertices and faces are
counted first, and then written to their final places.
"""

from typing import NamedTuple

import torch
import trimesh
from torch import Tensor

from ...checks import check_integer, check_number
from ...ops.checks import check_floating
from ...ops.coordinates import MAX_RESOLUTION
from .cell_table import CENTER, EDGES, triangle_table
from .crossed_cells import CellConfigurations, CrossedCells
from .sample_bits import (
    TILE_SAMPLES,
    RankedBits,
    allocate,
    bit_places,
    flat_nonzero,
    offsets,
    step_table,
    tile_chunk,
)
from .sparse_samples import SparseSamples
from .surface_completion import missing_corners


# Bits for the index of a cell's edge where several indices are packed into one integer.
EDGE_BITS = 4


class PassCounts(NamedTuple):
    """The number of triangles in one pass over the crossed cells, and of vertices inside its cells."""

    triangles: int
    centers: int


def _to_model(grid: Tensor, resolution: int) -> Tensor:
    """Converts coordinates in grid spacings to model space, in place."""
    return grid.clamp_(0, resolution - 1).mul_(2 / (resolution - 1)).sub_(1)


def _points_on_edges(samples: SparseSamples, place: Tensor, axis: Tensor) -> Tensor:
    """The points `[n, 3]` float64 in grid spacings where the surface crosses edges: see `SparseSamples.edge_ends`."""
    low, high = samples.edge_ends(place, axis)
    points = samples.index.coords(place).double()
    return points.scatter_add_(1, axis.long()[:, None], (low / (low - high)).double()[:, None])


def _write_vertices(samples: SparseSamples, crossings: Tensor, vertices: Tensor) -> None:
    """
    Writes the vertices on the edges of the grid.

    Args:
        samples: the field.
        crossings: `[M, 3, 8]` int64, see `CrossedCells`.
        vertices: `[V, 3]`, the result, in model space, in the order of the bits of `crossings`.
    """
    device, chunk = vertices.device, tile_chunk(vertices.device)
    axes = torch.arange(3, dtype=torch.int32, device=device).repeat(chunk)
    planes = torch.arange(chunk, dtype=torch.int32, device=device).repeat_interleave(3) * TILE_SAMPLES
    first_place = first = 0
    for words in crossings.split(chunk):
        bits = bit_places(words)
        plane = bits >> 9
        place = bits.bitwise_and_(TILE_SAMPLES - 1).add_(planes.index_select(0, plane)).add_(first_place)
        points = _points_on_edges(samples, place, axes.index_select(0, plane))
        vertices[first : first + len(points)] = _to_model(points, samples.index.resolution)
        first_place += TILE_SAMPLES * len(words)
        first += len(points)


class _TriangleTable:
    """
    `triangle_table` in the form that vectorised look-ups need, on a device.

    Attributes:
        edges: `[T]` int32, the three edges of each triangle, `EDGE_BITS` for each, the first one lowest.
        starts, counts: `[256 * 64]` int32, the first triangle of each configuration, and their number.
        has_center: `[256 * 64]` uint8, whether the configuration has a vertex inside the cell.
    """

    def __init__(self, device: torch.device):
        edges, starts, counts, _ = (tensor.to(device) for tensor in triangle_table())
        first, second, third = edges.int().unbind(1)
        self.edges = first | second << EDGE_BITS | third << 2 * EDGE_BITS
        self.starts, self.counts = starts.int(), counts.int()
        inner_before = torch.nn.functional.pad((third == CENTER).cumsum(0), (1, 0))
        self.has_center = (inner_before[starts + counts] > inner_before[starts]).to(torch.uint8)

    def triangles_of_cells(self, row: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        """
        The triangles of cells, sorted by cell.

        Args:
            row: `[n]` int32, the configurations of the cells.
            count: the number of triangles, if known; it saves a GPU a synchronisation.

        Returns:
            The edges `[t]` int32 of each triangle, packed as in `edges`, and the index `[t]` of its cell in `row`.
        """
        number = self.counts.index_select(0, row)
        of_cell = torch.repeat_interleave(number, output_size=count)
        before = self.starts.index_select(0, row).sub_(number.cumsum(0, dtype=torch.int32)).add_(number)
        triangle = torch.arange(len(of_cell), dtype=torch.int32, device=row.device)
        return self.edges.index_select(0, triangle.add_(before.index_select(0, of_cell))), of_cell

    def count(self, cells: CellConfigurations) -> list[PassCounts]:
        """The number of triangles, and of vertices inside cells, in each pass."""
        tables = (self.counts, self.has_center)
        sums = [torch.stack([table.index_select(0, row).sum() for table in tables]) for row in cells.rows_of_passes()]
        return [PassCounts(*row) for row in torch.stack(sums).tolist()]

    def inner(self, edges: Tensor) -> Tensor:
        """The indices `[k]` int64 of the triangles with packed `edges [t]` that end in a vertex inside their cell."""
        return flat_nonzero(edges >> 2 * EDGE_BITS == CENTER)


def _center_vertices(
    samples: SparseSamples, cells: CellConfigurations, table: _TriangleTable, counts: list[PassCounts]
) -> Tensor:
    """
    The vertices inside cells, `[n, 3]` float64 in grid spacings, in the order of their cells.

    Each is the mean of the vertices around it, which are the first vertices of the triangles that end in it.
    """
    device = samples.known.device
    corner, axis = torch.tensor(EDGES, device=device).unbind(1)
    steps = offsets(range(2), device)
    centers = [torch.empty(0, 3, dtype=torch.float64, device=device)]
    for cell, row in cells.passes([count.centers > 0 for count in counts]):
        has_center = flat_nonzero(table.has_center.index_select(0, row))
        cell, row = cell[has_center], row[has_center]
        edges, center = table.triangles_of_cells(row)
        inner = table.inner(edges)
        edge, center = edges[inner] & (1 << EDGE_BITS) - 1, center[inner]
        values = samples.cell_corners(cell)
        low, high = values[center, corner[edge]], values[center, corner[edge] + (4 >> axis[edge])]
        points = (samples.index.coords(cell)[center] + steps[corner[edge]]).double()
        points.scatter_add_(1, axis[edge, None], (low / (low - high)).double()[:, None])
        total = points.new_zeros(len(cell), 3).index_add_(0, center, points)
        centers.append(total / torch.bincount(center)[:, None])
    return torch.cat(centers)


def _write_faces(
    cells: CellConfigurations,
    table: _TriangleTable,
    edges: RankedBits,
    counts: list[PassCounts],
    faces: Tensor,
) -> None:
    """
    Writes the faces of the crossed cells, in the order of the cells.

    Args:
        cells: the crossed cells.
        table: the triangles of each configuration.
        edges: the crossed edges; their numbers are those of the vertices. The vertices inside cells follow after them.
        counts: the size of each pass.
        faces: `[F, 3]` int32, the result.
    """
    device = faces.device
    # Padded to a power of two, so that products of edge numbers become shifts.
    corner, axis = torch.tensor(EDGES + [(0, 0)] * ((1 << EDGE_BITS) - len(EDGES)), device=device).unbind(1)
    steps = step_table(offsets(range(2), device)[corner], axis.tolist())
    num_vertices = len(edges)
    parts = faces.split([count.triangles for count in counts])
    for (cell, row), count, part in zip(cells.passes(), counts, parts):
        packed, of_cell = table.triangles_of_cells(row, count.triangles)
        cell = cell.index_select(0, of_cell)
        tile, local = (cell >> 9).mul_(8), cell.bitwise_and_(TILE_SAMPLES - 1).mul_(1 << EDGE_BITS)
        for index in range(3):
            edge = (packed >> EDGE_BITS * index).bitwise_and_((1 << EDGE_BITS) - 1).add_(local)
            part[:, index] = edges.numbers(tile, steps.index_select(0, edge))
        if count.centers:
            number = table.has_center.index_select(0, row).cumsum(0, dtype=torch.int32).add_(num_vertices - 1)
            inner = table.inner(packed)
            part[inner, 2] = number[of_cell[inner]]
        num_vertices += count.centers


def check_field(feats: Tensor, coords: Tensor, resolution: int) -> None:
    """Raises an error for arguments of `sparse_marching_cubes` with wrong types, shapes, dtypes or coordinates."""
    check_floating(feats=feats)
    if not isinstance(coords, Tensor):
        raise TypeError(f"`coords` must be a tensor, got {type(coords).__name__}.")
    if coords.ndim != 2 or coords.shape[1] not in (3, 4) or coords.dtype.is_floating_point or coords.is_complex():
        raise ValueError(
            f"`coords` must be integers of shape [N, 4] or [N, 3], got {coords.dtype} {list(coords.shape)}."
        )
    if feats.numel() != len(coords):
        raise ValueError(
            f"`feats` must have one value per row of `coords`, got {list(feats.shape)} for {len(coords)}."
        )
    if len(coords) == 0:
        return
    low, high = torch.stack(coords.aminmax(dim=0)).tolist()
    if low[:-3] != high[:-3]:
        raise ValueError(f"`coords` must belong to one sample of a batch, got samples {low[0]} to {high[0]}.")
    low, high = min(low[-3:]), max(high[-3:])
    if low < 0 or high >= resolution:
        raise ValueError(f"`coords` must lie in [0, {resolution}), got {low} to {high}.")


def sparse_marching_cubes(feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0) -> tuple[Tensor, Tensor]:
    """
    Vertices and faces of the iso-surface of a sparse signed distance field.

    The vertices on the edges of the grid are those of marching cubes on the dense volume, by linear interpolation,
    each once. Ambiguous faces are resolved by the sign of the bilinear saddle, alike from both sides, and a few
    ambiguous cells get one vertex inside, so that the surface is closed and each of its edges belongs to two
    triangles. Where the surface leaves the samples, it is completed (see `surface_completion.missing_corners`). Space
    outside the grid
    is outside the object: a shape that the grid cuts off is closed there.

    The result does not depend on the order of the rows. Vertices are sorted by block of 8^3 samples, axis of their
    edge and sample, in ascending (x, y, z) order, with the vertices inside cells after all others. Faces are sorted by
    block and cell. Blocks that only the completion of the surface adds come after the others.

    Args:
        feats: `[N, 1]` or `[N]`, s / tau, negative inside; any floating dtype.
        coords: `[N, 4]` integers (batch, x, y, z), all of one sample of the batch, or `[N, 3]`; distinct.
        resolution: samples per axis, from 2 to 2048; sample i lies at `-1 + 2 i / (resolution - 1)`.
        level: the iso-level, in the units of `feats`.

    Returns:
        Vertices `[V, 3]` float32 in the model cube [-1, 1]^3, and faces `[F, 3]` int32, oriented outward, on the
        device of `coords`. Both are empty if the surface crosses no cell.

    Raises:
        TypeError: if `feats` or `coords` is no tensor.
        ValueError: if `resolution` or `level` is out of range, `feats` is not finite, `coords` holds several samples
            of a batch, leaves the grid, repeats a row or touches more than 2^21 blocks of 8^3 samples, or the shapes
            or dtypes differ from the above.
    """
    resolution, level = check_integer("resolution", resolution, 2, MAX_RESOLUTION), check_number("level", level)
    check_field(feats, coords, resolution)
    device = coords.device
    if len(coords) == 0:
        return torch.zeros(0, 3, device=device), torch.zeros(0, 3, dtype=torch.int32, device=device)
    feats, coords = feats.detach().reshape(-1), coords[:, -3:]
    samples = SparseSamples.from_rows(feats, coords, resolution, level)
    cells = CrossedCells(samples)
    if len(cells.open_cells) or len(cells.open_samples):
        cells.update(samples, samples.add(*missing_corners(samples, cells.open_cells, cells.open_samples)))
    crossings = cells.crossings
    edges, configurations = RankedBits(crossings, samples.neighbours), CellConfigurations(samples, cells.crossed)
    del cells
    table = _TriangleTable(device)
    counts = table.count(configurations)
    centers = _center_vertices(samples, configurations, table, counts)
    faces = allocate(3 * sum(count.triangles for count in counts), torch.int32, device).view(-1, 3)
    _write_faces(configurations, table, edges, counts, faces)
    # Vertices come last, because they need neither the cells nor more than the values of the samples: the peak of
    # memory is lower.
    num_on_edges = len(edges)
    del edges, configurations
    samples.keep_values()
    vertices = allocate(3 * (num_on_edges + len(centers)), torch.float32, device).view(-1, 3)
    _write_vertices(samples, crossings, vertices[:num_on_edges])
    vertices[num_on_edges:] = _to_model(centers, resolution)
    return vertices, faces


def sparse_sdf_to_mesh(feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0) -> trimesh.Trimesh:
    """
    The iso-surface of a sparse signed distance field as a mesh, by [`sparse_marching_cubes`].

    Args:
        feats: `[N, 1]` or `[N]`, s / tau, negative inside; any floating dtype.
        coords: `[N, 4]` integers (batch, x, y, z), all of one sample of the batch, or `[N, 3]`; distinct.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        level: the iso-level, in the units of `feats`.

    Returns:
        A `trimesh.Trimesh` in the model cube [-1, 1]^3, faces oriented outward; empty if the surface crosses no cell.

    Raises:
        ValueError: as [`sparse_marching_cubes`].
    """
    vertices, faces = sparse_marching_cubes(feats, coords, resolution, level)
    return trimesh.Trimesh(vertices.cpu().numpy(), faces.cpu().numpy(), process=False)
