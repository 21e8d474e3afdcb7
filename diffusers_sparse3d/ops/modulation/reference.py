"""Timestep modulation of transformer tokens in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .samples import SampleRows


def rows_of(values: Tensor, samples: SampleRows, num_rows: int) -> Tensor:
    """`[B, C]` values of samples to one row per token: `[N, C]`, or `[1, C]` where one row serves all."""
    if samples.batch_size == 1:
        return values
    if samples.index is None:
        return values.repeat_interleave(num_rows // samples.batch_size, 0)
    # The backward of an embedding sums the many tokens of a sample without atomic additions.
    return F.embedding(samples.index.long(), values)


def modulated_layer_norm_reference(
    hidden_states: Tensor, shift: Tensor, scale: Tensor, samples: SampleRows, eps: float, offset: float = 1.0
) -> Tensor:
    """The result of `ops.modulation.modulated_layer_norm`; differentiable."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    normalized = F.layer_norm(hidden_states.to(dtype), hidden_states.shape[-1:], eps=eps).to(hidden_states.dtype)
    num_rows = hidden_states.shape[0]
    return normalized * (offset + rows_of(scale, samples, num_rows)) + rows_of(shift, samples, num_rows)


def gated_sum_reference(residual: Tensor, values: Tensor, gate: Tensor, samples: SampleRows) -> Tensor:
    """The result of `ops.modulation.gated_sum`; differentiable."""
    return residual + rows_of(gate, samples, residual.shape[0]) * values
