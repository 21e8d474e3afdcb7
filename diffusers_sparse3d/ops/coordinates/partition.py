"""Voxels grouped into blocks, as attention in windows and Spatial Sparse Attention need them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..checks import check_at_least
from .voxels import MAX_RESOLUTION, check_voxel_rows


@dataclass
class Partition:
    """Rows grouped into blocks; the groups are the segments of packed (variable-length) operators.

    Attributes:
        order: `[N]` int64, `packed = feats[order]` has the rows block by block.
        inverse: `[N]` int64, `feats = packed[inverse]`.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts among the packed rows.
        max_seqlen: rows of the largest block (0 without rows).
        coords: `[num_blocks, 4]` int32 block coordinates (batch, x, y, z), ascending; in a partition by sample, the
            sample index and zeros.
        block_index: `[N]` int64, the block of each row, in the original row order.
        batch_cu_blocks: `[batch_size + 1]` int32, where each sample's blocks start.
        in_order: whether `order` is known to change nothing, so that no rows need to be moved.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    coords: Tensor
    block_index: Tensor
    batch_cu_blocks: Tensor
    in_order: bool = False

    @cached_property
    def blocks_per_sample(self) -> list[int]:
        """Number of blocks of each sample, transferred to the host at the first use."""
        return self.batch_cu_blocks.diff().tolist()

    @cached_property
    def most_blocks(self) -> int:
        """Number of blocks of the sample that has most of them."""
        return max(self.blocks_per_sample, default=0)

    @cached_property
    def rows_per_sample(self) -> list[int]:
        """Number of rows of each sample, transferred to the host at the first use."""
        return self.cu_seqlens[self.batch_cu_blocks.long()].diff().tolist()


def cumulative(lengths: Tensor) -> Tensor:
    """`[S]` integer lengths -> `[S + 1]` int32 segment boundaries that start with 0."""
    boundaries = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=boundaries[1:])
    return boundaries


def partition_coords(coords: Tensor, block_size: int, shift: int = 0, batch_size: int | None = None) -> Partition:
    """Group voxels by sample and by the cube (x, y, z + shift) // block_size.

    Args:
        coords: `[N, 4]` coordinates in any order.
        block_size: edge of a block in voxels.
        shift: added to x, y and z before the division.
        batch_size: number of samples; the largest batch index plus one if None.

    Returns:
        The partition: blocks in ascending (batch, x, y, z) order, the rows of a block in ascending (x, y, z) order.

    Raises:
        TypeError, ValueError: if `coords` is no tensor of integers of this shape, or a size is out of range.
    """
    check_voxel_rows(coords)
    check_at_least(1, block_size=block_size)
    check_at_least(0, shift=shift)
    num_blocks = (MAX_RESOLUTION + shift) // block_size + 1
    batch = coords[:, 0].long()
    shifted = coords[:, 1:].long() + shift
    block = shifted.div(block_size, rounding_mode="floor")
    inside = shifted - block * block_size
    # Numbers from the host, as a tensor of powers, would have to be waited for.
    block_key, key = batch, torch.zeros_like(batch)
    for axis in range(3):
        block_key = block_key * num_blocks + block[:, axis]
        key = key * block_size + inside[:, axis]
    order = torch.argsort(block_key * block_size**3 + key)
    keys, block_of_packed, lengths = torch.unique_consecutive(
        block_key[order], return_inverse=True, return_counts=True
    )
    columns = [keys // num_blocks**3, *(keys // num_blocks**power % num_blocks for power in (2, 1, 0))]
    block_coords = torch.stack(columns, 1).int()
    inverse = invert_permutation(order)
    if batch_size is None:
        batch_size = int(block_coords[-1, 0]) + 1 if block_coords.shape[0] else 0
    samples = torch.arange(batch_size + 1, dtype=torch.int32, device=coords.device)
    return Partition(
        order=order,
        inverse=inverse,
        cu_seqlens=cumulative(lengths),
        max_seqlen=int(lengths.max()) if lengths.numel() else 0,
        coords=block_coords,
        block_index=block_of_packed[inverse],
        batch_cu_blocks=torch.searchsorted(block_coords[:, 0].contiguous(), samples, out_int32=True),
    )


def invert_permutation(order: Tensor) -> Tensor:
    """The permutation that undoes `[N]` int64 `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
