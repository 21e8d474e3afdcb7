"""
Index of the tiles that hold sparse samples.

Samples outside the grid count as outside the object. Tiles at the border of the grid therefore have neighbours in a
margin of one block around the grid, whose samples say so.
"""

import torch
from torch import Tensor

from .sample_bits import BLOCK_SIZE, TILE_SAMPLES, allocate, offsets


class TileIndex:
    """
    Numbers the tiles, which are the blocks of 8^3 samples that have samples, and the blocks of the margin beside them.

    Tile 0 is a placeholder without samples. A block is identified by its position in `table`, a sample by its address,
    512 * block + place in the block, or by its place, 512 * tile + place in the tile.

    Args:
        resolution: samples per axis of the grid.
        device: device of all tensors.

    Attributes:
        per_axis: P, blocks per axis of the grid, with one block of margin on either side.
        table: `[P^3]` int32, the tile of each block, 0 for blocks without one.
        blocks: `[M]` int64, the block of each tile.
        origins: `[M, 3]` int32, the coordinates of the first sample of each tile.
        num_beyond: number of samples of the tiles that lie outside the grid.
        address_dtype: int32 if every address fits, which holds for grids up to 1272^3, else int64.
    """

    def __init__(self, resolution: int, device: torch.device):
        self.resolution = resolution
        self.per_axis = -(-resolution // BLOCK_SIZE) + 2
        self.table = allocate(self.per_axis**3, torch.int32, device)
        self.address_dtype = torch.int32 if len(self.table) * TILE_SAMPLES < 1 << 31 else torch.int64
        self.blocks = torch.zeros(1, dtype=torch.int64, device=device)
        self.origins = torch.zeros(1, 3, dtype=torch.int32, device=device)
        self.num_beyond = 0

    def __len__(self) -> int:
        """The number of tiles, the placeholder included."""
        return len(self.blocks)

    def address(self, coords: Tensor, out: Tensor | None = None) -> Tensor:
        """
        The addresses `[n]`, of dtype `address_dtype`, of samples.

        Args:
            coords: `[n, 3]` integers, from -8 to `resolution + 7`.
            out: `[n]`, where to write the result; a new tensor if None.
        """
        weights = (TILE_SAMPLES * self.per_axis**2, TILE_SAMPLES * self.per_axis, TILE_SAMPLES)
        address = torch.empty(len(coords), dtype=self.address_dtype, device=coords.device) if out is None else out
        # The address of sample (0, 0, 0): its block follows one block of margin along each axis.
        address.fill_(sum(weights))
        for axis, (weight, step) in enumerate(zip(weights, (BLOCK_SIZE**2, BLOCK_SIZE, 1))):
            coord = torch.empty_like(address).copy_(coords[:, axis])
            address.add_(coord, alpha=step).add_(coord.bitwise_right_shift_(3), alpha=weight - BLOCK_SIZE * step)
        return address

    def places(self, address: Tensor) -> Tensor:
        """The places `[n]` of the samples at `address [n]`, in the dtype of `address`."""
        tile = self.table.index_select(0, address >> 9)
        return (address & (TILE_SAMPLES - 1)).add_(tile, alpha=TILE_SAMPLES)

    def coords(self, place: Tensor) -> Tensor:
        """The coordinates `[n, 3]` int32 of the samples at `place [n]`."""
        local = place & (TILE_SAMPLES - 1)
        coords = torch.stack([local >> 6, local >> 3 & 7, local & 7], dim=1).int()
        return coords.add_(self.origins.index_select(0, place >> 9))

    def block_coords(self, blocks: Tensor) -> Tensor:
        """The positions `[n, 3]` int32 of blocks `[n]` in the grid of blocks; the margin is at 0 and P - 1."""
        size = self.per_axis
        return torch.stack([blocks // size**2, blocks // size % size, blocks % size], dim=1).int()

    def block_at(self, position: Tensor) -> Tensor:
        """The blocks `[n]` at `position [n, 3]`, in the dtype of `position`."""
        return (position[:, 0] * self.per_axis + position[:, 1]) * self.per_axis + position[:, 2]

    def in_margin(self, position: Tensor) -> Tensor:
        """`[n]` bool: whether the block at `position [n, 3]` lies wholly outside the grid."""
        return ((position == 0) | (BLOCK_SIZE * (position - 1) >= self.resolution)).any(dim=1)

    def steps(self) -> Tensor:
        """
        `[8]` int64: the differences between a block's position in `table` and those of the eight blocks around its
        upper corner, the block itself first, z fastest.
        """
        size = self.per_axis
        return (offsets(range(2), self.table.device) * torch.tensor([size * size, size, 1]).to(self.table)).sum(dim=1)

    def neighbours(self) -> Tensor:
        """
        `[M, 8]` int32: the tiles around the upper corner of each tile, the tile itself first, z fastest; 0 for blocks
        without a tile. The placeholder, tile 0, has only itself as a neighbour.
        """
        blocks = (self.blocks[:, None] + self.steps()).clamp_(max=len(self.table) - 1)
        neighbours = self.table.index_select(0, blocks.flatten()).view(-1, 8)
        neighbours[0] = 0
        return neighbours

    def add(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """
        Adds tiles for blocks that have none, and tiles for the blocks of the margin beside them.

        Args:
            blocks: `[n]` int64, distinct.

        Returns:
            The new tiles that extend beyond the grid, `[b]` int64, and which of their samples lie there, `[b, 512]`
            bool.
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
