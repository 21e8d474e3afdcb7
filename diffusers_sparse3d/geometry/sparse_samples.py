"""
Sparse samples on a grid, in tiles of 8^3: an index of the tiles, and a value for each sample.

What lies outside the grid is outside the object; tiles at the border have neighbours out there that say so.
"""

import torch
from torch import Tensor

from .sample_bits import (
    BIT_PASS_FACTOR,
    BLOCK_SIZE,
    INSIDE,
    OUTSIDE,
    ROW_PASS_FACTOR,
    TILE_SAMPLES,
    RankedBits,
    allocate,
    bit_places,
    flat_nonzero,
    offsets,
    pack_bits,
    row_step_table,
    step_table,
    tile_chunk,
    with_zeros,
)


# Places are int32; what the surface is followed through has room beside as many again.
MAX_TILES = 1 << 21


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
        self.table = allocate(self.per_axis**3, torch.int32, device)
        # The first for grids of up to 1272^3.
        self.address_dtype = torch.int32 if len(self.table) * TILE_SAMPLES < 1 << 31 else torch.int64
        self.blocks = torch.zeros(1, dtype=torch.int64, device=device)
        self.origins = torch.zeros(1, 3, dtype=torch.int32, device=device)
        self.num_beyond = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def address(self, coords: Tensor, out: Tensor | None = None) -> Tensor:
        """512 * block + place in the block, `[n]`, of samples `[n, 3]` up to 8 outside the grid; int32 if it fits."""
        weights = (TILE_SAMPLES * self.per_axis**2, TILE_SAMPLES * self.per_axis, TILE_SAMPLES)
        address = torch.empty(len(coords), dtype=self.address_dtype, device=coords.device) if out is None else out
        # That of block (0, 0, 0), which follows a margin.
        address.fill_(sum(weights))
        for axis, (weight, step) in enumerate(zip(weights, (BLOCK_SIZE**2, BLOCK_SIZE, 1))):
            coord = torch.empty_like(address).copy_(coords[:, axis])
            address.add_(coord, alpha=step).add_(coord.bitwise_right_shift_(3), alpha=weight - BLOCK_SIZE * step)
        return address

    def places(self, address: Tensor) -> Tensor:
        """512 * tile + place in the tile, `[n]`, of samples at `address [n]`; of its dtype."""
        tile = self.table.index_select(0, address >> 9)
        return (address & (TILE_SAMPLES - 1)).add_(tile, alpha=TILE_SAMPLES)

    def coords(self, place: Tensor) -> Tensor:
        """`[n, 3]` int32: the samples at `place [n]`."""
        local = place & (TILE_SAMPLES - 1)
        coords = torch.stack([local >> 6, local >> 3 & 7, local & 7], dim=1).int()
        return coords.add_(self.origins.index_select(0, place >> 9))

    def block_coords(self, blocks: Tensor) -> Tensor:
        """`[n, 3]` int32: the position of blocks `[n]` on the grid of blocks with its margin."""
        size = self.per_axis
        return torch.stack([blocks // size**2, blocks // size % size, blocks % size], dim=1).int()

    def block_at(self, position: Tensor) -> Tensor:
        """Place in `table` of blocks at `position [n, 3]`: of its dtype."""
        return (position[:, 0] * self.per_axis + position[:, 1]) * self.per_axis + position[:, 2]

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
            margin = self.block_at(around).unique()
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
        ranks: of the known samples, but for those added.
        num_given: samples that were given, without those beyond the grid and those added.
    """

    def __init__(self, index: TileIndex, known: Tensor, inside: Tensor, feats: Tensor, level: float):
        """`feats [N]` of any floating dtype are the values plus `level`."""
        self.index, self.known, self.inside = index, known, inside
        self.neighbours = index.neighbours()
        self.ranks = RankedBits(known[:, None], self.neighbours)
        self._feats, self._level, self.num_given = feats, level, len(feats)
        # Few, as a rule: merged with the others, they would take a copy of all.
        self._added_places = torch.empty(0, dtype=torch.int32, device=known.device)
        self._added_values = torch.empty(0, device=known.device)
        # A sample itself, and the next one along each axis; the samples at the corners of its cell.
        itself_and_next = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], device=known.device)
        self._next = step_table(itself_and_next, [0] * 4)
        corners = offsets(range(2), known.device)
        self._corners, self._row_corners = step_table(corners, [0] * 8), row_step_table(corners[::2])

    @classmethod
    def from_rows(cls, feats: Tensor, coords: Tensor, resolution: int, level: float) -> "SparseSamples":
        """
        From distinct rows `coords [N, 3]` and `feats [N]`.

        Raises:
            ValueError: if a row is repeated, or a value not finite.
        """
        device = coords.device
        index = TileIndex(resolution, device)
        chunk = ROW_PASS_FACTOR * tile_chunk(device)
        touched = allocate(len(index.table), torch.bool, device)
        places = allocate(len(coords), index.address_dtype, device)
        for part, address in zip(coords.split(chunk), places.split(chunk)):
            index.address(part, out=address)
            touched.index_fill_(0, (address >> 9).long(), True)
        tiles, beyond = index.add(flat_nonzero(touched))
        del touched
        if len(index) > MAX_TILES:
            raise ValueError(f"`coords` must lie in no more than {MAX_TILES} blocks of 8^3 samples.")

        sides = allocate(len(index) * TILE_SAMPLES, torch.uint8, device).view(-1, TILE_SAMPLES)
        sides[tiles] = beyond.to(torch.uint8).mul_(OUTSIDE)
        # One row for each pass. Tensors kept from each would lie between those that are not, and hold their memory.
        starts = range(0, len(coords), chunk)
        bounds, steps = torch.empty(len(starts), 2, device=device), places.new_ones(len(starts))
        for start, feat, place, bound, step in zip(starts, feats.split(chunk), places.split(chunk), bounds, steps):
            place.copy_(index.places(place))
            value = values_of(feat, level)
            torch.stack(value.aminmax(), out=bound)
            side = (value < 0).view(torch.uint8).mul_(INSIDE - OUTSIDE).add_(OUTSIDE)
            sides.view(-1).scatter_(0, place.long(), side)
            # From the last place of the pass before on.
            diff = places[max(start - 1, 0) : start + len(place)].diff()
            if len(diff):
                step.copy_(diff.amin())
        # NaN, too, is passed on by `aminmax`.
        if not bounds.isfinite().all():
            raise ValueError("`feats` must be finite.")
        known, inside = _planes(sides)
        del sides
        samples = cls(index, known, inside, feats, level)
        if samples.ranks.first[-1] - index.num_beyond != len(coords):
            raise ValueError("`coords` must not repeat a row.")
        # Rows in the order of their places, as decoders and `mesh_to_sparse_sdf` return them, serve as they are.
        if index.num_beyond or steps.amin() <= 0:
            values = allocate(len(coords) + index.num_beyond, torch.float32, device).fill_(1)
            for feat, place in zip(feats.split(chunk), places.split(chunk)):
                values.scatter_(0, samples._ranks_at(place.int()).long(), values_of(feat, level))
            samples._feats, samples._level = values, 0.0
        return samples

    def add(self, coords: Tensor, values: Tensor) -> Tensor:
        """
        Adds samples with `values [n]` at distinct `coords [n, 3]` that have none.

        Returns:
            The tiles that have got samples, ascending, `[m]` int64.
        """
        index, address = self.index, self.index.address(coords)
        blocks = (address >> 9).unique().long()
        tiles, beyond = index.add(blocks[index.table[blocks] == 0])
        out_of_grid = beyond.nonzero()
        out_of_grid = tiles[out_of_grid[:, 0]] * TILE_SAMPLES + out_of_grid[:, 1]
        places = torch.cat([index.places(address).long(), out_of_grid])
        values = torch.cat([values, values.new_ones(len(out_of_grid))])

        # Copies in any case: the ranks keep the known samples without those added.
        count = len(index) - len(self.known)
        self.known, self.inside = with_zeros(self.known, count), with_zeros(self.inside, count)
        if count:
            self.neighbours = index.neighbours()
            self.ranks.add_tiles(self.neighbours)
        bits = 1 << (places & 63)
        # Distinct bits that were not set: a sum sets them.
        self.known.view(-1).index_add_(0, places >> 6, bits)
        self.inside.view(-1).index_add_(0, places >> 6, torch.where(values < 0, bits, 0))
        places, order = torch.cat([self._added_places, places.int()]).sort()
        self._added_places, self._added_values = places, torch.cat([self._added_values, values])[order]
        return (places >> 9).unique().long()

    def keep_values(self) -> None:
        """Frees what the values along edges can be read without."""
        del self.known, self.inside, self.index.table

    def tiles(self, tile: Tensor) -> Tensor:
        """The values `[m, 8, 8, 8]` of tiles `tile [m]` int64, float32, NaN where there is no sample."""
        bits = bit_places(self.known.index_select(0, tile))
        place = (bits & (TILE_SAMPLES - 1)).add_(tile.int().index_select(0, bits >> 9), alpha=TILE_SAMPLES)
        tiles = torch.full((len(tile), BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), torch.nan, device=tile.device)
        step = self._next.index_select(0, (place & (TILE_SAMPLES - 1)).mul_(4))
        tiles.view(-1).index_copy_(0, bits.long(), self._values((place >> 9).mul_(8), step))
        return tiles

    def _values(self, tile: Tensor, step: Tensor) -> Tensor:
        if len(self._added_places) == 0:
            numbers = self.ranks.numbers(tile, step)
            return values_of(self._feats.index_select(0, numbers), self._level)
        numbers, gaps, places = self.ranks.numbers_and_gaps(tile, step)
        values = values_of(self._feats.index_select(0, numbers.clamp_(max=len(self._feats) - 1)), self._level)
        added = self._added_values.index_select(0, torch.searchsorted(self._added_places, places))
        return values.index_copy_(0, gaps, added)

    def _ranks_at(self, place: Tensor) -> Tensor:
        step = self._next.index_select(0, (place & (TILE_SAMPLES - 1)).mul_(4))
        return self.ranks.numbers((place >> 9).mul_(8), step)

    def edge_ends(self, place: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
        """The values `[n]` float32 at both ends of edges: from the samples at `place [n]` along `axis [n]`, int32."""
        tile, local = (place >> 9).mul_(8), (place & (TILE_SAMPLES - 1)).mul_(4)
        step = self._next.index_select(0, torch.cat([local, local.add(axis).add_(1)]))
        low, high = self._values(tile.repeat(2), step).chunk(2)
        return low, high

    def corners_of_rows(self, row: Tensor) -> Tensor:
        """
        Words `[n]` int64: which corners of the cells in rows `[n]` int32, place / 8, are inside. In byte c, bit z is
        corner c of the cell at z.
        """
        rows, neighbours = self.inside.view(torch.uint8).view(-1), self.neighbours.view(-1)
        tile, local = (row >> 6).mul_(8), row & 63
        corners = torch.empty(len(row), 8, dtype=torch.uint8, device=row.device)
        for corner in range(0, 8, 2):
            step = self._row_corners[corner >> 1].index_select(0, local)
            tile_at, row_at = (step & 7).add_(tile), step.bitwise_right_shift_(3)
            here, following = (
                rows.index_select(0, neighbours.index_select(0, tile_at + along_z).mul_(64).add_(row_at))
                for along_z in range(2)
            )
            corners[:, corner] = here
            corners[:, corner + 1] = (here >> 1).bitwise_or_(following.bitwise_left_shift_(7))
        return corners.view(torch.int64).view(-1)

    def cell_corners(self, place: Tensor) -> Tensor:
        """The values `[n, 8]` at the corners of the cells whose lowest ones are at `place [n]` int32."""
        tile = (place >> 9).mul_(8).repeat_interleave(8)
        step = self._corners.view(-1, 8).index_select(0, place & (TILE_SAMPLES - 1))
        return self._values(tile, step.flatten()).view(-1, 8)


def values_of(feats: Tensor, level: float) -> Tensor:
    """`feats` less `level`, float32."""
    values = feats.to(torch.float32)
    return values - level if level else values


def _planes(sides: Tensor) -> tuple[Tensor, Tensor]:
    """The planes of bits `[M, 8]` of samples that are known, and of those inside, from `sides [M, 512]` uint8."""
    known, inside = allocate(2 * len(sides) * BLOCK_SIZE, torch.int64, sides.device).view(2, len(sides), BLOCK_SIZE)
    chunk = BIT_PASS_FACTOR * tile_chunk(sides.device)
    for side, known_part, inside_part in zip(sides.split(chunk), known.split(chunk), inside.split(chunk)):
        known_part.copy_(pack_bits(side).view(-1, BLOCK_SIZE))
        inside_part.copy_(pack_bits(side & INSIDE - OUTSIDE).view(-1, BLOCK_SIZE))
    return known, inside
