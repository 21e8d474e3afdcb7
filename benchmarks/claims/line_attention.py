"""One-dimensional native sparse attention (arXiv 2502.11089) of voxels, by the operators of Spatial Sparse Attention.

Tokens are numbered in the order of their coordinates, x slowest, and blocks are runs of consecutive numbers, as of
words in a text, instead of cubes. For the operators, token n is laid on place `SPACING` n of a Morton curve. An
aligned cube of m^3 places holds a run of it, so that compression, selection and windows of cubes are those of runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusers_sparse3d import SparseDiT, SSAAttnProcessor
from diffusers_sparse3d.sparse_tensor import CoordinateCache


if TYPE_CHECKING:
    from diffusers_sparse3d.models.attention import SparseAttention
    from diffusers_sparse3d.models.attention_layouts import AttentionModule


# Places of the curve for each token. A surface takes up about a quarter of the cells of a block of 4^3, and blocks of
# one dimension have as many tokens with this.
SPACING = 4
MORTON_BITS = 10


def line_coords(coords: Tensor, offset: int = 0, spacing: int = SPACING) -> Tensor:
    """
    Coordinates on the Morton curve of tokens in the order of theirs.

    Args:
        coords: `[N, 4]` int32 (sample, x, y, z), distinct, in any order.
        offset: places of the curve before the first token of each sample.
        spacing: places for each token.

    Returns:
        `[N, 4]` int32, rows as in `coords`.
    """
    sample, x, y, z = coords.long().unbind(1)
    size = coords[:, 1:].max().long() + 1
    order = (((sample * size + x) * size + y) * size + z).argsort()
    counts = torch.bincount(sample)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=order.device)
    place = spacing * (number - (counts.cumsum(0) - counts)[sample]) + offset
    axes = [torch.zeros_like(place) for _ in range(3)]
    for bit in range(MORTON_BITS):
        for axis in range(3):
            axes[axis] |= ((place >> (3 * bit + 2 - axis)) & 1) << bit
    return torch.stack([sample, *axes], dim=1).int()


class LineAttnProcessor(SSAAttnProcessor):
    """
    Sparse attention along one dimension, with the parameters of SSA.

    Args:
        offset: places of the curve before the first token, by which blocks and windows are shifted.
    """

    def __init__(self, offset: int = 0):
        self.offset = offset

    def plan(
        self,
        attn: SparseAttention,
        hidden_states: Tensor,
        cache: CoordinateCache,
        encoder_cache: CoordinateCache | None = None,
    ) -> None:
        """See `SSAAttnProcessor`."""
        super().plan(attn, hidden_states, cache if attn.is_cross_attention else self._line(cache), encoder_cache)

    def self_attention(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: CoordinateCache,
    ) -> Tensor:
        """Attention among tokens in any order: `query [N, H, D]`, `key` and `value [N, H_kv, D]` to `[N, H, D]`."""
        return super().self_attention(attn, hidden_states, query, key, value, self._line(cache))

    def _line(self, cache: CoordinateCache) -> CoordinateCache:
        """The cache of the tokens on the curve."""

        def make() -> CoordinateCache:
            return CoordinateCache(line_coords(cache.coords, self.offset), cache.batch_size)

        return cache.derived(f"on a line from {self.offset}", make)


def use_line_attention(transformer: SparseDiT) -> None:
    """Make the self-attention of a transformer one-dimensional. Where windows were shifted, it is by half of a run."""
    for block in transformer.transformer_blocks:
        attention = block.attn1
        shifted, attention.window_shift = attention.window_shift > 0, 0
        attention.set_processor(LineAttnProcessor(attention.window_size**3 // 2 if shifted else 0))
