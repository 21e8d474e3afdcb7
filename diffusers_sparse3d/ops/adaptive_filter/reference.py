"""The adaptive filter in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


NUM_TAPS = 27
# The smallest sum of magnitudes that a voxel's taps are divided by.
SMALLEST_NORM = 1e-12


def adaptive_filter_reference(hidden_states: Tensor, taps: Tensor) -> Tensor:
    """The result of `ops.adaptive_filter.adaptive_filter`; differentiable."""
    # The division is applied to the sum, which is a 27th of the taps.
    dtype = torch.promote_types(taps.dtype, torch.float32)
    norm = taps.abs().sum(dim=1, keepdim=True, dtype=dtype).clamp(min=SMALLEST_NORM)
    size_x, size_y, size_z = hidden_states.shape[2:]
    padded = F.pad(hidden_states.to(dtype), (1,) * 6)
    total = torch.zeros_like(hidden_states, dtype=dtype)
    for tap, (x, y, z) in zip(taps.split(1, dim=1), itertools.product(range(3), repeat=3)):
        total.addcmul_(padded[:, :, x : x + size_x, y : y + size_y, z : z + size_z], tap.to(dtype))
    return (total / norm).to(hidden_states.dtype)
