"""
Marching cubes on sparse samples.

Follows the surface from cell to cell, so memory and time grow with the surface alone. The table is derived from one
rule per cube face, which both cells of a face share: the surface is closed, and every edge belongs to two triangles.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import trimesh
from torch import Tensor


BLOCK_SIZE = 8
# How far, in samples, the surface is followed out of the sampled region: two latent blocks.
MAX_EXTENSION = 16
# From here on, what the samples around an empty block say of its side is clear.
CLEAR_SIDE = 0.5
RELAXATION_STEPS = 32
# Tiles in one pass: few enough for a CPU's cache, or to fill a GPU.
TILE_CHUNK = {"cpu": 1 << 9, "cuda": 1 << 14}

# Corner c of a cell is at (c >> 2 & 1, c >> 1 & 1, c & 1). An edge is (lower corner, axis).
_EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> (2 - axis) & 1]
# The index after the edges: a vertex inside the cell.
_CENTER = len(_EDGES)
# Corners of each face in cyclic order, counter-clockwise seen from outside the cell.
_FACES = [
    (0, 1, 3, 2),  # x = 0
    (4, 6, 7, 5),  # x = 1
    (0, 4, 5, 1),  # y = 0
    (2, 3, 7, 6),  # y = 1
    (0, 2, 6, 4),  # z = 0
    (1, 5, 7, 3),  # z = 1
]


def _edge_between(first: int, second: int) -> int:
    low, high = min(first, second), max(first, second)
    return _EDGES.index((low, {4: 0, 2: 1, 1: 2}[high - low]))


def _face_segments(face: tuple[int, ...], inside: list[bool], joined: bool) -> list[tuple[int, int]]:
    """
    Directed segments (from edge, to edge) of the surface on one face; with the direction chosen so that the loops they
    form turn their front to the outside. `joined` connects the two inside corners of an ambiguous face.
    """
    flags = [inside[corner] for corner in face]
    edges = [_edge_between(face[i], face[(i + 1) % 4]) for i in range(4)]
    entering = [edges[i] for i in range(4) if not flags[i] and flags[(i + 1) % 4]]
    leaving = [edges[i] for i in range(4) if flags[i] and not flags[(i + 1) % 4]]
    if len(entering) < 2:
        return list(zip(entering, leaving))
    # Around the face the edges alternate: each entering edge is followed by the leaving edge of the same corner.
    start = edges.index(entering[0])
    cycle = [edges[(start + i) % 4] for i in range(4)]
    if joined:
        return [(cycle[0], cycle[3]), (cycle[2], cycle[1])]
    return [(cycle[0], cycle[1]), (cycle[2], cycle[3])]


def _triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """
    Triangulates a loop of cell edges without diagonals in a face of the cell, where they could meet a diagonal of the
    next cell: around a vertex in its middle if there is no other way.
    """

    def in_face(first: int, second: int) -> bool:
        return any(set(_ends(first)) <= set(face) and set(_ends(second)) <= set(face) for face in _FACES)

    @cache
    def best(start: int, end: int) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        if end - start < 2:
            return 0, ()
        options = []
        for middle in range(start + 1, end):
            left, right = best(start, middle), best(middle, end)
            cost = left[0] + right[0]
            cost += middle - start > 1 and in_face(loop[start], loop[middle])
            cost += end - middle > 1 and in_face(loop[middle], loop[end])
            options.append((cost, left[1] + ((loop[start], loop[middle], loop[end]),) + right[1]))
        return min(options)

    cost, triangles = best(0, len(loop) - 1)
    return [(*edge, _CENTER) for edge in zip(loop, loop[1:] + loop[:1])] if cost else list(triangles)


def _ends(edge: int) -> tuple[int, int]:
    corner, axis = _EDGES[edge]
    return corner, corner | 4 >> axis


@lru_cache(maxsize=1)
def _triangle_table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Triangles of every cell configuration, those of a configuration one after the other.

    Returns:
        `[T, 3]` int8, edges of each triangle, `_CENTER` for a vertex inside the cell (always last); `[256 * 64]`
        int64, where each configuration starts, and how many triangles it has; `[256]` bool, whether there is an
        ambiguous face. Configuration: 64 * (bit c: corner c is inside) + (bit f: inside corners of face f are joined).
    """
    triangles: list[tuple[int, int, int]] = []
    starts, counts = torch.zeros(2, 256 * 64, dtype=torch.int64)
    has_ambiguous = torch.zeros(256, dtype=torch.bool)
    for corners in range(256):
        inside = [bool(corners >> corner & 1) for corner in range(8)]
        ambiguous = [
            index
            for index, face in enumerate(_FACES)
            if inside[face[0]] == inside[face[2]] != inside[face[1]] == inside[face[3]]
        ]
        has_ambiguous[corners] = bool(ambiguous)
        ambiguous_bits = sum(1 << index for index in ambiguous)
        for joined in range(64):
            if joined & ~ambiguous_bits:
                continue
            follow = {}
            for index, face in enumerate(_FACES):
                follow.update(_face_segments(face, inside, bool(joined >> index & 1)))
            row = 64 * corners + joined
            starts[row] = len(triangles)
            while follow:
                loop = [min(follow)]
                while (following := follow.pop(loop[-1])) != loop[0]:
                    loop.append(following)
                triangles += _triangulate(loop)
            counts[row] = len(triangles) - starts[row]
    return torch.tensor(triangles, dtype=torch.int8), starts, counts, has_ambiguous


