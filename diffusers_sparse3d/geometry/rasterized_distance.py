"""
Distance to a mesh in a narrow band on a GPU: every element is compared with the grid samples in its bounding box,
widened by the band, and each sample keeps the nearest. The same results as the tree of `distance.py`, which is the
CPU path and the oracle.
"""

import itertools

import numpy as np
import torch
from torch import Tensor


# Pieces of elements at most this long, in grid spacings, keep the widened boxes of slanted triangles small.
PIECE_LENGTH = 6.0
# Candidate pairs of a piece and a sample in one pass: about half a GB of work space in float64.
PAIR_CHUNK = 1 << 21


def band_distance(
    vertices: np.ndarray, elements: np.ndarray, resolution: int, reach: float, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    All grid samples nearer than `reach` to a mesh.

    Args:
        vertices: `[V, 3]` in the model cube.
        elements: `[E, 3]` triangles, or `[E, 2]` segments.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        reach: distance in model space.
        device: where to compute, in float64.

    Returns:
        As `SurfaceDistance.samples_within`: coords `[n, 3]` int32 in ascending order, distance `[n]` float64,
        element `[n]` int32, and the grid cell that holds the closest point, `[n, 3]` int32.
    """
    spacing = 2 / (resolution - 1)
    corners = torch.from_numpy((vertices[elements] + 1) / spacing).to(device, torch.float64)
    if corners.shape[1] == 2:
        corners = corners[:, [0, 1, 1]]
    pieces, owner = _split(corners)
    reach = reach / spacing
    low = (pieces.amin(dim=1) - reach).ceil().clamp(min=0).long()
    extent = ((pieces.amax(dim=1) + reach).floor().clamp(max=resolution - 1).long() - low + 1).clamp(min=0)
    pairs = extent.prod(dim=1)

    best_key = torch.empty(0, dtype=torch.long, device=device)
    best_value = best_key
    bounds = (pairs.cumsum(0) // PAIR_CHUNK).cpu()
    starts = [0, *((bounds[1:] != bounds[:-1]).nonzero()[:, 0] + 1).tolist(), len(pairs)]
    for start, stop in itertools.pairwise(starts):
        piece = torch.arange(start, stop, device=device).repeat_interleave(pairs[start:stop])
        first = pairs[start:stop].cumsum(0) - pairs[start:stop]
        local = torch.arange(len(piece), device=device) - first[piece - start]
        _, height, depth = extent[piece].unbind(1)
        sample = torch.stack([local // (height * depth), local // depth % height, local % depth], dim=1) + low[piece]
        squared = (closest_on_triangles(sample.double(), pieces[piece]) - sample).square().sum(dim=1)
        near = squared < reach * reach
        sample, piece, squared = sample[near], piece[near], squared[near]
        key = (sample[:, 0] * resolution + sample[:, 1]) * resolution + sample[:, 2]
        # Non-negative floats are ordered as their bits: one integer minimum finds the nearest piece.
        value = (squared.float().view(torch.int32).long() << 32) | piece
        best_key, best_value = _minimum_by_key(torch.cat([best_key, key]), torch.cat([best_value, value]))

    coords = torch.stack(
        [best_key // (resolution * resolution), best_key // resolution % resolution, best_key % resolution], dim=1
    )
    piece = best_value & 0xFFFFFFFF
    closest = closest_on_triangles(coords.double(), pieces[piece])
    distance = (closest - coords).norm(dim=1) * spacing
    cell = closest.floor().clamp(0, resolution - 2)
    return (
        coords.int().cpu().numpy(),
        distance.cpu().numpy(),
        owner[piece].int().cpu().numpy(),
        cell.int().cpu().numpy(),
    )


def _split(corners: Tensor) -> tuple[Tensor, Tensor]:
    """Triangles `[E, 3, 3]` cut into k^2 similar ones no longer than `PIECE_LENGTH`, and the triangle of each."""
    edges = corners - corners.roll(1, dims=1)
    parts = (edges.norm(dim=2).amax(dim=1) / PIECE_LENGTH).ceil().clamp(min=1).long()
    owner = torch.arange(len(corners), device=corners.device).repeat_interleave(parts * parts)
    first = (parts * parts).cumsum(0) - parts * parts
    index, count = torch.arange(len(owner), device=corners.device) - first[owner], parts[owner]
    # Row r from the tip holds 2 r + 1 triangles; the odd ones point the other way.
    row = index.double().add(0.5).sqrt().long()
    place = index - row * row
    column, flipped = place // 2, (place % 2).bool()
    upper, lower = row, row + 1
    a = torch.stack([upper, column])
    b = torch.where(flipped, torch.stack([upper, column + 1]), torch.stack([lower, column]))
    c = torch.stack([lower, column + 1])
    tip, left, right = corners[owner].unbind(1)
    points = [
        tip + ((down - across) * (left - tip).T + across * (right - tip).T).T / count[:, None]
        for down, across in (a, b, c)
    ]
    return torch.stack(points, dim=1), owner


def closest_on_triangles(points: Tensor, triangles: Tensor) -> Tensor:
    """The point of each triangle `[n, 3, 3]` that is closest to its point `[n, 3]`; flat triangles are segments."""
    a, b, c = triangles.unbind(1)
    best, best_squared = _closest_on_segments(points, a, b)
    for start, end in ((b, c), (c, a)):
        candidate, squared = _closest_on_segments(points, start, end)
        nearer = squared < best_squared
        best = torch.where(nearer[:, None], candidate, best)
        best_squared = torch.where(nearer, squared, best_squared)
    normal = torch.linalg.cross(b - a, c - a)
    area = normal.square().sum(dim=1)
    # Above the triangle if on the inner side of all three edges.
    inside = area > 1e-18
    for start, end in ((a, b), (b, c), (c, a)):
        inside &= (torch.linalg.cross(end - start, points - start) * normal).sum(dim=1) >= 0
    height = ((points - a) * normal).sum(dim=1) / area.clamp(min=1e-18)
    return torch.where(inside[:, None], points - height[:, None] * normal, best)


def _closest_on_segments(points: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Closest points `[n, 3]` on segments and their squared distances `[n]`."""
    along = end - start
    length = along.square().sum(dim=1).clamp(min=1e-30)
    position = (((points - start) * along).sum(dim=1) / length).clamp(0, 1)
    closest = start + position[:, None] * along
    return closest, (closest - points).square().sum(dim=1)


def _minimum_by_key(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys in ascending order, each with its smallest value."""
    distinct, index = torch.unique(key, return_inverse=True)
    smallest = torch.full_like(distinct, torch.iinfo(torch.long).max)
    return distinct, smallest.scatter_reduce(0, index, value, reduce="amin")
