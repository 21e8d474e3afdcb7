"""Integer voxel coordinates in plain PyTorch: keys, unique, pooling, subdivision, neighbour maps, partitions.

Coordinates are `[N, 4]` int32 rows (batch, x, y, z) with 0 <= x, y, z < 2048. A row is encoded as one int64 key whose
order is the lexicographic order of the row, so that sorting and searching need one tensor operation each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


MAX_RESOLUTION = 2048

# Bits of an axis in a key: one more than MAX_RESOLUTION needs, and coordinates stored plus one, so that a key stays
# distinct one step outside.
AXIS_BITS = 12
_AXIS_STEPS = (1 << 2 * AXIS_BITS, 1 << AXIS_BITS, 1)
# (dx, dy) columns that come before (0, 0) lexicographically; the columns after it follow by symmetry.
_HALF_COLUMNS = ((-1, -1), (-1, 0), (-1, 1), (0, -1))


@dataclass
class Partition:
    """Rows grouped into blocks; the groups are the segments of packed (variable-length) operators.

    Attributes:
        order: `[N]` int64, `packed = feats[order]` has the rows block by block.
        inverse: `[N]` int64, `feats = packed[inverse]`.
        cu_seqlens: `[num_blocks + 1]` int32, where each block starts among the packed rows.
        max_seqlen: rows of the largest block (0 without rows).
        coords: `[num_blocks, 4]` int32 block coordinates (batch, x, y, z), ascending; of a partition by sample, the
            sample index and zeros.
        block_index: `[N]` int64, the block of each row, in the original row order.
        batch_cu_blocks: `[batch_size + 1]` int32, where each sample's blocks start.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    coords: Tensor
    block_index: Tensor
    batch_cu_blocks: Tensor

    @cached_property
    def blocks_per_sample(self) -> list[int]:
        """On the host, transferred at the first use."""
        return self.batch_cu_blocks.diff().tolist()

    @cached_property
    def most_blocks(self) -> int:
        """Blocks of the sample that has most."""
        return max(self.blocks_per_sample, default=0)

    @cached_property
    def rows_per_sample(self) -> list[int]:
        """On the host, transferred at the first use."""
        return self.cu_seqlens[self.batch_cu_blocks.long()].diff().tolist()


def offset_index(dx: int, dy: int, dz: int) -> int:
    """The index k of the 3x3x3 kernel offset (dx, dy, dz): x runs fastest."""
    return (dx + 1) + 3 * (dy + 1) + 9 * (dz + 1)


def cumulative(lengths: Tensor) -> Tensor:
    """`[S]` integer lengths -> `[S + 1]` int32 segment boundaries that start with 0."""
    boundaries = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=boundaries[1:])
    return boundaries


def check_coords(coords: Tensor, resolution: int | None = None, name: str = "coords") -> None:
    """Check that `coords` is a valid set of voxels.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z).
        resolution: exclusive upper bound of x, y and z; 2048 if None.
        name: what the error messages call the argument.

    Raises:
        ValueError: if the type, dtype or shape is wrong, a coordinate is out of range, or a voxel occurs twice.
    """
    if not isinstance(coords, Tensor) or coords.dtype != torch.int32:
        raise ValueError(f"`{name}` has to be an int32 tensor, got {getattr(coords, 'dtype', type(coords))}")
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"`{name}` has to have shape [N, 4] (batch, x, y, z), got {list(coords.shape)}")
    if coords.shape[0] == 0:
        return
    resolution = MAX_RESOLUTION if resolution is None else resolution
    lowest, highest = torch.aminmax(coords, dim=0)
    if lowest.min() < 0:
        raise ValueError(f"`{name}` has to be non-negative, its columns start at {lowest.tolist()}")
    if highest[1:].max() >= resolution:
        raise ValueError(f"`{name}` has to lie below the resolution {resolution}, its maximum is {highest.tolist()}")
    keys = encode_coords(coords).sort().values
    duplicates = int((keys[1:] == keys[:-1]).sum())
    if duplicates:
        raise ValueError(f"`{name}` has {duplicates} duplicate rows; each voxel may occur once")


def encode_coords(coords: Tensor) -> Tensor:
    """`[N, 4]` coordinates, each axis in -1..4094 -> `[N]` int64 keys in lexicographic order of the rows."""
    batch, x, y, z = coords.long().unbind(1)
    step_x, step_y, _ = _AXIS_STEPS
    return (batch << 3 * AXIS_BITS) + (x + 1) * step_x + (y + 1) * step_y + (z + 1)


def decode_coords(keys: Tensor) -> Tensor:
    """The inverse of `encode_coords`: `[N]` int64 keys -> `[N, 4]` int32 coordinates."""
    mask = (1 << AXIS_BITS) - 1
    columns = [keys >> 3 * AXIS_BITS] + [(keys >> shift & mask) - 1 for shift in (2 * AXIS_BITS, AXIS_BITS, 0)]
    return torch.stack(columns, 1).int()


