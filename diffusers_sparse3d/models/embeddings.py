"""Position embedding of grid coordinates, shared by the dense and the sparse models."""

from __future__ import annotations

import torch
from torch import Tensor


def coordinate_embedding(coords: Tensor, dim: int, factor: float = 1.0) -> Tensor:
    """Sinusoidal embedding of 3D coordinates.

    For each axis sin then cos of `factor * coordinate` at the `n = dim // 3 // 2` frequencies `10000^(-i / n)`; the
    three axes are concatenated and zero-padded to `dim`.

    Args:
        coords: `[N, 3]` coordinates in grid cells, integer or floating point.
        dim: channels of the embedding, at least 6.
        factor: multiplies the coordinates first.

    Returns:
        `[N, dim]` float32.
    """
    num_frequencies = dim // 3 // 2
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device=coords.device) / num_frequencies
    angles = (coords.float() * factor)[..., None] * 10000.0**-exponents
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return torch.nn.functional.pad(embedding, (0, dim - embedding.shape[1]))
