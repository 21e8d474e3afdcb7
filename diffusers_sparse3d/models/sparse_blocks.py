"""The blocks of the sparse VAE: windowed attention, and convolutions between resolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ..ops.pooling import plan_sparse_mean_pool, sparse_mean_pool
from ..sparse_tensor import CoordinateCache
from .attention import SparseAttention
from .feed_forward import GELUFeedForward
from .sparse_layers import SparseConv3d, SparseGroupNorm


class SparseWindowBlock(nn.Module):
    """Transformer block with attention inside windows, which may be shifted: `[N, dim]` in and out."""

    def __init__(self, dim: int, num_attention_heads: int, window_size: int, window_shift: int):
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = SparseAttention(
            dim,
            num_attention_heads,
            dim // num_attention_heads,
            bias=True,
            window_size=window_size,
            window_shift=window_shift,
        )
        self.norm2 = FP32LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = GELUFeedForward(dim)

    def plan(self, hidden_states: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for this dtype and device."""
        self.attn1.plan(hidden_states, cache)

    def forward(self, hidden_states: Tensor, cache: CoordinateCache) -> Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), coords=cache.coords, cache=cache)
        return hidden_states + self.ff(self.norm2(hidden_states))


class ShiftedSparseWindowBlock(SparseWindowBlock):
    """`SparseWindowBlock` whose windows are shifted: `torch.compile` keeps graphs by the code of `forward`."""

    def forward(self, hidden_states: Tensor, cache: CoordinateCache) -> Tensor:
        return super().forward(hidden_states, cache)


def make_window_block(dim: int, num_attention_heads: int, window_size: int, window_shift: int) -> SparseWindowBlock:
    """A block with or without shift of its windows, of the class that belongs to it."""
    block_class = ShiftedSparseWindowBlock if window_shift else SparseWindowBlock
    return block_class(dim, num_attention_heads, window_size, window_shift)


class SparseDownBlock(nn.Module):
    """Residual block that pools to half the resolution: `[N, in_channels]` to `[M, out_channels]`.

    The published "mean" divides by the number of children plus one; `exact_mean` divides by their number.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int, exact_mean: bool):
        super().__init__()
        self.exact_mean = exact_mean
        self.norm1 = SparseGroupNorm(norm_num_groups, in_channels)
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.norm2 = SparseGroupNorm(norm_num_groups, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        # The block starts as the shortcut alone.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        self.conv_shortcut = (
            SparseConv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        )

    def plan(self, hidden_states: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for this dtype and device."""
        plan_sparse_mean_pool(hidden_states, cache, 2)
        self.norm1.plan(hidden_states, cache)
        pooled, _ = cache.downsample(2)
        for layer in (self.conv1, self.norm2, self.conv2):
            layer.plan(hidden_states, pooled)

    def forward(self, hidden_states: Tensor, cache: CoordinateCache) -> Tensor:
        pooled, _ = cache.downsample(2)
        residual = sparse_mean_pool(hidden_states, cache, 2, self.exact_mean)
        hidden_states = self.norm1(hidden_states, cache, silu=True)
        hidden_states = sparse_mean_pool(hidden_states, cache, 2, self.exact_mean)
        hidden_states = self.conv1(hidden_states, pooled)
        hidden_states = self.conv2(self.norm2(hidden_states, pooled, silu=True), pooled)
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual, pooled)
        return hidden_states + residual


class SparseUpBlock(nn.Module):
    """Two convolutions with SiLU and between them a split of each voxel into its eight children.

    `[N, in_channels]` to `[8 N, out_channels]`; child 4 x + 2 y + z of voxel i is row 8 i + 4 x + 2 y + z.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        # Six convolutions follow one another without a norm. With He initialisation the signal keeps its scale.
        for conv, channels in ((self.conv1, in_channels), (self.conv2, out_channels)):
            bound = (6 / (27 * channels)) ** 0.5
            nn.init.uniform_(conv.weight, -bound, bound)
            nn.init.zeros_(conv.bias)

    def plan(self, hidden_states: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for this dtype and device."""
        self.conv1.plan(hidden_states, cache)
        self.conv2.plan(hidden_states, cache)

    def forward(self, hidden_states: Tensor, cache: CoordinateCache) -> Tensor:
        # The tensors of the last block are by far the largest of the model: none is copied unless a gradient needs it.
        inplace = not torch.is_grad_enabled()
        hidden_states = F.silu(self.conv1(hidden_states, cache), inplace=inplace)
        return F.silu(self.conv2(hidden_states, cache, subdivide=True), inplace=inplace)
