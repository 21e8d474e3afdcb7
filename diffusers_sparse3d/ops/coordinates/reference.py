"""Neighbour maps in plain PyTorch: the oracle of the kernels and the path of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .voxels import AXIS_STEPS, encode_coords


# (dx, dy) columns that come before (0, 0) lexicographically; the columns after it follow by symmetry.
_HALF_COLUMNS = ((-1, -1), (-1, 0), (-1, 1), (0, -1))


def offset_index(dx: int, dy: int, dz: int) -> int:
    """The index k of the 3x3x3 kernel offset (dx, dy, dz): x runs fastest."""
    return (dx + 1) + 3 * (dy + 1) + 9 * (dz + 1)


def neighbour_map(coords: Tensor) -> Tensor:
    """See `ops.coordinates.neighbour_map`."""
    num_voxels = coords.shape[0]
    neighbours = torch.full((27, num_voxels), num_voxels, dtype=torch.int32, device=coords.device)
    if num_voxels == 0:
        return neighbours
    keys, order = encode_coords(coords).sort()
    # From here on, rows are numbered in sorted order; one more row at the end stands for missing voxels.
    keys = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])
    order = torch.cat([order, order.new_full((1,), num_voxels)])
    row_of_sorted = order[:-1].int()
    rows = torch.arange(num_voxels, device=coords.device)
    step_x, step_y, _ = AXIS_STEPS

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
