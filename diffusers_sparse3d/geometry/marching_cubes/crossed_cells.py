"""
The cells of the grid that the surface crosses, and how it passes through each.

Edges and cells are tested in planes of bits, 64 samples at a time. The surface crosses an edge whose ends are on
different sides, and a cell whose corners are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cell_table import FACES, triangle_table
from .sample_bits import (
    BIT_PASS_FACTOR,
    LOWEST_BITS,
    TILE_SAMPLES,
    allocate,
    bit_places,
    corner_planes,
    count_bits,
    flat_nonzero,
    places_in_rows,
    rows_with_bits,
    tile_chunk,
    transpose_bytes,
    with_zeros,
)
from .sparse_samples import SparseSamples


class CrossedCells:
    """
    The edges and cells that the surface crosses, and the places where samples are missing to tell.

    Args:
        samples: the field.

    Attributes:
        crossings: `[M, 3, 8]` int64, planes of bits: whether the surface crosses the edge from the sample to the next
            one along x, y, z.
        crossed: `[M, 8]` int64, a plane of bits: whether the surface crosses the cell whose lowest corner the sample
            is, and all eight corners are known.
        open_cells: `[n, 3]` int32, the cells that have known corners on both sides and lack others.
        open_samples: `[n, 3]` int32, the samples of tiles beside blocks without a tile, where the surface may cross
            cells that belong to those blocks.
    """

    def __init__(self, samples: SparseSamples):
        num_tiles, device = len(samples.known), samples.known.device
        self.crossings = allocate(24 * num_tiles, torch.int64, device).view(num_tiles, 3, 8)
        self.crossed = torch.empty(num_tiles, 8, dtype=torch.int64, device=device)
        self.open_cells = self._scan(samples, torch.arange(num_tiles, device=device))
        self.open_samples = _open_samples(samples)

    def update(self, samples: SparseSamples, changed: Tensor) -> None:
        """Updates `crossings` and `crossed` after samples have been added in the tiles `changed [m]` int64."""
        index = samples.index
        num_before, num_tiles = len(self.crossed), len(samples.known)
        if num_tiles > num_before:
            self.crossings = with_zeros(self.crossings, num_tiles - num_before)
            self.crossed = with_zeros(self.crossed, num_tiles - num_before)
        again = torch.zeros(num_tiles, dtype=torch.bool, device=changed.device)
        again[num_before:] = True
        # A cell belongs to the tile of its lowest corner, so tiles below a changed one change too.
        below = (index.blocks[changed, None] - index.steps()).clamp_(min=0)
        again[index.table[below].long()] = True
        again[0] = False
        self._scan(samples, flat_nonzero(again))

    def _scan(self, samples: SparseSamples, tiles: Tensor) -> Tensor:
        """Sets `crossings` and `crossed` of `tiles [n]` int64, and returns their open cells `[k, 3]` int32."""
        # The words that hold corner c of the cells of a tile, in the result of `corner_planes`.
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
    """
    The samples `[n, 3]` int32 of those tiles that have no tile below them at a lower face or edge although samples on
    both sides lie there: the surface may cross cells whose lowest corner is in the missing block.
    """
    index = samples.index
    below = (index.blocks[:, None] - index.steps()[[4, 2, 1, 6, 5, 3]]).clamp_(min=0)
    no_tile = index.table.index_select(0, below.flatten()).view(-1, 6) == 0
    tile = (_both_sides_below(samples) & no_tile).any(dim=1).nonzero()[:, 0]
    place = bit_places(samples.known.index_select(0, tile))
    return index.coords((place & (TILE_SAMPLES - 1)).add_(tile.int().index_select(0, place >> 9), alpha=TILE_SAMPLES))


def _both_sides_below(samples: SparseSamples) -> Tensor:
    """
    Whether samples on both sides of the surface lie on the lower faces and edges of each tile.

    The cells below a face also have corners in the first samples of the tiles beside this one, which are included.

    Returns:
        `[M, 6]` bool: the lower faces along x, y, z, and the lower edges along x and y, x and z, y and z.
    """
    inside = _samples_below(samples, samples.inside)
    return inside & _samples_below(samples, samples.known ^ samples.inside)


def _samples_below(samples: SparseSamples, plane: Tensor) -> Tensor:
    """Whether any bit of `plane [M, 8]` is set on the lower faces and edges: `[M, 6]`, see `_both_sides_below`."""
    next_z, next_y, next_yz, next_x, next_xz, next_xy = samples.neighbours[:, 1:7].unbind(1)
    x_face = plane[:, 0]
    union = plane[:, :4] | plane[:, 4:]
    union = union[:, :2] | union[:, 2:]
    union = union[:, 0] | union[:, 1]
    y_face, z_face = union & 255, union & LOWEST_BITS
    along_z, along_y, along_x, corner = x_face & 255, x_face & LOWEST_BITS, union & 1, x_face & 1
    parts = [
        x_face | along_z[next_y] | along_y[next_z] | corner[next_yz],
        y_face | along_z[next_x] | along_x[next_z] | corner[next_xz],
        z_face | along_y[next_x] | along_x[next_y] | corner[next_xy],
        along_z | corner[next_z],
        along_y | corner[next_y],
        along_x | corner[next_x],
    ]
    return torch.stack(parts, dim=1) != 0


def _joined(corners: Tensor, faces: Tensor) -> Tensor:
    """
    Whether the inside corners of an ambiguous face are connected on it, by the sign of the face's bilinear saddle.

    Args:
        corners: `[n, 8]`, values at the corners of cells.
        faces: `[6, 4]`, the corners of each face in cyclic order.

    Returns:
        `[n, 6]` bool, False for faces that are not ambiguous.
    """
    first, second, third, fourth = corners[:, faces].unbind(2)
    diagonal, other = first * third, second * fourth
    ambiguous = ((first < 0) == (third < 0)) & ((second < 0) == (fourth < 0)) & ((first < 0) != (second < 0))
    return ambiguous & torch.where(first < 0, diagonal > other, other > diagonal)


class CellConfigurations:
    """
    The configuration of each crossed cell, see `cell_table.triangle_table`.

    Args:
        samples: the field.
        crossed: `[M, 8]` int64, see `CrossedCells`.

    Attributes:
        crossed: as given.
        rows: `[n]` int16, the configurations, in ascending order of the places of the bits of `crossed`.
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
            # The corners of eight cells along z are read at once, as eight bytes.
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
        """Yields the configurations `[n]` int32 of the cells of each pass."""
        for rows in self.rows.split(self._sizes):
            yield rows.int()

    def passes(self, wanted: list[bool] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yields, for each pass, the places of the cells' lowest corners and their configurations, `[n]` int32 each.

        Args:
            wanted: for each pass, whether to yield it; every pass if None.
        """
        chunk = tile_chunk(self.crossed.device)
        for number, (words, rows) in enumerate(zip(self.crossed.split(chunk), self.rows_of_passes())):
            if wanted is None or wanted[number]:
                yield bit_places(words).add_(TILE_SAMPLES * chunk * number), rows
