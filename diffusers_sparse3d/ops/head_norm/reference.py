"""The RMS norm of heads in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


# The length below which a head is divided by this one.
SHORTEST = 1e-12


def head_rms_norm_reference(hidden_states: Tensor, gamma: Tensor) -> Tensor:
    """The result of `ops.head_norm.head_rms_norm`; differentiable."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    weight = gamma.to(dtype) * hidden_states.shape[-1] ** 0.5
    return (F.normalize(hidden_states.to(dtype), dim=-1, eps=SHORTEST) * weight).to(hidden_states.dtype)
