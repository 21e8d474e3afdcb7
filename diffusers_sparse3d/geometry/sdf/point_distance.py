"""The distance of grid samples to the nearest of many points, by a tree on a CPU, by rasterised points on a GPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rasterized_distance import BLOCK_SIZE, CPU_PAIR_CHUNK, GPU_PAIR_CHUNK
from .block_grid import BlockGrid


def point_distance(points: Tensor, coords: Tensor, resolution: int, reach: float) -> Tensor:
    """
    The distance of grid samples to the nearest of many points.

    Args:
        points: `[k, 3]` float64, in the model cube.
        coords: `[n, 3]` int32, distinct samples; sample i lies at `-1 + 2 i / (resolution - 1)`.
        resolution: samples per axis.
        reach: distance in model space.

    Returns:
        `[n]` float64, in model space; infinite where it is not below `reach`.
    """
    if coords.device.type != "cpu":
        return rasterized_point_distance(points, coords, resolution, reach)
    from scipy.spatial import cKDTree

    # On meshes with many inner faces a balanced tree, or an unbounded query, would take minutes.
    tree = cKDTree(points.numpy(), balanced_tree=False)
    queries = coords.numpy() * (2 / (resolution - 1)) - 1
    distance = tree.query(queries, distance_upper_bound=reach, workers=torch.get_num_threads())[0]
    return torch.from_numpy(distance)


def rasterized_point_distance(points: Tensor, coords: Tensor, resolution: int, reach: float) -> Tensor:
    """
    The result of `point_distance` without a tree, for a GPU: every point is compared with the samples around it, and
    each sample keeps the nearest one. The resolution is a multiple of 8.
    """
    spacing = 2 / (resolution - 1)
    radius = reach / spacing
    points = (points + 1) / spacing
    samples = BlockGrid(coords, resolution, BLOCK_SIZE)
    row = samples.full(-1, torch.long)
    row[samples.slots(coords)] = torch.arange(len(coords), device=coords.device)
    row[samples.size] = -1

    # Only points with samples in their block or the blocks around it count.
    width = 1 + 2 * -(-math.ceil(radius) // BLOCK_SIZE)
    occupied = (samples.table >= 0).float()[None, None]
    near_samples = F.max_pool3d(occupied, width, stride=1, padding=width // 2)[0, 0] > 0
    cell = points.floor().long()
    block = (cell // BLOCK_SIZE).clamp(0, len(samples.table) - 1)
    near = near_samples[block.unbind(1)].nonzero()[:, 0]
    points, cell = points[near], cell[near].int()

    # The samples that are within reach of some point of a cell, as steps from its lowest corner.
    axis = torch.arange(-math.ceil(radius), math.ceil(radius) + 2, device=coords.device, dtype=torch.int32)
    steps = torch.cartesian_prod(axis, axis, axis)
    steps = steps[torch.maximum(-steps, steps - 1).clamp(min=0).square().sum(dim=1) < radius * radius]
    best = torch.full((len(coords),), torch.inf, dtype=torch.float64, device=coords.device)
    chunk = max(1, (CPU_PAIR_CHUNK if coords.device.type == "cpu" else GPU_PAIR_CHUNK) // len(steps))
    for start in range(0, len(points), chunk):
        around = (cell[start : start + chunk, None] + steps).flatten(0, 1)
        target = row[samples.slots(around)]
        found = (target >= 0).nonzero()[:, 0]
        offset = around[found] - points[start + found // len(steps)]
        best.scatter_reduce_(0, target[found], offset.square().sum(dim=1), reduce="amin")
    distance = best.sqrt() * spacing
    return torch.where(distance < reach, distance, torch.inf)
