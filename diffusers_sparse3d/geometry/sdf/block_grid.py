"""
Storage for the grid samples near a surface, in blocks, and a flood fill through them from outside the grid.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.runtime.dispatch import runs_kernels


# Samples in one pass over their slots.
SLOT_CHUNK = 1 << 22
# Samples of cubes in one pass over their slots: what fits a cache, and about 0.3 GB.
CPU_CUBE_CHUNK, GPU_CUBE_CHUNK = 1 << 18, 1 << 23
# Steps of the flood fill through inactive blocks on a GPU between two tests of whether it has ended: a step is a dozen
# operations, and a test waits for the GPU. A step through active blocks is a hundred operations, so each is tested.
FLOOD_STEPS = 4
# Most samples and blocks together that the flood fill by kernels takes: it counts them by integers of 32 bits.
MOST_NODES = (1 << 31) - (1 << 20)


class BlockGrid:
    """
    The active blocks of a grid, and flat storage for their samples.

    The slot of a sample is its index in that storage: row of the block * block_size^3 + index in the block. Slot
    `size` stands for every sample outside the active blocks.

    Args:
        coords: `[n, 3]` int32, samples; the blocks that hold at least one of them are active.
        resolution: samples per axis, a multiple of `block_size`.
        block_size: samples per block and axis, a power of two.

    Attributes:
        table: `[B, B, B]` int32, the row of each block, -1 for inactive ones, with B blocks per axis.
        blocks: `[M, 3]` int64, the coordinates of the active blocks, ascending.
        size: number of slots of active blocks.
    """

    def __init__(self, coords: Tensor, resolution: int, block_size: int):
        self.resolution, self.block_size = resolution, block_size
        self.blocks_per_axis = resolution // block_size
        self.table = torch.full((self.blocks_per_axis,) * 3, -1, dtype=torch.int32, device=coords.device)
        self.table[(coords // block_size).long().unbind(1)] = 0
        self.blocks = (self.table == 0).nonzero()
        self.table[self.blocks.unbind(1)] = torch.arange(len(self.blocks), dtype=torch.int32, device=coords.device)
        self.size = len(self.blocks) * block_size**3

    def slots(self, coords: Tensor) -> Tensor:
        """The slots `[n]` int64 of samples `coords [n, 3]`; `size` outside the active blocks and outside the grid."""
        if runs_kernels(self.table):
            from ..kernels import block_lookup

            return block_lookup.find_slots(coords, self.table, self.block_size, self.size)
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

    def bits_around(self, values: Tensor, coords: Tensor, span: range) -> Tensor:
        """
        The bitwise or of values over a cube of samples beside each of some samples.

        Args:
            values: `[size + 1]` uint8.
            coords: `[n, 3]` int32, samples of active blocks, which may repeat.
            span: steps along each axis, a power of two of them.

        Returns:
            `[n]` uint8.
        """
        if runs_kernels(self.table):
            from ..kernels import block_lookup

            return block_lookup.bits_around(values, coords, self.table, self.block_size, span)
        # Each distinct sample is looked up once.
        slots = self.slots(coords)
        occurs = self.full(False, torch.bool)
        occurs[slots] = True
        distinct = occurs.nonzero()[:, 0]
        result = self.full(0, torch.uint8)
        result[distinct] = self._bits_around_distinct(values, self.coords(distinct), span)
        return result[slots]

    def _bits_around_distinct(self, values: Tensor, coords: Tensor, span: range) -> Tensor:
        """
        `bits_around` for distinct samples.

        All samples of a cube are looked up at once, which on a GPU is a twentieth of the operations of one by one.
        """
        size, per_axis = self.block_size, self.blocks_per_axis
        device = coords.device
        steps = torch.arange(span.start, span.stop, dtype=torch.int32, device=device)
        chunk = CPU_CUBE_CHUNK if device.type == "cpu" else GPU_CUBE_CHUNK
        results = []
        for part in coords.split(max(1, chunk // len(span) ** 3)):
            along = part.T.contiguous().unsqueeze(2) + steps  # [3, n, steps]
            block = (along >> size.bit_length() - 1).clamp_(0, per_axis - 1)
            row = self.table.view(-1)[_joined(block, per_axis)]
            x, y, z = (along >= 0) & (along < self.resolution)
            stored = ((x[:, :, None] & y[:, None])[..., None] & z[:, None, None]) & (row >= 0)
            slot = torch.where(stored, row.long() * size**3 + _joined(along & size - 1, size), self.size)
            found = values[slot].flatten(1)
            while found.shape[1] > 1:
                half = found.shape[1] // 2
                found = found[:, :half] | found[:, half:]
            results.append(found[:, 0])
        return torch.cat(results)

    def coords(self, slots: Tensor) -> Tensor:
        """The samples `[n, 3]` int32 at `slots [n]`."""
        size = self.block_size
        local = slots % size**3
        place = torch.stack([local // size**2, local // size % size, local % size], dim=1)
        return (self.blocks[slots // size**3] * size + place).int()

    def full(self, value: float | bool | int, dtype: torch.dtype) -> Tensor:
        """A tensor `[size + 1]` with one value for every slot, including that of samples outside the active blocks."""
        return torch.full((self.size + 1,), value, dtype=dtype, device=self.table.device)

    def tiles(self, values: Tensor) -> Tensor:
        """A view `[M, s, s, s]`, s = block_size, of the slots of the active blocks in `values [size + 1]`."""
        return values[: self.size].view(len(self.blocks), *(self.block_size,) * 3)

    def flood_from_outside(self, free: Tensor) -> Tensor:
        """
        The free samples that a 6-connected path of free samples connects to the outside of the grid.

        Args:
            free: `[size + 1]` bool. Samples of inactive blocks are free.

        Returns:
            `[size + 1]` bool.
        """
        outside = self.full(False, torch.bool)
        if runs_kernels(self.table) and self.size + self.table.numel() < MOST_NODES:
            from ..kernels import flood

            reached = flood.flood_from_outside(self.tiles(free), self.blocks, self.table)
        elif free.device.type == "cpu":
            reached = torch.from_numpy(
                _flood_by_labels(self.tiles(free).numpy(), self.blocks.numpy(), self.table.numpy())
            )
        else:
            reached = _flood_by_steps(self.tiles(free), self.blocks, self.table)
        self.tiles(outside).copy_(reached)
        return outside


def _joined(places: Tensor, count: int) -> Tensor:
    """The index `[n, s, s, s]` in a grid of `count`^3 of all triples of places `[3, n, s]` along x, y and z."""
    x, y, z = places
    return ((x * count**2)[:, :, None] + (y * count)[:, None])[..., None] + z[:, None, None]


def _flood_by_labels(free: np.ndarray, blocks: np.ndarray, table: np.ndarray) -> np.ndarray:
    """
    The flood fill on a CPU, by connected components of samples within each block, and then of these components.

    Args:
        free: `[M, s, s, s]` bool, the free samples of the active blocks.
        blocks: `[M, 3]`, see `BlockGrid`.
        table: `[B, B, B]`, see `BlockGrid`.

    Returns:
        `[M, s, s, s]` bool, the samples that are reached from outside.
    """
    from scipy import ndimage, sparse

    count, size, per_axis = len(blocks), free.shape[-1], len(table)
    padded = np.zeros((count, size + 1, size, size), dtype=bool)
    padded[:, :size] = free
    labels, _ = ndimage.label(padded.reshape(-1, size, size))
    labels = labels.reshape(count, size + 1, size, size)[:, :size]
    regions, region_count = ndimage.label(table < 0)

    # The nodes of the graph: 0 is the outside of the grid, then come the connected regions of inactive blocks, then
    # the components of samples.
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
    first, second = np.concatenate(edges, axis=1)
    nodes = 1 + region_count + int(labels.max())
    graph = sparse.coo_matrix((np.ones(len(first), dtype=bool), (first, second)), shape=(nodes, nodes))
    component = sparse.csgraph.connected_components(graph, directed=False)[1]
    reached = component == component[0]
    return reached[labels + region_count] & (labels > 0)


def _flood_by_steps(free: Tensor, blocks: Tensor, table: Tensor) -> Tensor:
    """
    The flood fill on a GPU without kernels, in steps from all reached samples at once; results as of
    `_flood_by_labels`.
    """
    device, size = free.device, free.shape[-1]
    # A margin of inactive blocks stands for the outside of the grid.
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
        # The flood passes through inactive blocks until it reaches no further one,
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
        # then enters each active block from the samples beside it and passes through the block,
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
        # and leaves active blocks for inactive ones.
        for (axis, side), place in zip(sides, places):
            leaving = reached.select(axis + 1, side).flatten(1).any(dim=1) & inactive[place]
            reached_blocks[tuple(index[leaving] for index in place)] = True


def _without_repeats(pairs: np.ndarray) -> np.ndarray:
    """`pairs [2, n]` without the columns that equal the column before."""
    return pairs[:, np.r_[True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)][: pairs.shape[1]]]
