"""Layers with parameters on sparse voxels: thin modules around the operators, shared by the sparse models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.group_norm import plan_sparse_group_norm, sparse_group_norm
from ..ops.sparse_conv import plan_sparse_conv3d, sparse_conv3d, sparse_subdivide_conv3d
from ..sparse_tensor import CoordinateCache


class SparseConv3d(nn.Module):
    """Submanifold convolution of kernel size 3 (`weight [27, in, out]`) or 1 (`weight [in, out]`)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__()
        shape = (in_channels, out_channels) if kernel_size == 1 else (kernel_size**3, in_channels, out_channels)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        # Initialised as torch's convolutions are: uniform within 1 / sqrt(fan in).
        bound = 1 / math.sqrt(in_channels * kernel_size**3)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def plan(self, feats: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for the dtype and device of `feats`."""
        plan_sparse_conv3d(feats, self.weight, cache)

    def forward(self, feats: Tensor, cache: CoordinateCache, subdivide: bool = False) -> Tensor:
        """`[N, in]` on the voxels of `cache` -> `[N, out]`; with `subdivide` `[8 N, out]`, on `cache.subdivide()`.

        `subdivide` splits every voxel into its eight children, which take over its features, before a convolution of
        kernel size 3.
        """
        if subdivide:
            return sparse_subdivide_conv3d(feats, self.weight, self.bias, cache)
        return sparse_conv3d(feats, self.weight, self.bias, cache)


class SparseGroupNorm(nn.Module):
    """Group norm per sample over (voxels, channels of the group), in float32, eps 1e-5."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5):
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(f"`num_groups` must divide `num_channels` {num_channels}, got {num_groups}")
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def plan(self, feats: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for the dtype and device of `feats`."""
        plan_sparse_group_norm(feats, cache)

    def forward(self, feats: Tensor, cache: CoordinateCache, silu: bool = False) -> Tensor:
        """`[N, C]` on the voxels of `cache` -> `[N, C]`; with `silu`, followed by SiLU."""
        return sparse_group_norm(feats, cache, self.num_groups, self.weight, self.bias, self.eps, silu)
