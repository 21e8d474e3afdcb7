"""
Completion of torn fields: values for the corners without a sample of cells that the surface crosses.

The surface is followed out of the samples in rounds, in tiles of values to which samples are added. Fields whose
crossed cells are all complete never reach this module.
"""

import torch
from torch import Tensor

from .cell_table import EDGES, ends
from .sample_bits import BLOCK_SIZE, allocate, offsets, tile_chunk
from .sparse_samples import SparseSamples, TileIndex


# How far, in samples, the surface is followed out of the sampled region: two latent blocks.
MAX_EXTENSION = 16
# Samples added at most: as many as were given, or this many if that is more. Noise would otherwise fill the grid.
MIN_EXTENSION_SAMPLES = 1 << 16
# A block without samples is taken to lie on one side if the absolute value of its side is at least this.
CLEAR_SIDE = 0.5
# Jacobi steps of the diffusion that determines the side of blocks without samples.
RELAXATION_STEPS = 32
# Samples in one pass over their 27 neighbours.
NEIGHBOUR_CHUNK = 1 << 17


class _GrowingTiles:
    """
    The values of the samples near the open cells, as dense tiles that can be read and written at any coordinates.

    Args:
        samples: the sparse field; tiles are copied from it by `surround`.

    Attributes:
        index: the index of the copied tiles; its numbering differs from that of `samples.index`.
        values: `[M, 8, 8, 8]` float32, NaN for samples that are not known; a view of a buffer with room for more
            tiles.
    """

    def __init__(self, samples: SparseSamples):
        device = samples.known.device
        self.samples = samples
        self.index = TileIndex(samples.index.resolution, device)
        self.values = self._buffer = torch.full((1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), torch.nan, device=device)
        self._is_surrounded = allocate(len(self.index.table), torch.bool, device)

    def surround(self, coords: Tensor) -> None:
        """Copies the blocks of samples `coords [n, 3]`, and the 26 blocks around each, where they have tiles."""
        blocks = (self.index.address(coords) >> 9).long()
        blocks = blocks[~self._is_surrounded[blocks]].unique()
        if len(blocks) == 0:
            return
        self._is_surrounded[blocks] = True
        position = (self.index.block_coords(blocks)[:, None] + offsets(range(-1, 2), blocks.device)).reshape(-1, 3)
        position = position[~self.index.in_margin(position)].long()
        blocks = self.index.block_at(position).unique()
        blocks = blocks[self.index.table[blocks] == 0]
        tiles = self.samples.index.table[blocks]
        is_there = tiles > 0
        blocks = blocks[is_there]
        self._grow(blocks)
        self.values[self.index.table[blocks].long()] = self.samples.tiles(tiles[is_there].long())

    def store(self, coords: Tensor, values: Tensor) -> None:
        """Sets the samples at distinct `coords [n, 3]`, which have been passed to `surround`, to `values [n]`."""
        address = self.index.address(coords)
        blocks = (address >> 9).unique()
        self._grow(blocks[self.index.table[blocks] == 0].long())
        self.values.view(-1).scatter_(0, self.index.places(address).long(), values)

    def _grow(self, blocks: Tensor) -> None:
        """Adds tiles without samples for blocks `[n]` int64 that have none."""
        if len(blocks) == 0:
            return
        first = len(self.values)
        tiles, beyond = self.index.add(blocks)
        count = len(self.index)
        if count > len(self._buffer):
            # Spare room, so that not every one of many rounds copies all tiles.
            room = count if first == 1 else count + first // 4
            buffer = self.values.new_empty(room, *self.values.shape[1:])
            buffer[:first] = self.values
            self._buffer = buffer
        self.values = self._buffer[:count]
        self.values[first:] = torch.nan
        self.values[tiles] = torch.where(beyond, 1.0, torch.nan).view(-1, *self.values.shape[1:])

    def lookup(self, coords: Tensor, beyond: float = 1.0) -> Tensor:
        """The values `[n]` at `coords [n, 3]`: NaN without a sample, `beyond` outside the grid."""
        resolution = self.index.resolution
        place = self.index.places(self.index.address(coords.clamp(-1, resolution)))
        values = self.values.view(-1).index_select(0, place)
        in_grid = ((coords >= 0) & (coords < resolution)).all(dim=1)
        return torch.where(in_grid, values, beyond)


def _empty_sides(samples: SparseSamples) -> Tensor:
    """
    The side of each block without a tile, `[P^3]` in [-1, 1], negative inside; 0 for blocks with a tile.

    The values on the faces of the blocks with samples diffuse through the empty blocks (a few Jacobi steps of the
    Laplace equation). A few wrong samples, or a hole in the surface, then change the sides near them only. Blocks far
    from all samples stay near 0; no surface reaches them.
    """
    index = samples.index
    shape = (index.per_axis,) * 3
    faces = [(axis, place) for axis in range(3) for place in (BLOCK_SIZE - 1, 0)]
    means = torch.empty(len(faces), len(index), device=index.table.device)
    chunk = tile_chunk(means.device)
    for tile, part in zip(torch.arange(len(index), device=means.device).split(chunk), means.split(chunk, dim=1)):
        tiles = samples.tiles(tile).clamp_(-1, 1)
        for mean, (axis, place) in zip(part, faces):
            mean.copy_(tiles.select(axis + 1, place).flatten(1).nanmean(dim=1))
    empty = index.table == 0
    empty[index.blocks[index.in_margin(index.block_coords(index.blocks))]] = True
    empty = empty.view(shape)
    total, count = torch.zeros(2, *shape, device=empty.device)
    neighbours = []
    for (axis, place), mean in zip(faces, means):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        here, there = (tuple(ahead), tuple(behind)) if place else (tuple(behind), tuple(ahead))
        face = torch.where(empty, torch.nan, mean[index.table].view(shape))[there]
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


