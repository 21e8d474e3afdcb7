"""Points on a surface with normals, from the blocks of its signed distance: what the rival autoencoders take in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_sparse3d.geometry.sdf import narrow_band_width
from diffusers_sparse3d.training.dataset import BLOCK_SIZE


# Samples nearer to the surface than this share of the band are moved onto it. At half of a band two samples wide, all
# their neighbours are in the band, too, so that the gradient is that of a distance.
NEAR = 0.5


class SurfacePoints(NamedTuple):
    """
    Points on the surfaces of a batch, in any order.

    Attributes:
        places: `[P, 3]` float32, in samples of the grid.
        normals: `[P, 3]` float32, unit vectors outward.
        rows: `[P]` int64, the block that each point comes from.
        samples: `[P]` int64, the sample of the batch.
    """

    places: Tensor
    normals: Tensor
    rows: Tensor
    samples: Tensor

    def take(self, index: Tensor) -> SurfacePoints:
        """The points of an index of any shape."""
        return SurfacePoints(*(field[index] for field in self))


def surface_points(values: Tensor, coords: Tensor, resolution: int) -> SurfacePoints:
    """
    The samples near a surface, moved onto it along the gradient of the distance.

    Args:
        values: `[M, 512]`, s / tau of the samples of blocks; sample (x, y, z) at 64 x + 8 y + z.
        coords: `[M, 4]` int32 (sample of the batch, x, y, z), the blocks.
        resolution: samples per axis.
    """
    grids = values.float().view(-1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
    gradient = torch.stack(torch.gradient(grids, dim=(1, 2, 3)), dim=-1)
    index = (grids.abs() < NEAR).nonzero()
    distance, normals = grids[tuple(index.T)], F.normalize(gradient[tuple(index.T)], dim=1, eps=1e-6)
    # tau in samples of the grid.
    tau = narrow_band_width(resolution) * (resolution - 1) / 2
    rows = index[:, 0]
    places = BLOCK_SIZE * coords[rows, 1:] + index[:, 1:] - tau * distance[:, None] * normals
    return SurfacePoints(places, normals, rows, coords[rows, 0].long())


def draw(samples: Tensor, batch_size: int, count: int) -> Tensor:
    """
    `count` rows of each sample at random, without repetition where there are enough: `[batch_size, count]` int64.

    Args:
        samples: `[P]` int64, the sample of each row; every sample has at least one.
        batch_size: number of samples.
        count: rows to draw of each sample.
    """
    order = (samples + torch.rand(len(samples), device=samples.device, dtype=torch.float64)).argsort()
    numbers = torch.bincount(samples, minlength=batch_size)
    places = torch.arange(count, device=samples.device) % numbers[:, None]
    return order[numbers.cumsum(0)[:, None] - numbers[:, None] + places]
