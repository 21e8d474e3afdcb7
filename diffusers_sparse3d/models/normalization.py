"""Normalisation layers that compute in float32 whatever the dtype of the model."""

from __future__ import annotations

import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ..ops.head_norm import head_rms_norm
from ..ops.modulation import SampleRows, affine_layer_norm, modulated_layer_norm


class ChannelLayerNorm(FP32LayerNorm):
    """LayerNorm over the channels of a channel-first tensor `[B, C, ...]`, in float32."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.movedim(1, -1)).movedim(-1, 1).contiguous()


class ModulatedLayerNorm(nn.Module):
    """Layer norm without affine, in float32, modulated by the timestep: adaLN (DiT, arXiv 2212.09748)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, hidden_states: Tensor, shift: Tensor, scale: Tensor, samples: SampleRows) -> Tensor:
        """Tokens `[..., dim]`, normalised, times 1 + `scale`, plus `shift`, both `[B, dim]` of the tokens' samples."""
        return modulated_layer_norm(hidden_states, shift, scale, samples, self.eps)


class TokenLayerNorm(nn.LayerNorm):
    """Affine layer norm of tokens `[..., dim]`, in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return affine_layer_norm(hidden_states, self.weight, self.bias, self.eps)


class MultiHeadRMSNorm(nn.Module):
    """L2 normalisation of every head of a query or key, times `gamma [heads, dim_head]`, times sqrt(dim_head).

    The published q/k RMS norm, in float32. Input `[..., heads, dim_head]`, output of the same shape and dtype.
    """

    def __init__(self, heads: int, dim_head: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, dim_head))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return head_rms_norm(hidden_states, self.gamma)
