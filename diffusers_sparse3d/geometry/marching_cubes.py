"""
Marching cubes on sparse samples.

Follows the surface from cell to cell, so memory and time grow with the surface alone. The table is derived from one
rule per cube face, which both cells of a face share: the surface is closed, and every edge belongs to two triangles.
"""

from functools import cache, lru_cache

import numpy as np
import torch
import trimesh
from torch import Tensor


BLOCK_SIZE = 8
# How far, in samples, the surface is followed out of the sampled region: two latent blocks.
MAX_EXTENSION = 16
# It is followed through no more samples than were given, or this many if that is more: noise would fill the grid.
MIN_EXTENSION_SAMPLES = 1 << 16
# From here on, what the samples around an empty block say of its side is clear.
CLEAR_SIDE = 0.5
RELAXATION_STEPS = 32
# Tiles in one pass: few enough for the cache of a CPU, or enough to fill a GPU.
CPU_TILE_CHUNK, GPU_TILE_CHUNK = 1 << 10, 1 << 15
# Samples in one pass, per tile in one pass.
SAMPLES_PER_TILE = 64
# Samples in one pass over their 27 neighbours.
NEIGHBOUR_CHUNK = 1 << 17

# What a sample is, in bits apart enough to be told apart in a sum over a few: one without a value is neither.
INSIDE, OUTSIDE = 1, 16
# A halo is a tile with the next samples of the tiles above, [9, 9, 8], and the same once more, a step further along z.
# Halos are stored flat: a step along x or y is then a shift of the whole array, and one pass over contiguous memory
# serves all cells.
HALO_STEPS = (BLOCK_SIZE * (BLOCK_SIZE + 1), BLOCK_SIZE)
HALO_SIZE = HALO_STEPS[0] * (BLOCK_SIZE + 1)

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
        tiles: `[M, 8, 8, 8]` float32, the first rows of a buffer that leaves some room; tile 0 has no sample.
        blocks: `[M]` int64, place of each tile in `table`.
        origins: `[M, 3]` int32, the first sample of each tile.
        num_beyond: samples stored that lie outside the grid.
    """

    def __init__(self, coords: Tensor, values: Tensor, resolution: int):
        self.resolution = resolution
        self.per_axis = -(-resolution // BLOCK_SIZE) + 2
        self.table = torch.zeros(self.per_axis**3, dtype=torch.int32, device=coords.device)
        self.tiles = self._buffer = values.new_full((1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), torch.nan)
        self.blocks = torch.zeros(1, dtype=torch.int64, device=coords.device)
        self.origins = torch.zeros(1, 3, dtype=torch.int32, device=coords.device)
        self.num_beyond = 0
        self.store(coords, values)

    def address(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place in the block, `[n]` int32 each, of samples `[n, 3]` up to 8 outside the grid."""
        x, y, z = coords.T.contiguous().int()
        block = (x >> 3).add_(1).mul_(self.per_axis).add_(y >> 3).add_(1).mul_(self.per_axis).add_(z >> 3).add_(1)
        return block, (x & 7).mul_(8).add_(y & 7).mul_(8).add_(z & 7)

    def block_coords(self, blocks: Tensor) -> Tensor:
        """`[n, 3]` int32: the position of blocks `[n]` on the grid of blocks with its margin."""
        size = self.per_axis
        return torch.stack([blocks // size**2, blocks // size % size, blocks % size], dim=1).int()

    def in_margin(self, position: Tensor) -> Tensor:
        """Whether blocks at `position [n, 3]` have no sample of the grid, `[n]`."""
        return ((position == 0) | (BLOCK_SIZE * (position - 1) >= self.resolution)).any(dim=1)

    def store(self, coords: Tensor, values: Tensor) -> None:
        """Sets the samples at the distinct `coords [n, 3]` to `values [n]`."""
        chunk = SAMPLES_PER_TILE * _tile_chunk(coords.device)
        touched = torch.zeros(len(self.table), dtype=torch.bool, device=coords.device)
        addresses = [self.address(part) for part in coords.split(chunk)]
        for block, _ in addresses:
            touched.index_fill_(0, block.long(), True)
        self.add_tiles((touched & (self.table == 0)).nonzero()[:, 0])
        for address, value in zip(addresses, values.split(chunk)):
            self.tiles.view(-1).scatter_(0, self.places(*address), value)

    def places(self, block: Tensor, local: Tensor) -> Tensor:
        """Where in the tiles, `[n]` int64, samples are: see `address`."""
        return self.table.index_select(0, block).long().mul_(BLOCK_SIZE**3).add_(local)

    def add_tiles(self, blocks: Tensor) -> None:
        """Tiles without samples for blocks `[n]`, and tiles in the margin beside them."""
        if len(blocks) == 0:
            return
        position = self.block_coords(blocks)
        at_border = ((position == 1) | (BLOCK_SIZE * position >= self.resolution)).any(dim=1)
        around = (position[at_border][:, None] + _offsets(range(-1, 2), blocks.device)).reshape(-1, 3)
        around = around[self.in_margin(around)].long()
        margin = ((around[:, 0] * self.per_axis + around[:, 1]) * self.per_axis + around[:, 2]).unique()
        blocks = torch.cat([blocks, margin[self.table[margin] == 0]])
        position = self.block_coords(blocks)
        first = len(self.tiles)
        count = first + len(blocks)
        if count > len(self._buffer):
            # Room for more, so that a surface followed for many rounds does not copy all tiles in each of them.
            room = count if first == 1 else count + first // 4
            buffer = self.tiles.new_empty(room, *self.tiles.shape[1:])
            buffer[:first] = self.tiles
            self._buffer = buffer
        tiles = self._buffer[:count]
        tiles[first:] = torch.nan
        beyond = ((position == 0) | (BLOCK_SIZE * position > self.resolution)).any(dim=1).nonzero()[:, 0]
        sample = BLOCK_SIZE * (position[beyond] - 1)[:, None] + _offsets(range(BLOCK_SIZE), blocks.device)
        outside = ((sample < 0) | (sample >= self.resolution)).any(dim=2)
        tiles[first + beyond] = torch.where(outside, 1.0, torch.nan).view(-1, *tiles.shape[1:])
        self.num_beyond += int(outside.sum())
        self.table[blocks] = torch.arange(first, count, dtype=torch.int32, device=blocks.device)
        self.tiles, self.blocks = tiles, torch.cat([self.blocks, blocks])
        self.origins = torch.cat([self.origins, BLOCK_SIZE * (position - 1)])

    def lookup(self, coords: Tensor, beyond: float = 1.0) -> Tensor:
        """Values `[n]` at `[n, 3]`: NaN where there is no sample, `beyond` outside the grid."""
        values = self.tiles.view(-1).index_select(0, self.places(*self.address(coords.clamp(-1, self.resolution))))
        in_grid = ((coords >= 0) & (coords < self.resolution)).all(dim=1)
        return torch.where(in_grid, values, beyond)

    def coords(self, address: Tensor) -> Tensor:
        """`[n, 3]` int32: the samples at `address [n]`, 512 * tile + place in the tile."""
        local = address & (BLOCK_SIZE**3 - 1)
        place = torch.stack([local >> 6, local >> 3 & 7, local & 7], dim=1).int()
        return place.add_(self.origins.index_select(0, address >> 9))


def _empty_sides(samples: _Samples, original: int) -> Tensor:
    """
    The side `[P^3]` in [-1, 1] that blocks that had no tile among the first `original` ones are on; 0 for
    all others.

    It spreads from the faces of the blocks with samples, as heat does: a few wrong samples, or a hole in the surface,
    leave it clear elsewhere. Blocks far from all samples stay near 0; no surface gets there.
    """
    shape = (samples.per_axis,) * 3
    tiles = samples.tiles[:original].clamp(-1, 1)
    empty = (samples.table == 0) | (samples.table >= original)
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
            face = torch.where(empty, torch.nan, means[samples.table.clamp(max=original - 1)].view(shape))[there]
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


def _tile_chunk(device: torch.device) -> int:
    return CPU_TILE_CHUNK if device.type == "cpu" else GPU_TILE_CHUNK


def _flat_nonzero(flags: Tensor) -> Tensor:
    """The places `[n]` int64 of what is not zero in a flat view of `flags`, bool."""
    if flags.device.type == "cpu":
        # Four times as fast as PyTorch's.
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.flatten().nonzero()[:, 0]


def _offsets(span: range, device: torch.device) -> Tensor:
    axis = torch.arange(span.start, span.stop, device=device, dtype=torch.int32)
    return torch.cartesian_prod(axis, axis, axis)


def _unique_coords(coords: Tensor, resolution: int) -> Tensor:
    """The distinct rows `[m, 3]` int32 of `[n, 3]`, each axis in -1..resolution, ascending."""
    size = resolution + 2
    x, y, z = (coords.long() + 1).unbind(1)
    keys = ((x * size + y) * size + z).unique()
    return torch.stack([keys // size**2, keys // size % size, keys % size], dim=1).int() - 1


def _sides(tiles: Tensor) -> Tensor:
    """`INSIDE` or `OUTSIDE` for each sample of `tiles [M, 8, 8, 8]`, 0 for one without a value; uint8."""
    sides = torch.empty(tiles.shape, dtype=torch.uint8, device=tiles.device)
    for values, result in zip(tiles.split(_tile_chunk(tiles.device)), sides.split(_tile_chunk(tiles.device))):
        # Comparisons into floats and conversions by way of int32 are vectorised on a CPU, the direct ones are not.
        inside, outside = torch.empty_like(values), torch.empty_like(values)
        torch.lt(values, 0, out=inside)
        torch.ge(values, 0, out=outside)
        result.copy_(inside.add_(outside, alpha=OUTSIDE).int())
    return sides


def _halo(tiles: Tensor, neighbours: Tensor, start: Tensor | None = None) -> Tensor:
    """
    The halos `[2, m * HALO_SIZE + some more]` of tiles `[m]` among `tiles [M, 8, 8, 8]`, from `neighbours [m, 8]`; the
    second row is the first one step further along z. With `start [M]` int32, that of its tile is added to each value.
    """
    size, count = BLOCK_SIZE, len(neighbours) * HALO_SIZE
    dtype = tiles.dtype if start is None else start.dtype
    flat = tiles.new_zeros(2, count + sum(HALO_STEPS), dtype=dtype)
    halo, ahead = (row[:count].view(-1, size + 1, size + 1, size) for row in flat)
    for index in (0, 2, 4, 6, 1, 3, 5, 7):
        if index == 1:
            flat[1, :-1] = flat[0, 1:]
        along_x, along_y, along_z = (bool(index & bit) for bit in (4, 2, 1))
        place = tuple(slice(size, None) if along else slice(size) for along in (along_x, along_y))
        rows = tiles.index_select(0, neighbours[:, index])
        rows = rows[:, : 1 if along_x else size, : 1 if along_y else size, : 1 if along_z else size]
        if start is not None:
            rows = rows + start.index_select(0, neighbours[:, index])[:, None, None, None]
        if along_z:
            ahead[(slice(None), *place, -1)] = rows[..., 0]
        else:
            halo[(slice(None), *place)] = rows
    return flat


class _Cells:
    """
    The cells that the surface crosses.

    Attributes:
        neighbours: `[M, 8]` int32, the tiles around the upper corner of each tile of the samples, itself first.
        crossings: `[M, 8, 8, 8]` uint8, bit a: the surface crosses the edge from the sample along axis a.
        groups: per pass, the tiles `[m]` int64; the crossed cells `[n]` int32, each `HALO_SIZE` * (place of its tile
            in the pass) + place of its lowest corner in the halo; and their configurations `[n]` int16.
        open_cells: `[n, 3]` int32, cells that it crosses which lack a corner, and some that it does not cross.
        open_samples: `[n, 3]` int32, samples beside blocks without a tile in which it may cross cells.
        num_samples: samples with a value.
    """

    def __init__(self, samples: _Samples):
        self.samples = samples
        self.crossings = torch.zeros(samples.tiles.shape, dtype=torch.uint8, device=samples.tiles.device)
        self.groups: list[tuple[Tensor, Tensor, Tensor]] = []
        self.find(torch.arange(1, len(samples.tiles), device=samples.tiles.device))

    def find(self, tiles: Tensor) -> None:
        """Looks through `tiles [n]`, in passes that fit a cache."""
        samples = self.samples
        device, step = tiles.device, samples.per_axis
        place = (_offsets(range(2), device) * torch.tensor([step * step, step, 1], device=device)).sum(dim=1)
        last = len(samples.table) - 1
        self.neighbours = samples.table[(samples.blocks[:, None] + place).clamp(max=last)]
        # Is there a tile below: by a face, by an edge?
        lower = samples.table[(samples.blocks[tiles, None] - place[[4, 2, 1, 6, 5, 3]]).clamp(min=0)] == 0
        has_ambiguous = _triangle_table()[3].to(device)
        faces = torch.tensor(_FACES, device=device)
        face_bits = 1 << torch.arange(6, device=device)
        corner = _offsets(range(2), device)
        # The last row along each axis belongs to the tiles above.
        own = torch.zeros(BLOCK_SIZE + 1, BLOCK_SIZE + 1, BLOCK_SIZE, dtype=torch.uint8, device=device)
        own[:-1, :-1] = 1
        own = own.flatten()
        sides = _sides(samples.tiles)
        self.num_samples = int(torch.count_nonzero(sides))
        open_cells = []
        for group in tiles.split(_tile_chunk(device)):
            halo, ahead = _halo(sides, self.neighbours[group])
            size = len(group) * HALO_SIZE
            crossings = torch.zeros(size, dtype=torch.uint8, device=device)
            step_x, step_y = HALO_STEPS
            for axis, above in enumerate((halo[step_x:], halo[step_y:], ahead)):
                both = halo[:size] | above[:size]
                crossings |= (both & both >> 4) << axis
            crossings = crossings.view(-1, BLOCK_SIZE + 1, BLOCK_SIZE + 1, BLOCK_SIZE)[:, :-1, :-1].contiguous()
            # In words of eight, of which there are fewer.
            self.crossings.view(torch.int64).index_copy_(0, group, crossings.view(torch.int64))

            # Almost all cells are on one side.
            some = halo | ahead
            some = some[:-step_y] | some[step_y:]
            some = some[:size] | some[step_x:]
            cell = _flat_nonzero((some & some >> 4).view(-1, HALO_SIZE).bitwise_and_(own).view(torch.bool))
            inside, outside = torch.zeros(2, len(cell), dtype=torch.uint8, device=device)
            for index in range(8):
                place = cell + ((index >> 2) * step_x + (index >> 1 & 1) * step_y)
                side = (ahead if index & 1 else halo).index_select(0, place)
                inside |= (side & INSIDE) << index
                outside |= (side >> 4) << index
            complete = inside ^ outside == 255
            open_cells.append(self.coords(group, cell.index_select(0, _flat_nonzero(~complete))))
            complete = _flat_nonzero(complete)
            cell, inside = cell.index_select(0, complete), inside.index_select(0, complete).int()
            doubtful = has_ambiguous.index_select(0, inside).nonzero()[:, 0]
            corners = samples.lookup((self.coords(group, cell[doubtful])[:, None] + corner).reshape(-1, 3)).view(-1, 8)
            row = inside.mul_(64)
            row[doubtful] += (_joined(corners, faces) * face_bits).sum(dim=1).int()
            self.groups.append((group, cell.int(), row.short()))
        self.open_cells = torch.cat(open_cells)
        tile = tiles[(self.sides_below(sides)[tiles] & lower).any(dim=1)]
        sample = (512 * tile[:, None] + torch.arange(512, device=device)).flatten()
        self.open_samples = samples.coords(sample[~samples.tiles[tile].isnan().flatten()])

    def sides_below(self, sides: Tensor) -> Tensor:
        """Whether the surface passes the lower faces (x, y, z) and edges (x and y, x and z, y and z) of the tiles."""

        def union(words: Tensor) -> Tensor:
            while words.shape[1] > 1:
                first, second = words.chunk(2, dim=1)
                words = first | second
            return words[:, 0]

        # Eight samples along z in a word, the first one in its lowest byte; `here` is that of the corner alone.
        words = sides.view(torch.int64)[..., 0]
        next_z, next_y, next_yz, next_x, next_xz, next_xy = self.neighbours[:, 1:7].long().unbind(1)
        along_z, x_face, y_face = words[:, 0, 0], union(words[:, 0]), union(words[:, :, 0])
        here, along_y, along_x, z_face = (word & 255 for word in (along_z, x_face, y_face, union(words.flatten(1))))
        # With the next samples of the tiles above.
        parts = [
            x_face | along_z[next_y] | along_y[next_z] | here[next_yz],
            y_face | along_z[next_x] | along_x[next_z] | here[next_xz],
            z_face | along_y[next_x] | along_x[next_y] | here[next_xy],
            along_z | here[next_z],
            along_y | here[next_y],
            along_x | here[next_x],
        ]
        parts, every_byte = torch.stack(parts, dim=1), 0x0101010101010101
        return (parts & INSIDE * every_byte != 0) & (parts & OUTSIDE * every_byte != 0)

    def coords(self, group: Tensor, cell: Tensor) -> Tensor:
        """`[n, 3]` int32: the lowest corners of the cells `[n]` of a group."""
        place, (step_x, step_y) = cell % HALO_SIZE, HALO_STEPS
        place = torch.stack([place // step_x, place % step_x // step_y, place % step_y], dim=1).int()
        return place.add_(self.samples.origins[group[cell // HALO_SIZE]])

    def update(self, blocks: Tensor) -> None:
        """Looks again where samples have been added, in the blocks `[n]`."""
        samples, device = self.samples, blocks.device
        step = samples.per_axis
        place = (_offsets(range(2), device) * torch.tensor([step * step, step, 1], device=device)).sum(dim=1)
        changed = torch.zeros(len(samples.tiles), dtype=torch.bool, device=device)
        # A cell belongs to the tile of its lowest corner.
        changed[samples.table[(blocks.unique()[:, None] - place).clamp(min=0)]] = True
        changed[len(self.crossings) :] = True
        changed[0] = False
        crossings = torch.zeros(samples.tiles.shape, dtype=torch.uint8, device=device)
        crossings[: len(self.crossings)] = self.crossings
        self.crossings = crossings
        groups = []
        for group, cell, row in self.groups:
            kept = ~changed[group][cell // HALO_SIZE]
            groups.append((group, cell[kept], row[kept]))
        self.groups = groups
        self.find(changed.nonzero()[:, 0])

    def numbers(self) -> tuple[Tensor, Tensor]:
        """
        `[M, 8, 8, 8]` int16: 8 times the number of a sample's first vertex in its tile, and its crossings; and the
        first vertex of each tile, `[M + 1]`.
        """
        numbers = torch.empty(self.crossings.shape, dtype=torch.int16, device=self.crossings.device)
        first = torch.zeros(len(numbers) + 1, dtype=torch.int64, device=numbers.device)
        chunk = _tile_chunk(numbers.device)
        for crossings, result, count in zip(
            self.crossings.flatten(1).split(chunk), numbers.flatten(1).split(chunk), first[1:].split(chunk)
        ):
            number = (crossings & 1).add_(crossings >> 1 & 1).add_(crossings >> 2)
            end = number.cumsum(1, dtype=torch.int16)
            count.copy_(end[:, -1])
            torch.mul(end.sub_(number), 8, out=result).add_(crossings)
        return numbers, first.cumsum_(0)


def _vertices(samples: _Samples, neighbours: Tensor, numbers: Tensor, first: Tensor) -> Tensor:
    """Where the surface crosses the edges of the grid, `[V, 3]` float64, in grid spacings; see `_Cells.numbers`."""
    values, tile_neighbours = samples.tiles.view(-1), neighbours.view(-1)
    device = values.device
    result = torch.empty(int(first[-1]), 3, dtype=torch.float64, device=device)
    chunk = _tile_chunk(device)
    bounds = first[[*range(0, len(numbers), chunk), len(numbers)]].tolist()
    # Of each axis: a step in a tile, from the last sample to the first one, and which neighbour continues it.
    step = torch.tensor([BLOCK_SIZE**2, BLOCK_SIZE, 1], device=device)
    last, above = (BLOCK_SIZE - 1) * step, torch.tensor([4, 2, 1], device=device)
    for part, start, stop, index in zip(numbers.split(chunk), bounds, bounds[1:], range(0, len(numbers), chunk)):
        axes = part.to(torch.uint8).bitwise_and_(7).flatten()
        sample = _flat_nonzero(axes.bitwise_or(axes >> 1).bitwise_or_(axes >> 2).bitwise_and_(1).view(torch.bool))
        axes = axes.index_select(0, sample)
        # Four flags a sample: one for each axis, in the order of the vertices, and a zero.
        crossed = _flat_nonzero(torch.stack([axes & 1, axes >> 1 & 1, axes >> 2, axes & 0], dim=1).view(torch.bool))
        axis = crossed & 3
        address = sample.index_select(0, crossed >> 2).add_(512 * index)
        vertex = result[start:stop].copy_(samples.coords(address))
        # The next sample may be the first one of the next tile.
        reach = last.index_select(0, axis)
        tile = tile_neighbours.index_select(0, (address >> 9) * 8 + above.index_select(0, axis)).long()
        following = torch.where(
            address & reach == reach,
            tile.mul_(512).add_(address & 511).sub_(reach),
            address + step.index_select(0, axis),
        )
        low = values.index_select(0, address)
        offset = low / (low - values.index_select(0, following))
        vertex.scatter_add_(1, axis[:, None], offset.double()[:, None])
    return result


def _faces(
    groups: list[tuple[Tensor, Tensor, Tensor]], neighbours: Tensor, numbers: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """
    The faces `[F, 3]` int64 of the crossed cells, on the CPU, and those among them, `[f, 3]` int32, whose last vertex
    lies inside a cell: numbered after those on the edges of the grid. See `_Cells`.
    """
    device = numbers.device
    table, starts, counts, _ = (tensor.to(device) for tensor in _triangle_table())
    # One row for the first, second and third edge of all triangles.
    edges = table.T.long()
    corner = torch.tensor([corner for corner, _ in _EDGES] + [0], device=device)
    axis = torch.tensor([axis for _, axis in _EDGES] + [0], device=device)
    # Where an edge of a cell is found: the place of its lower sample, and the axes that come before its own.
    shifts = ((corner >> 2) * HALO_STEPS[0] + (corner >> 1 & 1) * HALO_STEPS[1]).int()[edges]
    ahead = (corner & 1).int()[edges]
    axes_before = ((1 << axis) - 1).int()[edges]
    ends_inside = edges[2] == _CENTER
    inner_before = torch.nn.functional.pad(ends_inside.cumsum(0), (1, 0))
    has_center = inner_before[starts + counts] > inner_before[starts]
    starts, counts = starts.int(), counts.int()

    tile_starts = (8 * first[:-1]).int()
    totals = torch.stack([counts.index_select(0, row.int()).sum() for _, _, row in groups]).tolist()
    faces, fans = torch.empty(sum(totals), 3, dtype=torch.int64), []
    num_vertices = int(first[-1])
    for (group, cell, row), result in zip(groups, faces.split(totals)):
        halo = _halo(numbers, neighbours[group], tile_starts)
        places = shifts + ahead * halo.shape[1]
        row = row.int()
        count = counts.index_select(0, row)
        of_cell = torch.repeat_interleave(count, output_size=len(result))
        before = starts.index_select(0, row).sub_(count.cumsum(0, dtype=torch.int32)).add_(count)
        triangle = torch.arange(len(of_cell), dtype=torch.int32, device=device).add_(before.index_select(0, of_cell))
        cell, inner = cell.index_select(0, of_cell), _flat_nonzero(ends_inside.index_select(0, triangle))
        face = torch.empty(3, len(result), dtype=torch.int32, device=device)
        for place, before, vertex in zip(places, axes_before, face):
            number = halo.view(-1).index_select(0, place.index_select(0, triangle).add_(cell))
            rank = before.index_select(0, triangle).bitwise_and_(number)
            torch.add(number.bitwise_right_shift_(3), rank, out=vertex).sub_(rank.bitwise_right_shift_(1))
        center = has_center.index_select(0, row)
        number = center.cumsum(0, dtype=torch.int32) - 1 + num_vertices
        face[2, inner] = number[of_cell[inner]]
        num_vertices += int(center.sum())
        fans.append(face[:, inner].T)
        result.copy_(face.T)
    return faces, torch.cat(fans)


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


def _context(samples: _Samples, coords: Tensor) -> Tensor:
    """The mean `[n]` of the samples nearest to `coords [n, 3]` among the 26 around each."""
    around = _offsets(range(-1, 2), coords.device)
    # The nearest samples decide; the others only where there is none.
    nearness = 1e-3 ** around.square().sum(dim=1).float()
    means = []
    for part in coords.split(NEIGHBOUR_CHUNK):
        known = samples.lookup((part[:, None] + around).reshape(-1, 3), beyond=torch.nan).view(-1, len(around))
        weight = torch.where(known.isnan(), 0.0, nearness)
        means.append((known.nan_to_num() * weight).sum(dim=1) / weight.sum(dim=1))
    return torch.cat(means)


def _complete(crossed: _Cells, max_samples: int) -> None:
    """
    Gives the samples the corners that crossed cells lack.

    Corners without a sample, in a block without any, are on the side of the samples around it where that is clear.
    All others get the mean of the samples next to them. Of a narrow band that is the sign of the side that they are
    on: the surface keeps a distance of a spacing from them. Where the surface itself leaves the samples it is followed
    straight on, which bridges gaps; after `MAX_EXTENSION` samples, or where the whole of it would take more than
    `max_samples`, all that is still unknown beside it counts as outside, which closes it. A face of the grid that cuts
    an object off is filled whole.
    """
    if len(crossed.open_cells) == len(crossed.open_samples) == 0:
        return
    samples = crossed.samples
    device, resolution = samples.table.device, samples.resolution
    corners = _offsets(range(2), device)
    values = samples.lookup((crossed.open_cells[:, None] + corners).reshape(-1, 3)).view(-1, 8)
    ends = torch.tensor([_ends(edge) for edge in range(len(_EDGES))], device=device)
    low, high = values[:, ends].unbind(2)
    is_crossed = ((low < 0) & (high >= 0) | (low >= 0) & (high < 0)).any(dim=1)
    cells = torch.cat([crossed.open_cells[is_crossed], _cells_at_crossings(samples, crossed.open_samples)])
    side_of_block, original = None, len(samples.tiles)
    stored, num_stored = [], 0
    while True:
        corner = (cells[:, None] + corners).reshape(-1, 3)
        missing = _unique_coords(corner[samples.lookup(corner).isnan()], resolution)
        if len(missing) == 0:
            break
        block = samples.address(missing)[0]
        if side_of_block is None and (samples.table[block] == 0).any():
            side_of_block = _empty_sides(samples, original)
        num_stored += len(missing)
        context = _context(samples, missing)
        if len(stored) >= MAX_EXTENSION or num_stored > max_samples:
            at_border = ((missing == 0) | (missing == resolution - 1)).any(dim=1)
            context = torch.where(at_border, context, torch.ones_like(context))
        if side_of_block is not None:
            side = side_of_block[block]
            context = torch.where(side.abs() >= CLEAR_SIDE, side.sign(), context)
        samples.store(missing, context)
        stored.append(block)
        cells = _cells_at_crossings(samples, missing)
    if stored:
        crossed.update(torch.cat(stored))


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
        ValueError: if `feats` is not finite, `coords` holds several samples, leaves the grid or repeats a row, or
            shapes differ.
    """
    if coords.ndim != 2 or coords.shape[1] not in (3, 4) or coords.is_floating_point():
        raise ValueError(
            f"`coords` must be integers of shape [N, 4] or [N, 3], got {coords.dtype} {list(coords.shape)}."
        )
    if feats.numel() != len(coords):
        raise ValueError(
            f"`feats` must have one value per row of `coords`, got {list(feats.shape)} for {len(coords)}."
        )
    if len(coords) == 0:
        return trimesh.Trimesh(process=False)
    low, high = torch.stack(coords.aminmax(dim=0)).tolist()
    if low[:-3] != high[:-3]:
        raise ValueError("`coords` must belong to one sample; split the batch first.")
    if not (min(low[-3:]) >= 0 and max(high[-3:]) < resolution):
        raise ValueError(f"`coords` must lie in [0, {resolution}).")
    coords = coords[:, -3:]
    values = feats.detach().reshape(-1).to(torch.float32)
    if level:
        values = values - level
    # NaN, too, is passed on by both.
    if not torch.stack(values.aminmax()).isfinite().all():
        raise ValueError("`feats` must be finite.")

    samples = _Samples(coords, values, resolution)
    cells = _Cells(samples)
    if cells.num_samples - samples.num_beyond != len(coords):
        raise ValueError("`coords` must not repeat a row.")
    _complete(cells, max(len(coords), MIN_EXTENSION_SAMPLES))
    numbers, first = cells.numbers()
    groups, neighbours = cells.groups, cells.neighbours
    # Each stage needs little of the one before.
    del cells
    vertices = _vertices(samples, neighbours, numbers, first)
    del samples
    faces, fans = _faces(groups, neighbours, numbers, first)
    del groups, neighbours, numbers
    if len(fans):
        # In the middle of the vertices around it, each of which is the first one of a triangle that it ends.
        around, _, center = fans.long().unbind(1)
        center = center - len(vertices)
        count = torch.bincount(center)
        middle = vertices.new_zeros(len(count), 3).index_add_(0, center, vertices[around])
        vertices = torch.cat([vertices, middle / count[:, None]])
    vertices = vertices.clamp_(0, resolution - 1).mul_(2 / (resolution - 1)).sub_(1)
    return trimesh.Trimesh(vertices.cpu().numpy(), faces.numpy(), process=False)
