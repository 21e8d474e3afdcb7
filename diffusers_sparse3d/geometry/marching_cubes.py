"""
Marching cubes on sparse samples.

Follows the surface from cell to cell, so memory and time grow with the surface alone. Which edges and cells it crosses
is found in bits, 64 samples in a word; vertices and faces are then counted, and written to their places at once.
"""

from collections.abc import Iterator

import torch
import trimesh
from torch import Tensor

from .cell_table import CENTER, EDGES, FACES, triangle_table
from .sample_bits import (
    BIT_PASS_FACTOR,
    TILE_SAMPLES,
    RankedBits,
    allocate,
    bit_places,
    corner_planes,
    count_bits,
    flat_nonzero,
    offsets,
    places_in_rows,
    rows_with_bits,
    step_table,
    tile_chunk,
    transpose_bytes,
    with_zeros,
)
from .sparse_samples import SparseSamples
from .surface_completion import missing_corners


# Bits of an edge of a cell, where an edge or the three of a triangle are packed with others.
EDGE_BITS = 4


class _Cells:
    """
    The cells that the surface crosses.

    Attributes:
        crossings: `[M, 3, 8]` int64, planes of bits: the surface crosses the edge from the sample along x, y, z.
        crossed: `[M, 8]` int64, a plane of bits: it crosses the cell with the sample as its lowest corner.
        open_cells: `[n, 3]` int32, cells with corners on both sides that lack others.
        open_samples: `[n, 3]` int32, samples beside blocks without a tile in which it may cross cells.
    """

    def __init__(self, samples: SparseSamples):
        num_tiles, device = len(samples.known), samples.known.device
        self.crossings = allocate(24 * num_tiles, torch.int64, device).view(num_tiles, 3, 8)
        self.crossed = torch.empty(num_tiles, 8, dtype=torch.int64, device=device)
        self.open_cells = self._find(samples, torch.arange(num_tiles, device=device))
        self.open_samples = _open_samples(samples)

    def update(self, samples: SparseSamples, changed: Tensor) -> None:
        """Looks again where samples have been added, in the tiles `changed [m]`."""
        index = samples.index
        num_before, num_tiles = len(self.crossed), len(samples.known)
        if num_tiles > num_before:
            self.crossings = with_zeros(self.crossings, num_tiles - num_before)
            self.crossed = with_zeros(self.crossed, num_tiles - num_before)
        again = torch.zeros(num_tiles, dtype=torch.bool, device=changed.device)
        again[num_before:] = True
        # A cell belongs to the tile of its lowest corner.
        below = (index.blocks[changed, None] - index.steps()).clamp_(min=0)
        again[index.table[below].long()] = True
        again[0] = False
        self._find(samples, flat_nonzero(again))

    def _find(self, samples: SparseSamples, tiles: Tensor) -> Tensor:
        """Looks through `tiles [n]`, and returns the open cells there."""
        # Corner c of all cells of a tile, in the planes of `corner_planes`.
        corners = [(corner & 3, slice(corner >> 2, (corner >> 2) + 8)) for corner in range(8)]
        along_axes = [corners[4], corners[2], corners[1]]
        open_cells = []
        for group in tiles.split(BIT_PASS_FACTOR * tile_chunk(tiles.device)):
            around = samples.neighbours.index_select(0, group)
            known, inside = corner_planes(samples.known, around), corner_planes(samples.inside, around)
            crossings = []
            for plane, words in along_axes:
                differ = inside[0][:, :8] ^ inside[plane][:, words]
                crossings.append(differ.bitwise_and_(known[0][:, :8]).bitwise_and_(known[plane][:, words]))
            self.crossings.index_copy_(0, group, torch.stack(crossings, dim=1))

            complete = known[0] & known[1] & known[2] & known[3]
            some_inside = inside[0] | inside[1] | inside[2] | inside[3]
            some_outside = known[0].bitwise_xor_(inside[0])
            for plane in range(1, 4):
                some_outside |= known[plane].bitwise_xor_(inside[plane])
            mixed = (some_inside[:, :8] | some_inside[:, 1:]) & (some_outside[:, :8] | some_outside[:, 1:])
            crossed = complete[:, :8].bitwise_and(complete[:, 1:]).bitwise_and_(mixed)
            self.crossed.index_copy_(0, group, crossed)
            cell = bit_places(mixed.bitwise_xor_(crossed))
            place = (cell & (TILE_SAMPLES - 1)).add_(group.int().index_select(0, cell >> 9), alpha=TILE_SAMPLES)
            open_cells.append(samples.index.coords(place))
        return torch.cat(open_cells)


