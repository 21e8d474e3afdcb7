"""Layers with parameters on sparse voxels: thin modules around the operators, shared by the sparse models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_integer
from ..ops.group_norm import plan_sparse_group_norm, sparse_group_norm
from ..ops.sparse_conv import plan_sparse_conv3d, sparse_conv3d, sparse_subdivide_conv3d
from ..sparse_tensor import CoordinateCache
from .kernel_layouts import LAYOUTS, convert_kernel


class SparseConv3d(nn.Module):
    """Submanifold convolution of kernel size 3 (`weight [27, in, out]`) or 1 (`weight [in, out]`).

    The output is on the voxels of the input; voxels that do not exist count as zeros. It takes the place of
    `spconv.SubMConv3d` and, with stride 1, of `torchsparse.nn.Conv3d`: `load_state_dict` takes their weights, and
    those of `torch.nn.Conv3d`, as they are.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: 1 or 3.
        bias: whether a bias is added.
        checkpoint_layout: "spconv", "spconv1", "torchsparse" or "dense", where `load_state_dict` cannot tell the
            layout of a weight from its shape; see [`~models.kernel_layouts.convert_kernel`].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        checkpoint_layout: str | None = None,
    ):
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"`kernel_size` must be 1 or 3, got {kernel_size!r}")
        if checkpoint_layout is not None and checkpoint_layout not in LAYOUTS:
            raise ValueError(f"`checkpoint_layout` must be one of {LAYOUTS}, got {checkpoint_layout!r}")
        in_channels = check_integer("in_channels", in_channels, 1)
        out_channels = check_integer("out_channels", out_channels, 1)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.checkpoint_layout = checkpoint_layout
        shape = (in_channels, out_channels) if kernel_size == 1 else (kernel_size**3, in_channels, out_channels)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias: Any = nn.Parameter(torch.empty(out_channels)) if bias else None
        # Initialised as torch's convolutions are: uniform within 1 / sqrt(fan in).
        bound = 1 / math.sqrt(in_channels * kernel_size**3)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def plan(self, feats: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for the dtype and device of `feats`."""
        plan_sparse_conv3d(feats, self.weight, cache)

    def forward(self, feats: Any, cache: CoordinateCache | Tensor | None = None, subdivide: bool = False) -> Any:
        """
        Args:
            feats: `[N, in]`; or a sparse tensor with `feats`, `coords [N, 4]` int32 (batch, x, y, z) and
                `replace(feats)`, as [`SparseTensor`] is.
            cache: of the voxels, or their `coords [N, 4]`; not with a sparse tensor.
            subdivide: split every voxel into its eight children, which take over its features, before a convolution of
                kernel size 3.

        Returns:
            `[N, out]`; with `subdivide` `[8 N, out]`, on `cache.subdivide()`. For a sparse tensor, one with these
            features on the same voxels.

        Raises:
            TypeError: if `feats` is neither.
            ValueError: if the coordinates are missing, no valid voxels, or of other rows.
        """
        if not isinstance(feats, Tensor) and not hasattr(feats, "coords"):
            raise TypeError(f"`feats` must be a tensor or a sparse tensor, got {type(feats).__name__}")
        if not isinstance(feats, Tensor):
            if subdivide:
                raise ValueError("`subdivide` must be False for a sparse tensor: its voxels stay the same")
            own = getattr(feats, "cache", None)
            cache = own if isinstance(own, CoordinateCache) else CoordinateCache.of(feats.coords)
            return feats.replace(sparse_conv3d(feats.feats, self.weight, self.bias, cache))
        if isinstance(cache, Tensor):
            cache = CoordinateCache.of(cache)
        if subdivide:
            assert cache is not None
            return sparse_subdivide_conv3d(feats, self.weight, self.bias, cache)
        return sparse_conv3d(feats, self.weight, self.bias, cache)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Convert the weight of another library before it is loaded."""
        name = prefix + "weight"
        if prefix + "kernel" in state_dict and name not in state_dict:  # torchsparse
            state_dict[name] = state_dict.pop(prefix + "kernel")
        if name in state_dict and state_dict[name].shape != self.weight.shape:
            sizes = (self.in_channels, self.out_channels, self.kernel_size)
            try:
                state_dict[name] = convert_kernel(state_dict[name], *sizes, self.checkpoint_layout)
            except ValueError as error:
                args[-1].append(f"{name}: {error}")  # the messages of `load_state_dict`
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


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