def unique_coords(coords: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of `[N, 4]` coordinates.

    Returns:
        `[M, 4]` int32 coordinates in ascending order, and for each input row its place among them, `[N]` int64.
    """
    keys, inverse = torch.unique(encode_coords(coords), return_inverse=True)
    return decode_coords(keys), inverse


def downsample_coords(coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The voxels of the grid that is coarser by `factor`.

    Returns:
        `[M, 4]` int32 coarse coordinates in ascending order, and the coarse row of each input row, `[N]` int64.
    """
    coarse = torch.cat([coords[:, :1], coords[:, 1:].div(factor, rounding_mode="floor")], 1)
    return unique_coords(coarse)


def subdivide_coords(coords: Tensor) -> Tensor:
    """`[N, 4]` -> `[8 N, 4]`: the eight children of voxel i are rows 8 i + j, j = 4 x + 2 y + z inside the voxel."""
    children = torch.arange(8, dtype=coords.dtype, device=coords.device)
    corner = torch.stack([torch.zeros_like(children), children >> 2, children >> 1 & 1, children & 1], 1)
    doubled = coords * coords.new_tensor([1, 2, 2, 2])
    return (doubled[:, None] + corner).reshape(-1, 4)


def neighbour_map(coords: Tensor) -> Tensor:
    """See `ops.coordinates.neighbour_map`."""
    num_voxels = coords.shape[0]
    neighbours = torch.full((27, num_voxels), num_voxels, dtype=torch.int32, device=coords.device)
    if num_voxels == 0:
        return neighbours
    keys, order = encode_coords(coords).sort()
    # Everything below is in sorted rows; a last row past the end stands for "missing".
    keys = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])
    order = torch.cat([order, order.new_full((1,), num_voxels)])
    row_of_sorted = order[:-1].int()
    rows = torch.arange(num_voxels, device=coords.device)
    step_x, step_y, _ = _AXIS_STEPS

    def connect(offset: tuple[int, int, int], position: Tensor, found: Tensor) -> None:
        target = torch.where(found, order[position], num_voxels)
        neighbours[offset_index(*offset)] = neighbours.new_empty(num_voxels).scatter_(0, order[:-1], target.int())
        # The relation is symmetric: p + offset = q says q - offset = p.
        opposite = neighbours.new_full((num_voxels + 1,), num_voxels)
        opposite[target] = row_of_sorted
        neighbours[26 - offset_index(*offset)] = opposite[:-1]

    for dx, dy in _HALF_COLUMNS:
        # In a column along z the three candidates, if they exist, follow one another in the sorted keys.
        lowest = keys[:-1] + (dx * step_x + dy * step_y - 1)
        position = torch.searchsorted(keys, lowest)
        for dz in (-1, 0, 1):
            found = keys[position] == lowest + (dz + 1)
            connect((dx, dy, dz), position, found)
            position = position + found
    before = (rows - 1).clamp(min=0)
    connect((0, 0, -1), before, keys[before] == keys[:-1] - 1)
    neighbours[offset_index(0, 0, 0)] = rows
    return neighbours


def subdivide_neighbour_map(neighbours: Tensor) -> Tensor:
    """See `ops.coordinates.subdivide_neighbour_map`."""
    num_voxels = neighbours.shape[1]
    index = torch.arange(27)
    offset = torch.stack([index % 3, index // 3 % 3, index // 9], 1) - 1
    child = torch.arange(8)
    corner = torch.stack([child >> 2, child >> 1 & 1, child & 1], 1)
    position = offset[:, None] + corner  # [27, 8, 3] in -1..2, measured from the parent's first child
    parent = position.div(2, rounding_mode="floor")
    parent_offset = ((parent + 1) * torch.tensor([1, 3, 9])).sum(-1).to(neighbours.device)
    parent_child = ((position - 2 * parent) * torch.tensor([4, 2, 1])).sum(-1).to(neighbours)
    subdivided = neighbours.new_empty(27, num_voxels, 8)
    for k in range(27):  # offset by offset, which keeps the temporaries small
        target = neighbours[parent_offset[k]]
        rows = torch.where(target < num_voxels, 8 * target + parent_child[k, :, None], 8 * num_voxels)
        subdivided[k] = rows.T
    return subdivided.view(27, 8 * num_voxels)


def partition_coords(coords: Tensor, block_size: int, shift: int = 0, batch_size: int | None = None) -> Partition:
    """Group voxels by sample and by the cube (x, y, z + shift) // block_size.

    Args:
        coords: `[N, 4]` coordinates in any order.
        block_size: edge of a block in voxels.
        shift: added to x, y and z before the division.
        batch_size: number of samples; the largest batch index plus one if None.

    Returns:
        The partition: blocks in ascending (batch, x, y, z) order, the rows of a block in ascending (x, y, z) order.
    """
    num_blocks = (MAX_RESOLUTION + shift) // block_size + 1
    batch = coords[:, 0].long()
    shifted = coords[:, 1:].long() + shift
    block = shifted.div(block_size, rounding_mode="floor")
    inside = shifted - block * block_size
    radix = torch.tensor([num_blocks**2, num_blocks, 1], device=coords.device)
    block_key = batch * num_blocks**3 + (block * radix).sum(1)
    radix = torch.tensor([block_size**2, block_size, 1], device=coords.device)
    order = torch.argsort(block_key * block_size**3 + (inside * radix).sum(1))
    keys, block_of_packed, lengths = torch.unique_consecutive(
        block_key[order], return_inverse=True, return_counts=True
    )
    block_coords = [keys // num_blocks**3, keys // num_blocks**2 % num_blocks, keys // num_blocks % num_blocks]
    block_coords = torch.stack(block_coords + [keys % num_blocks], 1).int()
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