def _open_samples(samples: SparseSamples) -> Tensor:
    """See `_Cells`."""
    index = samples.index
    # Is there a tile below: by a face, by an edge?
    below = (index.blocks[:, None] - index.steps()[[4, 2, 1, 6, 5, 3]]).clamp_(min=0)
    no_tile = index.table.index_select(0, below.flatten()).view(-1, 6) == 0
    tile = (_sides_below(samples) & no_tile).any(dim=1).nonzero()[:, 0]
    place = bit_places(samples.known.index_select(0, tile))
    return index.coords((place & (TILE_SAMPLES - 1)).add_(tile.int().index_select(0, place >> 9), alpha=TILE_SAMPLES))


def _sides_below(samples: SparseSamples) -> Tensor:
    """
    `[M, 6]` bool: whether the samples at the lower faces (x, y, z) and edges (x and y, x and z, y and z) of the
    tiles, and the next ones of the tiles above, are on both sides.
    """
    next_z, next_y, next_yz, next_x, next_xz, next_xy = samples.neighbours[:, 1:7].unbind(1)
    first_of_rows = 0x0101010101010101
    on_both = None
    for plane in (samples.inside, samples.known ^ samples.inside):
        x_face = plane[:, 0]
        union = plane[:, :4] | plane[:, 4:]
        union = union[:, :2] | union[:, 2:]
        union = union[:, 0] | union[:, 1]
        y_face, z_face = union & 255, union & first_of_rows
        along_z, along_y, along_x, here = x_face & 255, x_face & first_of_rows, union & 1, x_face & 1
        # With the next samples of the tiles above.
        parts = [
            x_face | along_z[next_y] | along_y[next_z] | here[next_yz],
            y_face | along_z[next_x] | along_x[next_z] | here[next_xz],
            z_face | along_y[next_x] | along_x[next_y] | here[next_xy],
            along_z | here[next_z],
            along_y | here[next_y],
            along_x | here[next_x],
        ]
        some = torch.stack(parts, dim=1) != 0
        on_both = some if on_both is None else on_both & some
    return on_both


def _joined(corners: Tensor, faces: Tensor) -> Tensor:
    """Whether the inside corners of each face `[n, 6]` of cells with values `[n, 8]` are joined: by its saddle."""
    first, second, third, fourth = corners[:, faces].unbind(2)
    diagonal, other = first * third, second * fourth
    ambiguous = ((first < 0) == (third < 0)) & ((second < 0) == (fourth < 0)) & ((first < 0) != (second < 0))
    return ambiguous & torch.where(first < 0, diagonal > other, other > diagonal)


