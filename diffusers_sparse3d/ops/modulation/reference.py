"""Timestep modulation of transformer tokens in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .samples import SampleRows


def per_sample(tokens: Tensor, samples: SampleRows) -> Tensor:
    """`[N, C]` tokens as a view that broadcasts with what `spread` returns: `[B, N / B, C]` if B are equal parts."""
    return tokens if samples.index is not None else tokens.view(samples.batch_size, -1, tokens.shape[-1])


def spread(values: Tensor, samples: SampleRows) -> Tensor:
    """`[B, C]` values of samples for the tokens of `per_sample`: `[B, 1, C]`, or `[N, C]`, one row per token."""
    if samples.index is None:
        return values[:, None]
    # The backward of an embedding sums the many tokens of a sample without atomic additions.
    return F.embedding(samples.index.long(), values)


def modulated_layer_norm_reference(
    hidden_states: Tensor, shift: Tensor, scale: Tensor, samples: SampleRows, eps: float, offset: float = 1.0
) -> Tensor:
    """The result of `ops.modulation.modulated_layer_norm`; differentiable."""
    dtype, channels = torch.promote_types(hidden_states.dtype, torch.float32), hidden_states.shape[-1:]
    has_full_precision = dtype == hidden_states.dtype == scale.dtype == shift.dtype
    if has_full_precision and samples.batch_size == 1 and samples.index is None:
        # One pass over the tokens in place of three.
        return F.layer_norm(hidden_states, channels, offset + scale[0], shift[0], eps)
    normalized = F.layer_norm(hidden_states.to(dtype), channels, eps=eps).to(hidden_states.dtype)
    normalized, factor, term = per_sample(normalized, samples), offset + spread(scale, samples), spread(shift, samples)
    if has_full_precision:
        return torch.addcmul(term, normalized, factor).reshape(hidden_states.shape)
    return (normalized * factor + term).reshape(hidden_states.shape)


def gated_sum_reference(residual: Tensor, values: Tensor, gate: Tensor, samples: SampleRows) -> Tensor:
    """The result of `ops.modulation.gated_sum`; differentiable."""
    terms = per_sample(residual, samples), spread(gate, samples), per_sample(values, samples)
    if residual.dtype == values.dtype == gate.dtype and residual.dtype in (torch.float32, torch.float64):
        return torch.addcmul(*terms).reshape(residual.shape)
    return (terms[0] + terms[1] * terms[2]).reshape(residual.shape)
