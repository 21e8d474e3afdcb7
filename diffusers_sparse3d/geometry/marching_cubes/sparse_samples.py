"""
The samples of a sparse field, in tiles of 8^3: for each, whether it is known and inside (bits), and its value.
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
from .tile_index import TileIndex


# The most tiles of a field. Places are int32, of which half are left to the samples that complete the surface.
MAX_TILES = 1 << 21


class SparseSamples:
    """
    Sparse samples, numbered in ascending order of their places, 512 * tile + 64 x + 8 y + z.

    Values are read from the caller's rows by the rank of a sample among the known ones. Samples added later are few;
    they are kept in a sorted list of their own, since merging them with the others would copy all values.

    Args:
        index: the index of the tiles.
        known, inside: `[M, 8]` int64, planes of bits of the samples with a value, and of those with a negative value.
        feats: `[N]`, the caller's values, any floating dtype. `from_rows` replaces them by a sorted copy, reduced by
            `level`, if the rows are not in the order of their places.
        level: the iso-level; a sample is inside where its value minus `level` is negative.

    Attributes:
        index, known, inside: as given; `known` and `inside` grow with `add`.
        neighbours: `[M, 8]` int32, see `TileIndex.neighbours`.
        ranks: numbers the known samples, without those added by `add`.
        num_given: number of the caller's samples.
    """

    def __init__(self, index: TileIndex, known: Tensor, inside: Tensor, feats: Tensor, level: float):
        self.index, self.known, self.inside = index, known, inside
        self.neighbours = index.neighbours()
        self.ranks = RankedBits(known[:, None], self.neighbours)
        self._feats, self._level, self.num_given = feats, level, len(feats)
        self._added_places = torch.empty(0, dtype=torch.int32, device=known.device)
        self._added_values = torch.empty(0, device=known.device)
        # Steps to the sample itself and to the next one along each axis, and to the corners of the sample's cell.
        itself_and_next = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], device=known.device)
        self._next = step_table(itself_and_next, [0] * 4)
        corners = offsets(range(2), known.device)
        self._corners, self._row_corners = step_table(corners, [0] * 8), row_step_table(corners[::2])

    @classmethod
    def from_rows(cls, feats: Tensor, coords: Tensor, resolution: int, level: float) -> "SparseSamples":
        """
        Builds the samples from rows in any order.

        Args:
            feats: `[N]`, any floating dtype.
            coords: `[N, 3]` integers, distinct, from 0 to `resolution - 1`.
            resolution: samples per axis.
            level: the iso-level.

        Raises:
            ValueError: if `coords` has a repeated row or touches too many blocks, or `feats` is not finite.
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
            raise ValueError(f"`coords` must lie in at most {MAX_TILES} blocks of 8^3 samples, got {len(index)}.")

        sides = allocate(len(index) * TILE_SAMPLES, torch.uint8, device).view(-1, TILE_SAMPLES)
        sides[tiles] = beyond.to(torch.uint8).mul_(OUTSIDE)
        # Each pass writes one row of `bounds` and `steps`. Small tensors kept from every pass would be scattered among
        # the freed ones and keep their memory from being returned.
        starts = range(0, len(coords), chunk)
        bounds, steps = torch.empty(len(starts), 2, device=device), places.new_ones(len(starts))
        for start, feat, place, bound, step in zip(starts, feats.split(chunk), places.split(chunk), bounds, steps):
            place.copy_(index.places(place))
            value = values_of(feat, level)
            torch.stack(value.aminmax(), out=bound)
            side = (value < 0).view(torch.uint8).mul_(INSIDE - OUTSIDE).add_(OUTSIDE)
            sides.view(-1).scatter_(0, place.long(), side)
            # The differences start at the last place of the pass before.
            diff = places[max(start - 1, 0) : start + len(place)].diff()
            if len(diff):
                step.copy_(diff.amin())
        # `aminmax` propagates NaN.
        if not bounds.isfinite().all():
            raise ValueError("`feats` must be finite.")
        known, inside = _planes(sides)
        del sides
        samples = cls(index, known, inside, feats, level)
        if samples.ranks.first[-1] - index.num_beyond != len(coords):
            raise ValueError("`coords` must not repeat a row.")
        # Rows that are in the order of their places, as those of decoders and of `mesh_to_sparse_sdf` are, need no
        # copy.
        if index.num_beyond or steps.amin() <= 0:
            values = allocate(len(coords) + index.num_beyond, torch.float32, device).fill_(1)
            for feat, place in zip(feats.split(chunk), places.split(chunk)):
                values.scatter_(0, samples._ranks_at(place.int()).long(), values_of(feat, level))
            samples._feats, samples._level = values, 0.0
        return samples

    def add(self, coords: Tensor, values: Tensor) -> Tensor:
        """
        Adds samples at coordinates that have none.

        Args:
            coords: `[n, 3]` integers, distinct.
            values: `[n]` float32, already reduced by the level.

        Returns:
            The tiles that hold added samples, `[m]` int64, ascending.
        """
        index, address = self.index, self.index.address(coords)
        blocks = (address >> 9).unique().long()
        tiles, beyond = index.add(blocks[index.table[blocks] == 0])
        out_of_grid = beyond.nonzero()
        out_of_grid = tiles[out_of_grid[:, 0]] * TILE_SAMPLES + out_of_grid[:, 1]
        places = torch.cat([index.places(address).long(), out_of_grid])
        values = torch.cat([values, values.new_ones(len(out_of_grid))])

        # `with_zeros` copies even if no tile is new: `ranks` still refers to the known samples without those added.
        count = len(index) - len(self.known)
        self.known, self.inside = with_zeros(self.known, count), with_zeros(self.inside, count)
        if count:
            self.neighbours = index.neighbours()
            self.ranks.add_tiles(self.neighbours)
        bits = 1 << (places & 63)
        # The bits are distinct and not yet set, so adding them sets them.
        self.known.view(-1).index_add_(0, places >> 6, bits)
        self.inside.view(-1).index_add_(0, places >> 6, torch.where(values < 0, bits, 0))
        places, order = torch.cat([self._added_places, places.int()]).sort()
        self._added_places, self._added_values = places, torch.cat([self._added_values, values])[order]
        return (places >> 9).unique().long()

    def keep_values(self) -> None:
        """Frees everything but what `edge_ends` and `index.coords` need."""
        del self.known, self.inside, self.index.table

    def tiles(self, tile: Tensor) -> Tensor:
        """The values `[m, 8, 8, 8]` float32 of tiles `tile [m]` int64; NaN for samples that are not known."""
        bits = bit_places(self.known.index_select(0, tile))
        place = (bits & (TILE_SAMPLES - 1)).add_(tile.int().index_select(0, bits >> 9), alpha=TILE_SAMPLES)
        tiles = torch.full((len(tile), BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), torch.nan, device=tile.device)
        step = self._next.index_select(0, (place & (TILE_SAMPLES - 1)).mul_(4))
        tiles.view(-1).index_copy_(0, bits.long(), self._values((place >> 9).mul_(8), step))
        return tiles

    def _values(self, tile: Tensor, step: Tensor) -> Tensor:
        """The values `[n]` float32 of samples; for `tile` and `step` see `RankedBits.numbers`."""
        if len(self._added_places) == 0:
            numbers = self.ranks.numbers(tile, step)
            return values_of(self._feats.index_select(0, numbers), self._level)
        numbers, gaps, places = self.ranks.numbers_and_gaps(tile, step)
        values = values_of(self._feats.index_select(0, numbers.clamp_(max=len(self._feats) - 1)), self._level)
        added = self._added_values.index_select(0, torch.searchsorted(self._added_places, places))
        return values.index_copy_(0, gaps, added)

    def _ranks_at(self, place: Tensor) -> Tensor:
        """The ranks `[n]` int32 of the known samples at `place [n]` int32."""
        step = self._next.index_select(0, (place & (TILE_SAMPLES - 1)).mul_(4))
        return self.ranks.numbers((place >> 9).mul_(8), step)

    def edge_ends(self, place: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
        """
        The values at both ends of grid edges.

        Args:
            place: `[n]` int32, the sample at the lower end of each edge.
            axis: `[n]` int32, the direction of each edge.

        Returns:
            The values `[n]` float32 at the lower ends, and those at the upper ends.
        """
        tile, local = (place >> 9).mul_(8), (place & (TILE_SAMPLES - 1)).mul_(4)
        step = self._next.index_select(0, torch.cat([local, local.add(axis).add_(1)]))
        low, high = self._values(tile.repeat(2), step).chunk(2)
        return low, high

    def corners_of_rows(self, row: Tensor) -> Tensor:
        """
        Which corners of the cells in rows of eight along z are inside.

        Args:
            row: `[n]` int32, the place of the row's first sample divided by 8.

        Returns:
            Words `[n]` int64: bit z of byte c says that corner c of the cell at z is inside.
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
        """The values `[n, 8]` float32 at the corners of the cells whose lowest corners are at `place [n]` int32."""
        tile = (place >> 9).mul_(8).repeat_interleave(8)
        step = self._corners.view(-1, 8).index_select(0, place & (TILE_SAMPLES - 1))
        return self._values(tile, step.flatten()).view(-1, 8)


def values_of(feats: Tensor, level: float) -> Tensor:
    """`feats` minus `level`, float32."""
    values = feats.to(torch.float32)
    return values - level if level else values


def _planes(sides: Tensor) -> tuple[Tensor, Tensor]:
    """
    Packs `sides [M, 512]` uint8, of values 0, `OUTSIDE` and `INSIDE`, into planes of bits.

    Returns:
        The planes `[M, 8]` int64 of the known samples, and of those inside.
    """
    known, inside = allocate(2 * len(sides) * BLOCK_SIZE, torch.int64, sides.device).view(2, len(sides), BLOCK_SIZE)
    chunk = BIT_PASS_FACTOR * tile_chunk(sides.device)
    for side, known_part, inside_part in zip(sides.split(chunk), known.split(chunk), inside.split(chunk)):
        known_part.copy_(pack_bits(side).view(-1, BLOCK_SIZE))
        inside_part.copy_(pack_bits(side & INSIDE - OUTSIDE).view(-1, BLOCK_SIZE))
    return known, inside