class _Configurations:
    """
    How the surface passes the cells that it crosses.

    Attributes:
        crossed: see `_Cells`.
        rows: `[n]` int16, the row of `triangle_table` of each cell, in the order of the bits of `crossed`.
    """

    def __init__(self, samples: SparseSamples, crossed: Tensor):
        device = crossed.device
        self.crossed = crossed
        sizes = count_bits(crossed)
        self._sizes = [int(size.sum()) for size in sizes.cpu().split(tile_chunk(device))]
        chunk = BIT_PASS_FACTOR * tile_chunk(device)
        self.rows = torch.empty(sum(self._sizes), dtype=torch.int16, device=device)
        has_ambiguous = triangle_table()[3].to(device)
        faces = torch.tensor(FACES, device=device)
        face_bits = 1 << torch.arange(6, device=device)
        start = 0
        firsts = range(0, len(self._sizes), BIT_PASS_FACTOR)
        results = self.rows.split([sum(self._sizes[first : first + BIT_PASS_FACTOR]) for first in firsts])
        for words, result in zip(crossed.split(chunk), results):
            # Almost all cells are on one side. Of the others, eight along z at once: their corners in eight bytes.
            rows, bits = rows_with_bits(words)
            rows.add_(64 * start)
            inside = transpose_bytes(samples.corners_of_rows(rows)).view(torch.uint8).index_select(0, bits)
            doubtful = flat_nonzero(has_ambiguous.index_select(0, inside.int()))
            result.copy_(inside).mul_(64)
            if len(doubtful):
                bits = bits.index_select(0, doubtful)
                joined = _joined(samples.cell_corners(places_in_rows(rows, bits)), faces) * face_bits
                result.index_add_(0, doubtful, joined.sum(dim=1).to(result.dtype))
            start += len(words)

    def rows_of_passes(self) -> Iterator[Tensor]:
        """Per pass, the configurations of its cells, `[n]` int32."""
        for rows in self.rows.split(self._sizes):
            yield rows.int()

    def passes(self, wanted: list[bool] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Per pass, the places of the cells' lowest corners and their configurations, `[n]` int32 each; of the passes
        `wanted` alone, if given.
        """
        chunk = tile_chunk(self.crossed.device)
        for number, (words, rows) in enumerate(zip(self.crossed.split(chunk), self.rows_of_passes())):
            if wanted is None or wanted[number]:
                yield bit_places(words).add_(TILE_SAMPLES * chunk * number), rows


def _to_model(grid: Tensor, resolution: int) -> Tensor:
    """From spacings of the grid to the model cube, in place."""
    return grid.clamp_(0, resolution - 1).mul_(2 / (resolution - 1)).sub_(1)


def _points_on_edges(samples: SparseSamples, place: Tensor, axis: Tensor) -> Tensor:
    """Where the surface crosses edges, in spacings, `[n, 3]` float64: see `SparseSamples.edge_ends`."""
    low, high = samples.edge_ends(place, axis)
    points = samples.index.coords(place).double()
    return points.scatter_add_(1, axis.long()[:, None], (low / (low - high)).double()[:, None])


def _write_vertices(samples: SparseSamples, crossings: Tensor, vertices: Tensor) -> None:
    """The vertices `[V, 3]` on the edges of the grid, in the order of the bits of `crossings`: see `_Cells`."""
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


class _Triangles:
    """
    `triangle_table` as crossed cells need it, on a device.

    Attributes:
        edges: `[T]` int32, the three edges of each triangle, `EDGE_BITS` for each, the first one lowest.
        starts, counts: `[256 * 64]` int32, where each configuration starts, and how many triangles it has.
        has_center: `[256 * 64]` uint8, whether it has a vertex inside the cell.
    """

    def __init__(self, device: torch.device):
        edges, starts, counts, _ = (tensor.to(device) for tensor in triangle_table())
        first, second, third = edges.int().unbind(1)
        self.edges = first | second << EDGE_BITS | third << 2 * EDGE_BITS
        self.starts, self.counts = starts.int(), counts.int()
        inner_before = torch.nn.functional.pad((third == CENTER).cumsum(0), (1, 0))
        self.has_center = (inner_before[starts + counts] > inner_before[starts]).to(torch.uint8)

    def of(self, row: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The triangles of cells with configurations `row [n]`: their edges, as in `edges`, and whose they are."""
        number = self.counts.index_select(0, row)
        of_cell = torch.repeat_interleave(number, output_size=count)
        before = self.starts.index_select(0, row).sub_(number.cumsum(0, dtype=torch.int32)).add_(number)
        triangle = torch.arange(len(of_cell), dtype=torch.int32, device=row.device)
        return self.edges.index_select(0, triangle.add_(before.index_select(0, of_cell))), of_cell

    def count(self, cells: _Configurations) -> list[tuple[int, int]]:
        """Per pass, how many triangles and vertices inside cells there are."""
        tables = (self.counts, self.has_center)
        sums = [torch.stack([table.index_select(0, row).sum() for table in tables]) for row in cells.rows_of_passes()]
        return torch.stack(sums).tolist()

    def inner(self, edges: Tensor) -> Tensor:
        """Which of triangles with `edges [n]` end in a vertex inside their cell, `[k]` int64."""
        return flat_nonzero(edges >> 2 * EDGE_BITS == CENTER)


def _center_vertices(
    samples: SparseSamples, cells: _Configurations, triangles: _Triangles, counts: list[tuple[int, int]]
) -> Tensor:
    """
    The vertices `[n, 3]` float64 inside cells: in the middle of those around each, which are the first ones of the
    triangles that it ends. `counts`: see `_Triangles.count`.
    """
    device = samples.known.device
    corner, axis = torch.tensor(EDGES, device=device).unbind(1)
    steps = offsets(range(2), device)
    centers = [torch.empty(0, 3, dtype=torch.float64, device=device)]
    for cell, row in cells.passes([num_centers > 0 for _, num_centers in counts]):
        has_center = flat_nonzero(triangles.has_center.index_select(0, row))
        cell, row = cell[has_center], row[has_center]
        edges, center = triangles.of(row)
        inner = triangles.inner(edges)
        edge, center = edges[inner] & (1 << EDGE_BITS) - 1, center[inner]
        values = samples.cell_corners(cell)
        low, high = values[center, corner[edge]], values[center, corner[edge] + (4 >> axis[edge])]
        points = (samples.index.coords(cell)[center] + steps[corner[edge]]).double()
        points.scatter_add_(1, axis[edge, None], (low / (low - high)).double()[:, None])
        total = points.new_zeros(len(cell), 3).index_add_(0, center, points)
        centers.append(total / torch.bincount(center)[:, None])
    return torch.cat(centers)


def _write_faces(
    cells: _Configurations,
    triangles: _Triangles,
    edges: RankedBits,
    counts: list[tuple[int, int]],
    faces: Tensor,
) -> None:
    """
    The faces `[F, 3]` of the crossed cells, in their order.

    Args:
        edges: those that the surface crosses, which number the vertices; the ones inside cells come after them.
        counts: per pass, the triangles and the vertices inside cells.
    """
    device = faces.device
    # Entries for edges that no cell has are there for shifts instead of products.
    corner, axis = torch.tensor(EDGES + [(0, 0)] * ((1 << EDGE_BITS) - len(EDGES)), device=device).unbind(1)
    steps = step_table(offsets(range(2), device)[corner], axis.tolist())
    num_vertices = len(edges)
    parts = faces.split([num_triangles for num_triangles, _ in counts])
    for (cell, row), (num_triangles, num_centers), part in zip(cells.passes(), counts, parts):
        packed, of_cell = triangles.of(row, num_triangles)
        cell = cell.index_select(0, of_cell)
        tile, local = (cell >> 9).mul_(8), cell.bitwise_and_(TILE_SAMPLES - 1).mul_(1 << EDGE_BITS)
        for index in range(3):
            edge = (packed >> EDGE_BITS * index).bitwise_and_((1 << EDGE_BITS) - 1).add_(local)
            part[:, index] = edges.numbers(tile, steps.index_select(0, edge))
        if num_centers:
            number = triangles.has_center.index_select(0, row).cumsum(0, dtype=torch.int32).add_(num_vertices - 1)
            inner = triangles.inner(packed)
            part[inner, 2] = number[of_cell[inner]]
        num_vertices += num_centers


def _check(feats: Tensor, coords: Tensor, resolution: int) -> None:
    if coords.ndim != 2 or coords.shape[1] not in (3, 4) or coords.is_floating_point():
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
        raise ValueError("`coords` must belong to one sample; split the batch first.")
    if not (min(low[-3:]) >= 0 and max(high[-3:]) < resolution):
        raise ValueError(f"`coords` must lie in [0, {resolution}).")


def sparse_marching_cubes(feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0) -> tuple[Tensor, Tensor]:
    """
    Iso-surface of a sparse signed distance field, by marching cubes on the active cells alone.

    Vertices lie on the grid's edges by linear interpolation, each once: those of marching cubes on the dense grid.
    Ambiguous faces are resolved by the sign of the bilinear saddle, the same from both sides, and a few ambiguous
    cells get one vertex inside, so the surface is closed and each of its edges belongs to two triangles. The part of
    the grid without samples takes the side of the samples next to it, and what lies outside the grid is
    outside the object: a shape that the grid cuts off is closed there.

    The order does not depend on that of the rows. Blocks of 8^3 samples come in ascending (x, y, z) order, those that
    only the closing of the surface adds after all others. Vertices: by block, axis of their edge, and sample (x, y,
    z); then those inside cells. Faces: by cell, as blocks and samples.

    Args:
        feats: `[N, 1]` or `[N]`, s / tau, negative inside; any floating dtype.
        coords: `[N, 4]` (batch, x, y, z) integers, all of one sample, or `[N, 3]`.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        level: the iso-level, in the units of `feats`.

    Returns:
        Vertices `[V, 3]` float32 in the model cube [-1, 1]^3, and faces `[F, 3]` int32, turned outward, on the device
        of `coords`. Both are empty without a crossing.

    Raises:
        ValueError: if `feats` is not finite, `coords` holds several samples, leaves the grid or repeats a row, or
            shapes differ, or they fill more than two million blocks of 8^3 samples.
    """
    _check(feats, coords, resolution)
    device = coords.device
    if len(coords) == 0:
        return torch.zeros(0, 3, device=device), torch.zeros(0, 3, dtype=torch.int32, device=device)
    feats, coords = feats.detach().reshape(-1), coords[:, -3:]
    samples = SparseSamples.from_rows(feats, coords, resolution, level)
    cells = _Cells(samples)
    if len(cells.open_cells) or len(cells.open_samples):
        cells.update(samples, samples.add(*missing_corners(samples, cells.open_cells, cells.open_samples)))
    crossings = cells.crossings
    edges, configurations = RankedBits(crossings, samples.neighbours), _Configurations(samples, cells.crossed)
    del cells
    triangles = _Triangles(device)
    counts = triangles.count(configurations)
    centers = _center_vertices(samples, configurations, triangles, counts)
    faces = allocate(3 * sum(count for count, _ in counts), torch.int32, device).view(-1, 3)
    _write_faces(configurations, triangles, edges, counts, faces)
    # Vertices need nothing else of the cells, and no more than values of the samples.
    num_on_edges = len(edges)
    del edges, configurations
    samples.keep_values()
    vertices = allocate(3 * (num_on_edges + len(centers)), torch.float32, device).view(-1, 3)
    _write_vertices(samples, crossings, vertices[:num_on_edges])
    vertices[num_on_edges:] = _to_model(centers, resolution)
    return vertices, faces


def sparse_sdf_to_mesh(feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0) -> trimesh.Trimesh:
    """
    The surface of `sparse_marching_cubes` as a mesh: for its arguments, and the errors raised, see there.

    Returns:
        A `trimesh.Trimesh` in the model cube [-1, 1]^3, faces turned outward. Without a crossing it is empty.
    """
    vertices, faces = sparse_marching_cubes(feats, coords, resolution, level)
    return trimesh.Trimesh(vertices.cpu().numpy(), faces.cpu().numpy(), process=False)