class _Samples:
    """
    Random access to sparse samples, stored as tiles of 8^3, NaN where there is no sample. What lies outside the grid
    is outside the object; tiles at the border have neighbours out there that say so.

    Attributes:
        table: `[P^3]` int32, the tile of each block of the grid, 0 where there is none; the grid has one block of
            margin on each side.
        tiles: `[M, 8, 8, 8]` float32; tile 0 has no sample.
        blocks: `[M]` int64, place of each tile in `table`.
    """

    def __init__(self, coords: Tensor, values: Tensor, resolution: int):
        self.resolution = resolution
        self.per_axis = -(-resolution // BLOCK_SIZE) + 2
        self.table = torch.zeros(self.per_axis**3, dtype=torch.int32, device=coords.device)
        self.tiles = values.new_full((1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), torch.nan)
        self.blocks = torch.zeros(1, dtype=torch.int64, device=coords.device)
        self.store(coords, values)

    def address(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place in the block, `[n]` int32 each, of samples `[n, 3]` int32 up to 8 outside the grid."""
        x, y, z = (axis + BLOCK_SIZE for axis in coords.unbind(1))
        block = ((x >> 3) * self.per_axis + (y >> 3)) * self.per_axis + (z >> 3)
        return block, (x & 7) << 6 | (y & 7) << 3 | (z & 7)

    def block_coords(self, blocks: Tensor) -> Tensor:
        """`[n, 3]` int32: the position of blocks `[n]` on the grid of blocks with its margin."""
        size = self.per_axis
        return torch.stack([blocks // size**2, blocks // size % size, blocks % size], dim=1).int()

    def in_margin(self, position: Tensor) -> Tensor:
        """Whether blocks at `position [n, 3]` have no sample of the grid, `[n]`."""
        return ((position == 0) | (BLOCK_SIZE * (position - 1) >= self.resolution)).any(dim=1)

    def store(self, coords: Tensor, values: Tensor) -> None:
        block, local = self.address(coords)
        touched = torch.zeros(len(self.table), dtype=torch.bool, device=coords.device)
        touched[block] = True
        self.add_tiles((touched & (self.table == 0)).nonzero()[:, 0])
        self.tiles.view(-1)[self.table[block].long() * BLOCK_SIZE**3 + local] = values

    def add_tiles(self, blocks: Tensor) -> None:
        """Tiles without samples for blocks `[n]`, and tiles in the margin beside them."""
        position = self.block_coords(blocks)
        at_border = ((position == 1) | (BLOCK_SIZE * position >= self.resolution)).any(dim=1)
        around = (position[at_border][:, None] + _offsets(range(-1, 2), blocks.device)).reshape(-1, 3)
        around = around[self.in_margin(around)].long()
        margin = ((around[:, 0] * self.per_axis + around[:, 1]) * self.per_axis + around[:, 2]).unique()
        blocks = torch.cat([blocks, margin[self.table[margin] == 0]])
        position = self.block_coords(blocks)
        first = len(self.tiles)
        tiles = self.tiles.new_full((first + len(blocks), *self.tiles.shape[1:]), torch.nan)
        tiles[:first] = self.tiles
        beyond = ((position == 0) | (BLOCK_SIZE * position > self.resolution)).any(dim=1).nonzero()[:, 0]
        sample = BLOCK_SIZE * (position[beyond] - 1)[:, None] + _offsets(range(BLOCK_SIZE), blocks.device)
        outside = ((sample < 0) | (sample >= self.resolution)).any(dim=2)
        tiles[first + beyond] = torch.where(outside, 1.0, torch.nan).view(-1, *tiles.shape[1:])
        self.table[blocks] = torch.arange(first, len(tiles), dtype=torch.int32, device=blocks.device)
        self.tiles, self.blocks = tiles, torch.cat([self.blocks, blocks])

    def lookup(self, coords: Tensor, beyond: float = 1.0) -> Tensor:
        """Values `[n]` at `[n, 3]`: NaN where there is no sample, `beyond` outside the grid."""
        block, local = self.address(coords.clamp(-1, self.resolution))
        values = self.tiles.view(-1)[self.table[block].long() * BLOCK_SIZE**3 + local]
        in_grid = ((coords >= 0) & (coords < self.resolution)).all(dim=1)
        return torch.where(in_grid, values, beyond)

    def coords(self, address: Tensor) -> Tensor:
        """`[n, 3]` int32: the samples at `address [n]`, 512 * tile + place in the tile."""
        local = address & (BLOCK_SIZE**3 - 1)
        place = torch.stack([local >> 6, local >> 3 & 7, local & 7], dim=1).int()
        return BLOCK_SIZE * (self.block_coords(self.blocks[address >> 9]) - 1) + place


def _empty_sides(samples: _Samples) -> Tensor:
    """
    The side `[P^3]` in [-1, 1] that blocks without any sample are on; 0 for all others.

    It spreads from the faces of the blocks with samples, as heat does: a few wrong samples, or a hole in the surface,
    leave it clear elsewhere. Blocks far from all samples stay near 0; no surface gets there.
    """
    shape = (samples.per_axis,) * 3
    tiles = samples.tiles.clamp(-1, 1)
    empty = samples.table == 0
    empty[samples.blocks[samples.in_margin(samples.block_coords(samples.blocks))]] = True
    empty = empty.view(shape)
    total, count = torch.zeros(2, *shape, device=empty.device)
    neighbours = []
    for axis in range(3):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        for here, there, place in ((ahead, behind, BLOCK_SIZE - 1), (behind, ahead, 0)):
            here, there = tuple(here), tuple(there)
            means = tiles.select(axis + 1, place).flatten(1).nanmean(dim=1)
            face = torch.where(empty, torch.nan, means[samples.table].view(shape))[there]
            total[here] += face.nan_to_num()
            count[here] += ~face.isnan() | empty[there]
            neighbours.append((here, there))
    side = torch.zeros_like(total)
    for _ in range(RELAXATION_STEPS):
        spread = total.clone()
        for here, there in neighbours:
            spread[here] += side[there]
        side = torch.where(empty, spread / count.clamp(min=1), 0)
    return side.flatten()


def _offsets(span: range, device: torch.device) -> Tensor:
    axis = torch.arange(span.start, span.stop, device=device, dtype=torch.int32)
    return torch.cartesian_prod(axis, axis, axis)


def _unique_coords(coords: Tensor, resolution: int) -> Tensor:
    """The distinct rows `[m, 3]` int32 of `[n, 3]`, each axis in -1..resolution, ascending."""
    size = resolution + 2
    x, y, z = (coords.long() + 1).unbind(1)
    keys = ((x * size + y) * size + z).unique()
    return torch.stack([keys // size**2, keys // size % size, keys % size], dim=1).int() - 1


def _halo(tiles: Tensor, neighbours: Tensor) -> Tensor:
    """`[m, 9, 9, 9]`: `tiles [M, 8, 8, 8]` with the next samples of the tiles above, `neighbours [m, 8]`."""
    size = BLOCK_SIZE
    halo = tiles.new_empty(len(neighbours), size + 1, size + 1, size + 1)
    for index in range(8):
        upper = [index >> shift & 1 for shift in (2, 1, 0)]
        place = tuple(slice(size, None) if flag else slice(size) for flag in upper)
        rows = tiles[(slice(None), *(slice(1) if flag else slice(None) for flag in upper))]
        halo[(slice(None), *place)] = rows.index_select(0, neighbours[:, index])
    return halo


@dataclass
class _Scan:
    """
    What the samples say of the surface.

    Attributes:
        neighbours: `[M, 8]` int32, the tiles around the upper corner of each tile, itself first.
        crossings: `[M, 8, 8, 8]` int32, for each sample 8 * (number of its first vertex) + (bit a: the surface crosses
            the edge from it along axis a); vertices are numbered by sample, then axis.
        vertices: `[E, 3]` float64, in grid spacings.
        cells: per chunk of tiles, the cells that the surface crosses, `[n]` int64 as 512 * tile + place of the lowest
            corner, and their configurations `[n]` int64.
        open_cells: `[n, 3]` int32, cells that it crosses which lack a corner, and some that it does not cross.
        open_samples: `[n, 3]` int32, samples beside blocks without a tile in which it may cross cells.
    """

    neighbours: Tensor
    crossings: Tensor
    vertices: Tensor
    cells: list[tuple[Tensor, Tensor]]
    open_cells: Tensor
    open_samples: Tensor


def _scan(samples: _Samples) -> _Scan:
    """One pass over all tiles, in chunks that fit a cache."""
    device, size, step = samples.table.device, BLOCK_SIZE, samples.per_axis
    corner = _offsets(range(2), device).long()
    place = (corner * torch.tensor([step * step, step, 1], device=device)).sum(dim=1)
    last = len(samples.table) - 1
    neighbours = samples.table[(samples.blocks[:, None] + place).clamp(max=last)]
    # A block below that has no tile: by a face, then by an edge.
    lower = samples.table[(samples.blocks[:, None] - place[[4, 2, 1, 6, 5, 3]]).clamp(min=0)] == 0
    has_ambiguous = _triangle_table()[3].to(device)
    faces = torch.tensor(_FACES, device=device)
    bits = 1 << torch.arange(6, device=device)
    halo_corner = (corner * torch.tensor([81, 9, 1], device=device)).sum(dim=1)
    axis_step, halo_step = torch.eye(3, device=device), torch.tensor([81, 9, 1], device=device)

    crossings = torch.zeros(samples.tiles.shape, dtype=torch.int32, device=device)
    vertices, cells, open_cells, open_sides = [], [], [], []
    num_vertices = 0
    for start in range(1, len(samples.tiles), TILE_CHUNK[device.type]):
        stop = min(start + TILE_CHUNK[device.type], len(samples.tiles))
        halo = _halo(samples.tiles, neighbours[start:stop])
        # One bit for inside and one for outside, a byte apart; none where there is no sample.
        code = (halo < 0).short() + ((halo >= 0).short() << 8)
        here = code[:, :size, :size, :size]
        cross = torch.stack(
            [
                here | code[:, 1:, :size, :size],
                here | code[:, :size, 1:, :size],
                here | code[:, :size, :size, 1:],
            ],
            dim=-1,
        )
        cross = cross == 257
        count = cross.flatten(0, 3).sum(dim=1, dtype=torch.int32)
        first = count.cumsum(0, dtype=torch.int32) - count + num_vertices
        edge_bits = (cross * cross.new_tensor([1, 2, 4], dtype=torch.uint8)).sum(dim=-1, dtype=torch.int32)
        crossings[start:stop] = (first << 3).view(edge_bits.shape) | edge_bits

        edge = cross.flatten().nonzero()[:, 0]
        sample, axis = edge // 3, edge % 3
        tile, local = sample >> 9, sample & 511
        at = tile * 729 + (local >> 6) * 81 + (local >> 3 & 7) * 9 + (local & 7)
        flat = halo.view(-1)
        low, high = flat[at], flat[at + halo_step[axis]]
        fraction = (low / (low - high))[:, None] * axis_step[axis]
        vertices.append(samples.coords(sample + 512 * start).double() + fraction)
        num_vertices += len(edge)

        # Corners of the cells, 8 bits of each kind.
        code = code[..., :-1] | code[..., 1:] << 1
        code = code[:, :, :-1] | code[:, :, 1:] << 2
        code = (code[:, :-1] | code[:, 1:] << 4).flatten()
        inside, outside = code & 255, code >> 8 & 255
        mixed = (inside != 0) & (outside != 0)
        complete = inside + outside == 255
        cell = (mixed & complete).nonzero()[:, 0]
        open_cells.append((mixed & ~complete).nonzero()[:, 0] + 512 * start)
        row = 64 * inside[cell].long()
        doubtful = has_ambiguous[row >> 6].nonzero()[:, 0]
        local = cell[doubtful] & 511
        at = (cell[doubtful] >> 9) * 729 + (local >> 6) * 81 + (local >> 3 & 7) * 9 + (local & 7)
        row[doubtful] += (_joined(flat[at[:, None] + halo_corner], faces) * bits).sum(dim=1)
        cells.append((cell + 512 * start, row))

        sides = (halo[:, 0], halo[:, :, 0], halo[:, :, :, 0], halo[:, 0, 0], halo[:, 0, :, 0], halo[:, :, 0, 0])
        sides = [side.flatten(1) for side in sides]
        mixed = torch.stack([(side < 0).any(dim=1) & (side >= 0).any(dim=1) for side in sides], dim=1)
        open_sides.append(mixed & lower[start:stop])

    tile = torch.cat(open_sides).any(dim=1).nonzero()[:, 0] + 1
    sample = (512 * tile[:, None] + torch.arange(512, device=device)).flatten()
    known = ~samples.tiles[tile].isnan().flatten()
    return _Scan(
        neighbours,
        crossings,
        torch.cat(vertices),
        cells,
        samples.coords(torch.cat(open_cells)),
        samples.coords(sample[known]),
    )


def _joined(corners: Tensor, faces: Tensor) -> Tensor:
    """Whether the inside corners of each face `[n, 6]` of cells with values `[n, 8]` are joined: by its saddle."""
    first, second, third, fourth = corners[:, faces].unbind(2)
    diagonal, other = first * third, second * fourth
    ambiguous = ((first < 0) == (third < 0)) & ((second < 0) == (fourth < 0)) & ((first < 0) != (second < 0))
    return ambiguous & torch.where(first < 0, diagonal > other, other > diagonal)


def _cells_at_crossings(samples: _Samples, coords: Tensor) -> Tensor:
    """Cells `[n, 3]` around the edges at the samples `coords` that the surface crosses."""
    device = coords.device
    corners, value = _offsets(range(2), device), samples.lookup(coords)
    cells = []
    for axis in range(3):
        direction = torch.eye(3, dtype=torch.int32, device=device)[axis]
        shift = corners[corners[:, axis] == 0]
        for sign in (1, -1):
            neighbour = samples.lookup(coords + sign * direction)
            crossing = ((value < 0) != (neighbour < 0)) & ~neighbour.isnan()
            lower = coords[crossing] - (direction if sign < 0 else 0)
            cells.append((lower[:, None] - shift).reshape(-1, 3))
    return _unique_coords(torch.cat(cells), samples.resolution)


def _complete(samples: _Samples) -> _Scan:
    """
    Gives `samples` the corners that cells crossed by the surface lack.

    Corners without a sample, in a block without any, are on the side of the samples around it where that is clear.
    All others get the mean of the samples next to them. Of a narrow band that is the sign of the side that they are
    on: the surface keeps a distance of a spacing from them. Where the surface itself leaves the samples it is followed
    straight on, which bridges gaps; after `MAX_EXTENSION` samples all that is still unknown beside it counts as
    outside, which closes it. A face of the grid that cuts an object off is filled whole.
    """
    scan = _scan(samples)
    if len(scan.open_cells) + len(scan.open_samples) == 0:
        return scan
    device, resolution = samples.table.device, samples.resolution
    corners, around = _offsets(range(2), device), _offsets(range(-1, 2), device)
    # The nearest samples decide; the others only where there is none.
    nearness = 1e-3 ** around.square().sum(dim=1).float()
    values = samples.lookup((scan.open_cells[:, None] + corners).reshape(-1, 3)).view(-1, 8)
    ends = torch.tensor([_ends(edge) for edge in range(len(_EDGES))], device=device)
    low, high = values[:, ends].unbind(2)
    crossed = ((low < 0) & (high >= 0) | (low >= 0) & (high < 0)).any(dim=1)
    cells = torch.cat([scan.open_cells[crossed], _cells_at_crossings(samples, scan.open_samples)])
    side_of_block = None
    extension = 0
    while True:
        corner = (cells[:, None] + corners).reshape(-1, 3)
        missing = _unique_coords(corner[samples.lookup(corner).isnan()], resolution)
        if len(missing) == 0:
            return _scan(samples) if extension else scan
        if side_of_block is None:
            side_of_block = _empty_sides(samples)
        known = samples.lookup((missing[:, None] + around).reshape(-1, 3), beyond=torch.nan).view(-1, 27)
        weight = torch.where(known.isnan(), 0.0, nearness)
        context = (known.nan_to_num() * weight).sum(dim=1) / weight.sum(dim=1)
        if extension >= MAX_EXTENSION:
            at_border = ((missing == 0) | (missing == resolution - 1)).any(dim=1)
            context = torch.where(at_border, context, torch.ones_like(context))
        side = side_of_block[samples.address(missing)[0]]
        context = torch.where(side.abs() >= CLEAR_SIDE, side.sign(), context)
        samples.store(missing, context)
        cells = _cells_at_crossings(samples, missing)
        extension += 1


def _triangles(scan: _Scan) -> tuple[Tensor, Tensor]:
    """The faces `[F, 3]` int32, and all vertices `[V, 3]`: those of the scan, then those inside of cells."""
    device = scan.crossings.device
    table, starts, counts, _ = (tensor.to(device) for tensor in _triangle_table())
    corner = torch.tensor([corner for corner, _ in _EDGES] + [0], device=device)
    axis = torch.tensor([axis for _, axis in _EDGES] + [0], device=device)
    edges = table.long()
    # Where an edge of a cell is found: the place of its lower sample, and the axes that come before its own.
    shift = ((corner >> 2) * 81 + (corner >> 1 & 1) * 9 + (corner & 1))[edges]
    before = ((1 << axis) - 1)[edges].int()
    ends_inside = edges[:, 2] == _CENTER
    inner_before = torch.nn.functional.pad(ends_inside.cumsum(0), (1, 0))
    has_center = inner_before[starts + counts] > inner_before[starts]

    faces, num_centers = [], 0
    chunk = TILE_CHUNK[device.type]
    for index, (cell, row) in enumerate(scan.cells):
        start = 1 + chunk * index
        crossings = _halo(scan.crossings, scan.neighbours[start : start + chunk]).view(-1)
        tile, local = (cell >> 9) - start, cell & 511
        at = tile * 729 + (local >> 6) * 81 + (local >> 3 & 7) * 9 + (local & 7)
        count = counts[row]
        of_cell = torch.arange(len(cell), device=device).repeat_interleave(count)
        triangle = torch.arange(len(of_cell), device=device) + (starts[row] - count.cumsum(0) + count)[of_cell]
        crossing = crossings[at[of_cell][:, None] + shift[triangle]]
        rank = crossing & before[triangle]
        face = (crossing >> 3) + rank - (rank >> 1)
        center = has_center[row]
        inner = ends_inside[triangle].nonzero()[:, 0]
        number = center.cumsum(0, dtype=torch.int32) - 1 + len(scan.vertices) + num_centers
        face[inner, 2] = number[of_cell[inner]]
        num_centers += int(center.sum())
        faces.append(face)
    faces = torch.cat(faces)
    if num_centers == 0:
        return faces, scan.vertices
    # In the middle of the vertices around it, each of which is the first one of a triangle that it ends.
    around, _, center = faces[faces[:, 2] >= len(scan.vertices)].long().unbind(1)
    center = center - len(scan.vertices)
    middle = scan.vertices.new_zeros(num_centers, 3).index_add_(0, center, scan.vertices[around])
    return faces, torch.cat([scan.vertices, middle / torch.bincount(center, minlength=num_centers)[:, None]])


def sparse_sdf_to_mesh(feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0) -> trimesh.Trimesh:
    """
    Iso-surface of a sparse signed distance field, by marching cubes on the active cells alone.

    Vertices lie on the grid's edges by linear interpolation, each once: those of marching cubes on the dense grid.
    Ambiguous faces are resolved by the sign of the bilinear saddle, the same from both sides, and a few ambiguous
    cells get one vertex inside, so the surface is closed and each of its edges belongs to two triangles. The part of
    the grid without samples takes the side of the samples next to it, and what lies outside the grid is
    outside the object: a shape that the grid cuts off is closed there.

    Args:
        feats: `[N, 1]` or `[N]`, s / tau, negative inside; any floating dtype.
        coords: `[N, 4]` (batch, x, y, z) integers, all of one sample, or `[N, 3]`.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        level: the iso-level, in the units of `feats`.

    Returns:
        A `trimesh.Trimesh` in the model cube [-1, 1]^3, faces turned outward. Without a crossing it is empty.

    Raises:
        ValueError: if `feats` is not finite, `coords` holds several samples or leaves the grid, or shapes differ.
    """
    if coords.ndim != 2 or coords.shape[1] not in (3, 4) or coords.is_floating_point():
        raise ValueError(
            f"`coords` must be integers of shape [N, 4] or [N, 3], got {coords.dtype} {list(coords.shape)}."
        )
    if feats.numel() != len(coords):
        raise ValueError(
            f"`feats` must have one value per row of `coords`, got {list(feats.shape)} for {len(coords)}."
        )
    if coords.shape[1] == 4:
        if len(coords) and (coords[:, 0] != coords[0, 0]).any():
            raise ValueError("`coords` must belong to one sample; split the batch first.")
        coords = coords[:, 1:]
    if len(coords) and not (int(coords.min()) >= 0 and int(coords.max()) < resolution):
        raise ValueError(f"`coords` must lie in [0, {resolution}).")
    values = feats.detach().reshape(-1).to(torch.float32) - level
    if not values.isfinite().all():
        raise ValueError("`feats` must be finite.")

    if len(coords) == 0:
        return trimesh.Trimesh(process=False)
    scan = _complete(_Samples(coords.to(torch.int32), values, resolution))
    faces, vertices = _triangles(scan)
    vertices = vertices.clamp_(0, resolution - 1).mul_(2 / (resolution - 1)).sub_(1)
    return trimesh.Trimesh(vertices.cpu().numpy(), faces.cpu().numpy(), process=False)
