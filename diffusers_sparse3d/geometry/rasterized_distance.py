"""
Distance from grid samples to a mesh in a narrow band, on a GPU.

Every triangle or segment is compared with the grid samples in its bounding box, widened by the width of the band, and
each sample keeps the nearest one. The results are those of the tree in `distance.py`, which is the CPU path and the
oracle. `kernels/band_distance.py` does it in four launches where triton is installed, and plain PyTorch elsewhere.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.runtime.dispatch import runs_kernels


# Longest side of the pieces that triangles are cut into, in grid spacings. Short pieces keep the bounding boxes of
# slanted triangles small.
PIECE_LENGTH = 6.0
# Pairs of a piece and a sample in one pass; they take about 0.5 GB of work space on a CPU and 2 GB on a GPU.
CPU_PAIR_CHUNK, GPU_PAIR_CHUNK = 1 << 21, 1 << 23
# Samples per axis of the blocks that hold the results.
BLOCK_SIZE = 8


class BandSamples(NamedTuple):
    """
    The grid samples nearer to a mesh than some reach.

    Attributes:
        coords: `[n, 3]` int32, the samples.
        distance: `[n]` float64, distance to the mesh in model space.
        element: `[n]` int32, a triangle or segment at that distance.
        cell: `[n, 3]` int32, the grid cell that holds the closest point.
    """

    coords: Tensor
    distance: Tensor
    element: Tensor
    cell: Tensor


def band_distance(
    vertices: np.ndarray, elements: np.ndarray, resolution: int, reach: float, device: torch.device | str
) -> BandSamples:
    """
    The grid samples nearer than `reach` to a mesh, sorted by blocks of 8^3 or 4^3 samples.

    Args:
        vertices: `[V, 3]` in the model cube.
        elements: `[E, 3]` triangles, or `[E, 2]` segments.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        reach: distance in model space.
        device: the device of the computation, which is in float64, and of the results.
    """
    spacing = 2 / (resolution - 1)
    if elements.shape[1] == 2:
        elements = elements[:, [0, 1, 1]]
    corners = torch.from_numpy((vertices[elements] + 1) / spacing).to(device, torch.float64)
    reach = reach / spacing
    if runs_kernels(torch.empty(0, device=device)):
        from .kernels import band_distance as kernels

        coords, distance, element, cell = kernels.band_distance(corners, resolution, reach)
        return BandSamples(coords, distance * spacing, element, cell)
    # A slanted piece of length l has an area of about l^2 / 2 and a box of (l + 2 reach)^3 samples. Their quotient,
    # the work per area, is least at l = 4 reach.
    pieces, owner = split_triangles(corners, max(PIECE_LENGTH, 4 * reach))
    low = (pieces.amin(dim=1) - reach).ceil().clamp(min=0).long()
    extent = ((pieces.amax(dim=1) + reach).floor().clamp(max=resolution - 1).long() - low + 1).clamp(min=0)

    # The blocks that intersect a box are numbered in `table`.
    per_axis = -(-resolution // BLOCK_SIZE)
    table = torch.full((per_axis,) * 3, -1, dtype=torch.long, device=device)
    first = low // BLOCK_SIZE
    block_extent = torch.where(extent > 0, (low + extent - 1) // BLOCK_SIZE - first + 1, 0)
    for start, stop in chunks_of_pairs(block_extent.prod(dim=1)):
        table[lattice_points(first[start:stop], block_extent[start:stop])[1].unbind(1)] = 0
    blocks = (table == 0).nonzero()
    table[blocks.unbind(1)] = torch.arange(len(blocks), device=device)

    unknown = torch.iinfo(torch.long).max
    best = torch.full((len(blocks) * BLOCK_SIZE**3,), unknown, device=device)
    for start, stop in chunks_of_pairs(extent.prod(dim=1)):
        piece, sample = lattice_points(low[start:stop], extent[start:stop])
        piece = piece + start
        squared = (closest_on_triangles(sample.double(), pieces[piece]) - sample).square().sum(dim=1)
        near = (squared < reach * reach).nonzero()[:, 0]
        sample, piece, squared = sample[near], piece[near], squared[near]
        x, y, z = (sample % BLOCK_SIZE).unbind(1)
        place = ((table[(sample // BLOCK_SIZE).unbind(1)] * BLOCK_SIZE + x) * BLOCK_SIZE + y) * BLOCK_SIZE + z
        # The bits of non-negative floats are ordered as the floats are, so that one integer minimum over pairs of a
        # distance and a piece finds the nearest piece.
        value = (squared.float().view(torch.int32).long() << 32) | piece
        best.scatter_reduce_(0, place, value, reduce="amin")

    place = (best != unknown).nonzero()[:, 0]
    local = place % BLOCK_SIZE**3
    local = torch.stack([local // BLOCK_SIZE**2, local // BLOCK_SIZE % BLOCK_SIZE, local % BLOCK_SIZE], dim=1)
    coords = blocks[place // BLOCK_SIZE**3] * BLOCK_SIZE + local
    piece = best[place] & 0xFFFFFFFF
    closest = closest_on_triangles(coords.double(), pieces[piece])
    distance = (closest - coords).norm(dim=1) * spacing
    return BandSamples(coords.int(), distance, owner[piece].int(), closest.floor().clamp(0, resolution - 2).int())


def split_triangles(corners: Tensor, max_length: float = PIECE_LENGTH) -> tuple[Tensor, Tensor]:
    """
    Cuts triangles in half across their longest side until no side is longer than `max_length`.

    The number of pieces of a thin triangle grows with its length, not with the square of it.

    Sides that triangles share are cut alike in all of them, so that no cracks appear.

    Args:
        corners: `[E, 3, 3 + A]`, the positions of the corners of the triangles, and A values that are linear on them.
        max_length: in the units of `corners`.

    Returns:
        The corners of the pieces, `[P, 3, 3 + A]`, and the triangle of each piece, `[P]` int64.
    """
    columns = corners.shape[2]
    owner = torch.arange(len(corners), device=corners.device)
    pieces, owners = [], []
    while len(corners):
        length, longest = (corners.roll(-1, dims=1) - corners)[..., :3].norm(dim=2).max(dim=1)
        short = length <= max_length
        pieces.append(corners[short])
        owners.append(owner[short])
        corners, owner, longest = corners[~short], owner[~short], longest[~short]
        rows = torch.arange(len(corners), device=corners.device)
        start, end = corners[rows, longest], corners[rows, (longest + 1) % 3]
        opposite, middle = corners[rows, (longest + 2) % 3], (start + end) / 2
        corners = torch.stack([start, middle, opposite, middle, end, opposite], dim=1).reshape(-1, 3, columns)
        owner = owner.repeat_interleave(2)
    return torch.cat([corners, *pieces]), torch.cat([owner, *owners])


def lattice_points(low: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """
    The integer points of axis-aligned boxes.

    Args:
        low: `[n, 3]` int64, the lowest point of each box.
        extent: `[n, 3]` int64, the number of points along each axis.

    Returns:
        The box `[m]` and the coordinates `[m, 3]` of each point, int64, sorted by box.
    """
    count = extent.prod(dim=1)
    box = torch.arange(len(low), device=low.device).repeat_interleave(count)
    local = torch.arange(len(box), device=low.device) - (count.cumsum(0) - count)[box]
    _, height, depth = extent[box].unbind(1)
    return box, torch.stack([local // (height * depth), local // depth % height, local % depth], dim=1) + low[box]


def chunks_of_pairs(pairs: Tensor) -> Iterator[tuple[int, int]]:
    """
    Splits rows into ranges that have about as many pairs as one pass may have.

    Args:
        pairs: `[n]` int64, the number of pairs of each row.

    Returns:
        The ranges as pairs (start, stop).
    """
    bounds = (pairs.cumsum(0) // (CPU_PAIR_CHUNK if pairs.device.type == "cpu" else GPU_PAIR_CHUNK)).cpu()
    return itertools.pairwise([0, *((bounds[1:] != bounds[:-1]).nonzero()[:, 0] + 1).tolist(), len(pairs)])


def closest_on_triangles(points: Tensor, triangles: Tensor) -> Tensor:
    """
    For each of `points [n, 3]`, the closest point of its triangle in `triangles [n, 3, 3]`, `[n, 3]`.

    Triangles without area are treated as segments.
    """
    a, b, c = triangles.unbind(1)
    best, best_squared = _closest_on_segments(points, a, b)
    for start, end in ((b, c), (c, a)):
        candidate, squared = _closest_on_segments(points, start, end)
        nearer = squared < best_squared
        best = torch.where(nearer[:, None], candidate, best)
        best_squared = torch.where(nearer, squared, best_squared)
    normal = torch.linalg.cross(b - a, c - a)
    area = normal.square().sum(dim=1)
    # A point projects into the triangle if it is on the inner side of all three edges.
    inside = area > 1e-18
    for start, end in ((a, b), (b, c), (c, a)):
        inside &= (torch.linalg.cross(end - start, points - start) * normal).sum(dim=1) >= 0
    height = ((points - a) * normal).sum(dim=1) / area.clamp(min=1e-18)
    return torch.where(inside[:, None], points - height[:, None] * normal, best)


def _closest_on_segments(points: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The closest points `[n, 3]` on segments, and their squared distances `[n]`."""
    along = end - start
    length = along.square().sum(dim=1).clamp(min=1e-30)
    position = (((points - start) * along).sum(dim=1) / length).clamp(0, 1)
    closest = start + position[:, None] * along
    return closest, (closest - points).square().sum(dim=1)