def _unique_coords(coords: Tensor, resolution: int) -> Tensor:
    """The distinct rows `[m, 3]` int32, ascending, of `coords [n, 3]`, whose components are -1 to `resolution`."""
    size = resolution + 2
    x, y, z = (coords.long() + 1).unbind(1)
    keys = ((x * size + y) * size + z).unique()
    return torch.stack([keys // size**2, keys // size % size, keys % size], dim=1).int() - 1


def _cells_at_crossings(samples: _GrowingTiles, coords: Tensor) -> Tensor:
    """The cells `[m, 3]` around those grid edges at the samples `coords [n, 3]` that the surface crosses."""
    device = coords.device
    corners, value = offsets(range(2), device), samples.lookup(coords)
    cells = []
    for axis in range(3):
        direction = torch.eye(3, dtype=torch.int32, device=device)[axis]
        shift = corners[corners[:, axis] == 0]
        for sign in (1, -1):
            neighbour = samples.lookup(coords + sign * direction)
            crossing = ((value < 0) != (neighbour < 0)) & ~neighbour.isnan()
            lower = coords[crossing] - (direction if sign < 0 else 0)
            cells.append((lower[:, None] - shift).reshape(-1, 3))
    return _unique_coords(torch.cat(cells), samples.index.resolution)


def _context(samples: _GrowingTiles, coords: Tensor) -> Tensor:
    """For each of `coords [n, 3]`, the mean of the nearest known samples among the 26 around it, `[n]`."""
    around = offsets(range(-1, 2), coords.device)
    # Weights so far apart that samples further away count only where there is no nearer one.
    nearness = 1e-3 ** around.square().sum(dim=1).float()
    means = []
    for part in coords.split(NEIGHBOUR_CHUNK):
        known = samples.lookup((part[:, None] + around).reshape(-1, 3), beyond=torch.nan).view(-1, len(around))
        weight = torch.where(known.isnan(), 0.0, nearness)
        means.append((known.nan_to_num() * weight).sum(dim=1) / weight.sum(dim=1))
    return torch.cat(means)


def missing_corners(samples: SparseSamples, open_cells: Tensor, open_samples: Tensor) -> tuple[Tensor, Tensor]:
    """
    Coordinates and values for the corners without a sample of the cells that the surface crosses.

    - A corner in a block without samples gets the side of that block, where the samples around the block determine it.
    - Every other corner gets the mean of its nearest known samples. In a narrow band that mean has the right sign,
      because the surface stays at least a spacing away from the end of the band.
    - Each round may make the surface cross further cells, whose missing corners are added in the next round. So the
      surface continues straight on where it leaves the samples, and gaps are bridged.
    - After `MAX_EXTENSION` rounds, or once more samples have been added than were given (`MIN_EXTENSION_SAMPLES` if
      that is more), further corners are outside, which closes the surface. Corners on the faces of the grid are
      exempt, so that the cut through an object that the grid cuts off is filled completely.

    Args:
        samples: the field.
        open_cells: `[n, 3]` int32, the incomplete cells that have known corners on both sides.
        open_samples: `[k, 3]` int32, samples beside blocks without a tile in which the surface may cross cells.

    Returns:
        Distinct coordinates `[m, 3]` int32 and values `[m]` float32, reduced by the iso-level.
    """
    device, resolution = open_cells.device, samples.index.resolution
    max_samples = max(samples.num_given, MIN_EXTENSION_SAMPLES)
    tiles, corners = _GrowingTiles(samples), offsets(range(2), device)
    tiles.surround(torch.cat([open_cells.clamp(min=0), open_samples]))
    values = tiles.lookup((open_cells[:, None] + corners).reshape(-1, 3)).view(-1, 8)
    low, high = values[:, torch.tensor([ends(edge) for edge in range(len(EDGES))], device=device)].unbind(2)
    is_crossed = ((low < 0) & (high >= 0) | (low >= 0) & (high < 0)).any(dim=1)
    cells = torch.cat([open_cells[is_crossed], _cells_at_crossings(tiles, open_samples)])
    side_of_block, num_stored = None, 0
    all_missing, all_values = [open_cells[:0]], [values.new_empty(0)]
    while True:
        corner = (cells[:, None] + corners).reshape(-1, 3)
        missing = _unique_coords(corner[tiles.lookup(corner).isnan()], resolution)
        if len(missing) == 0:
            return torch.cat(all_missing), torch.cat(all_values)
        tiles.surround(missing)
        block = samples.index.address(missing) >> 9
        if side_of_block is None and (samples.index.table[block] == 0).any():
            side_of_block = _empty_sides(samples)
        num_stored += len(missing)
        context = _context(tiles, missing)
        if len(all_missing) > MAX_EXTENSION or num_stored > max_samples:
            at_border = ((missing == 0) | (missing == resolution - 1)).any(dim=1)
            context = torch.where(at_border, context, torch.ones_like(context))
        if side_of_block is not None:
            side = side_of_block[block]
            context = torch.where(side.abs() >= CLEAR_SIDE, side.sign(), context)
        tiles.store(missing, context)
        all_missing.append(missing)
        all_values.append(context)
        cells = _cells_at_crossings(tiles, missing)
