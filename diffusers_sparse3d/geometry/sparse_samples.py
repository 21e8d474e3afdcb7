"""
Sparse samples on a grid, in tiles of 8^3: an index of the tiles, and a value for each sample.

What lies outside the grid is outside the object; tiles at the border have neighbours out there that say so.
"""

import torch
from torch import Tensor

from .sample_bits import (
    BLOCK_SIZE,
    INSIDE,
    OUTSIDE,
    SAMPLES_PER_TILE,
    TILE_SAMPLES,
    RankedBits,
    bit_places,
    flat_nonzero,
    offsets,
    pack_bits,
    step_table,
    tile_chunk,
)


class TileIndex:
    """
    The tiles: blocks of the grid with samples, and those in the margin beside them.

    Attributes:
        per_axis: blocks per axis of the grid, with one block of margin on each side.
        table: `[per_axis^3]` int32, the tile of each block, 0 where there is none.
        blocks: `[M]` int64, place of each tile in `table`; tile 0 has no sample.
        origins: `[M, 3]` int32, the first sample of each tile.
        num_beyond: samples of the tiles that lie outside the grid.
    """

    def __init__(self, resolution: int, device: torch.device):
        self.resolution = resolution
        self.per_axis = -(-resolution // BLOCK_SIZE) + 2
        self.table = torch.zeros(self.per_axis**3, dtype=torch.int32, device=device)
        self.blocks = torch.zeros(1, dtype=torch.int64, device=device)
        self.origins = torch.zeros(1, 3, dtype=torch.int32, device=device)
        self.num_beyond = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def address(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place in the block, `[n]` int32 each, of samples `[n, 3]` up to 8 outside the grid."""
        x, y, z = coords.T.contiguous().int()
        block = (x >> 3).add_(1).mul_(self.per_axis).add_(y >> 3).add_(1).mul_(self.per_axis).add_(z >> 3).add_(1)
        return block, (x & 7).mul_(8).add_(y & 7).mul_(8).add_(z & 7)

    def places(self, coords: Tensor) -> Tensor:
        """`[n]` int64: 512 * tile + place in the tile of samples `[n, 3]` up to 8 outside the grid."""
        block, local = self.address(coords)
        return self.table.index_select(0, block).long().mul_(TILE_SAMPLES).add_(local)

    def coords(self, place: Tensor) -> Tensor:
        """`[n, 3]` int32: the samples at `place [n]`."""
        local = place & (TILE_SAMPLES - 1)
        coords = torch.stack([local >> 6, local >> 3 & 7, local & 7], dim=1).int()
        return coords.add_(self.origins.index_select(0, place >> 9))

    def block_coords(self, blocks: Tensor) -> Tensor:
        """`[n, 3]` int32: the position of blocks `[n]` on the grid of blocks with its margin."""
        size = self.per_axis
        return torch.stack([blocks // size**2, blocks // size % size, blocks % size], dim=1).int()

    def in_margin(self, position: Tensor) -> Tensor:
        """Whether blocks at `position [n, 3]` have no sample of the grid, `[n]`."""
        return ((position == 0) | (BLOCK_SIZE * (position - 1) >= self.resolution)).any(dim=1)

    def steps(self) -> Tensor:
        """`[8]` int64: from a block to those around its upper corner, itself first."""
        size = self.per_axis
        return (offsets(range(2), self.table.device) * torch.tensor([size * size, size, 1]).to(self.table)).sum(dim=1)

    def neighbours(self) -> Tensor:
        """`[M, 8]` int32: the tiles around the upper corner of each tile, itself first; 0 for those of tile 0."""
        blocks = (self.blocks[:, None] + self.steps()).clamp_(max=len(self.table) - 1)
        neighbours = self.table.index_select(0, blocks.flatten()).view(-1, 8)
        neighbours[0] = 0
        return neighbours

    def add(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """
        Adds tiles for blocks `[n]` that have none, and tiles in the margin beside them.

        Returns:
            The tiles among them that reach out of the grid `[b]` int64, and which of their samples do, `[b, 512]`.
        """
        if len(blocks):
            position = self.block_coords(blocks)
            at_border = ((position == 1) | (BLOCK_SIZE * position >= self.resolution)).any(dim=1)
            around = (position[at_border][:, None] + offsets(range(-1, 2), blocks.device)).reshape(-1, 3)
            around = around[self.in_margin(around)].long()
            margin = ((around[:, 0] * self.per_axis + around[:, 1]) * self.per_axis + around[:, 2]).unique()
            blocks = torch.cat([blocks, margin[self.table[margin] == 0]])
        position = self.block_coords(blocks)
        first = len(self)
        beyond = ((position == 0) | (BLOCK_SIZE * position > self.resolution)).any(dim=1).nonzero()[:, 0]
        sample = BLOCK_SIZE * (position[beyond] - 1)[:, None] + offsets(range(BLOCK_SIZE), blocks.device)
        outside = ((sample < 0) | (sample >= self.resolution)).any(dim=2)
        self.num_beyond += int(outside.sum())
        self.blocks = torch.cat([self.blocks, blocks])
        self.table[blocks] = torch.arange(first, len(self), dtype=torch.int32, device=blocks.device)
        self.origins = torch.cat([self.origins, BLOCK_SIZE * (position - 1)])
        return first + beyond, outside


class SparseSamples:
    """
    Sparse samples in the order of their places, 512 * tile + 64 x + 8 y + z.

    Attributes:
        index: where the tiles are.
        neighbours: `[M, 8]` int32, see `TileIndex.neighbours`.
        known, inside: planes of bits `[M, 8]` int64.
    """

    def __init__(
        self, index: TileIndex, known: Tensor, inside: Tensor, ranks: RankedBits, feats: Tensor, level: float
    ):
        """`feats [N]` of any floating dtype are the values plus `level`; `ranks` those of `known`."""
        self.index, self.known, self.inside = index, known, inside
        self.neighbours = index.neighbours()
        self.ranks, self._feats, self._level = ranks, feats, level
        # A sample itself, and the next one along each axis; the samples at the corners of its cell.
        itself_and_next = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], device=known.device)
        self._next = step_table(itself_and_next, [0] * 4)
        self._corners = step_table(offsets(range(2), known.device), [0] * 8)

    @classmethod
    def from_rows(cls, feats: Tensor, coords: Tensor, resolution: int, level: float) -> "SparseSamples":
        """
        From distinct rows `coords [N, 3]` and `feats [N]`.

        Raises:
            ValueError: if a row is repeated, or a value not finite.
        """
        device = coords.device
        index = TileIndex(resolution, device)
        chunk = SAMPLES_PER_TILE * tile_chunk(device)
        touched = torch.zeros(len(index.table), dtype=torch.bool, device=device)
        # Grids of up to 1264^3 need no more than int32.
        small = len(touched) * TILE_SAMPLES < 1 << 31
        places = torch.empty(len(coords), dtype=torch.int32 if small else torch.int64, device=device)
        for part, place in zip(coords.split(chunk), places.split(chunk)):
            block, local = index.address(part)
            touched.index_fill_(0, block.long(), True)
            torch.add(local, block.to(place.dtype), alpha=TILE_SAMPLES, out=place)
        tiles, beyond = index.add(flat_nonzero(touched))
        del touched

        sides = torch.zeros(len(index), TILE_SAMPLES, dtype=torch.uint8, device=device)
        sides[tiles] = beyond.to(torch.uint8).mul_(OUTSIDE)
        bounds, ascends = [], []
        before = places.new_full((1,), -1)
        for feat, place in zip(feats.split(chunk), places.split(chunk)):
            tile = index.table.index_select(0, place >> 9)
            place.bitwise_and_(TILE_SAMPLES - 1).add_(tile, alpha=TILE_SAMPLES)
            value = values_of(feat, level)
            bounds += value.aminmax()
            # A comparison into floats and a conversion by way of int32 are vectorised on a CPU, the direct one is not.
            side = torch.lt(value, 0, out=value).mul_(INSIDE - OUTSIDE).add_(OUTSIDE).int().to(torch.uint8)
            sides.view(-1).scatter_(0, place.long(), side)
            ascends += [place[0] - before[0], (place[1:] - place[:-1]).amin() if len(place) > 1 else place[0] + 1]
            before = place[-1:]
        # NaN, too, is passed on by `aminmax`.
        if not torch.stack(bounds).isfinite().all():
            raise ValueError("`feats` must be finite.")
        known, inside = _planes(sides)
        del sides
        ranks = RankedBits(known[:, None])
        if ranks.first[-1] - index.num_beyond != len(coords):
            raise ValueError("`coords` must not repeat a row.")
        # Rows in the order of their places, as decoders and `mesh_to_sparse_sdf` return them, serve as they are.
        if index.num_beyond or torch.stack(ascends).amin() <= 0:
            samples = cls(index, known, inside, ranks, feats, level)
            values = torch.ones(len(coords) + index.num_beyond, device=device)
            for feat, place in zip(feats.split(chunk), places.split(chunk)):
                place = place.int()
                values.scatter_(0, samples._ranks_at(place).long(), values_of(feat, level))
            feats, level = values, 0.0
        return cls(index, known, inside, ranks, feats, level)

    @classmethod
    def from_tiles(cls, index: TileIndex, tiles: Tensor) -> "SparseSamples":
        """From `tiles [M, 8, 8, 8]` float32, NaN where there is no sample."""
        sides = torch.empty(len(tiles), TILE_SAMPLES, dtype=torch.uint8, device=tiles.device)
        chunk = tile_chunk(tiles.device)
        for part, side in zip(tiles.flatten(1).split(chunk), sides.split(chunk)):
            is_inside, is_outside = torch.empty_like(part), torch.empty_like(part)
            torch.lt(part, 0, out=is_inside)
            torch.ge(part, 0, out=is_outside)
            side.copy_(is_inside.mul_(INSIDE).add_(is_outside, alpha=OUTSIDE).int())
        known, inside = _planes(sides)
        values = tiles.view(-1).index_select(0, bit_places(known))
        return cls(index, known, inside, RankedBits(known[:, None]), values, 0.0)

    def _values(self, tile: Tensor, step: Tensor) -> Tensor:
        numbers = self.ranks.numbers(self.neighbours, tile, step)
        return values_of(self._feats.index_select(0, numbers), self._level)

    def _ranks_at(self, place: Tensor) -> Tensor:
        step = self._next.index_select(0, (place & (TILE_SAMPLES - 1)).mul_(4))
        return self.ranks.numbers(self.neighbours, (place >> 9).mul_(8), step)

    def edge_ends(self, place: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
        """The values `[n]` float32 at both ends of edges: from the samples at `place [n]` along `axis [n]`, int32."""
        tile, local = (place >> 9).mul_(8), (place & (TILE_SAMPLES - 1)).mul_(4)
        low = self._values(tile, self._next.index_select(0, local))
        return low, self._values(tile, self._next.index_select(0, local.add_(axis).add_(1)))

    def cell_corners(self, place: Tensor) -> Tensor:
        """The values `[n, 8]` at the corners of the cells whose lowest ones are at `place [n]` int32."""
        tile = (place >> 9).mul_(8).repeat_interleave(8)
        step = self._corners.view(-1, 8).index_select(0, place & (TILE_SAMPLES - 1))
        return self._values(tile, step.flatten()).view(-1, 8)


def values_of(feats: Tensor, level: float) -> Tensor:
    """`feats` less `level`, float32; always a new tensor."""
    return feats.to(torch.float32) - level


def _planes(sides: Tensor) -> tuple[Tensor, Tensor]:
    """The planes of bits `[M, 8]` of samples that are known, and of those inside, from `sides [M, 512]` uint8."""
    known, inside = torch.empty(2, len(sides), BLOCK_SIZE, dtype=torch.int64, device=sides.device)
    chunk = tile_chunk(sides.device)
    for side, known_part, inside_part in zip(sides.split(chunk), known.split(chunk), inside.split(chunk)):
        known_part.copy_(pack_bits(side).view(-1, BLOCK_SIZE))
        inside_part.copy_(pack_bits(side >> 1).view(-1, BLOCK_SIZE))
    return known, inside
