"""Noise that belongs to a sample and a step, not to a process: the same for any number of processes and batch size.

Each sample of a batch has a seed, 64 bits in an int64. Random numbers are SplitMix64 (Steele, Lea and Flood, 2014) of
that seed and a counter, for which a voxel's coordinates serve, so that the order of rows does not matter either.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor


class Draw(IntEnum):
    """What a random number is drawn for; numbers for different purposes are independent."""

    POSTERIOR = 0
    NOISE = 1
    NOISE_LEVEL = 2
    CONDITIONING = 3
    COLOR = 4
    SAMPLING = 5
    PATCH = 6


# Rows of a volume that counters tell apart, per axis.
COORDINATE_RANGE = 2048


def batch_seeds(batch: dict[str, Tensor], num_samples: int, device: torch.device) -> Tensor:
    """Returns the `seed` of a batch, `[num_samples]` int64, drawn from torch's generator if the batch has none."""
    if "seed" in batch:
        return batch["seed"]
    return torch.randint(2**62, (num_samples,), device=device)


def uniform(seeds: Tensor, draw: Draw, size: int = 1) -> Tensor:
    """Returns numbers in (0, 1), `[B, size]` float32, for seeds `[B]`."""
    bits = _bits(seeds[:, None], draw, torch.arange(size, device=seeds.device))
    # 24 bits, so that no number is rounded to 1.
    return (((bits >> 40) & 0xFFFFFF).float() + 0.5) / 2**24


def normal_like(values: Tensor, seeds: Tensor, draw: Draw, coords: Tensor | None = None) -> Tensor:
    """Returns standard normal noise, float32, in the shape of `values`.

    Args:
        values: `[B, ...]` or, with `coords`, packed rows `[N, C]`.
        seeds: Seeds of the samples, `[B]` int64.
        draw: What the noise is drawn for.
        coords: Coordinates of packed rows, `[N, 4]` (sample, x, y, z), below 2048.
    """
    if coords is None:
        counters = torch.arange(values[0].numel(), device=values.device)
        return _normal(_bits(seeds[:, None], draw, counters)).view(values.shape)
    x, y, z = coords[:, 1:].long().unbind(1)
    voxels = (x * COORDINATE_RANGE + y) * COORDINATE_RANGE + z
    counters = voxels[:, None] * values.shape[1] + torch.arange(values.shape[1], device=values.device)
    return _normal(_bits(seeds[coords[:, 0].long(), None], draw, counters))


def _signed(number: int) -> int:
    """The int64 with the low 64 bits of a number; int64 wraps around as uint64 does."""
    return (number + 2**63) % 2**64 - 2**63


# Constants of SplitMix64.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, by which every bit of the result depends on every bit of `bits`."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * _FIRST
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * _SECOND
    return bits ^ ((bits >> 31) & (2**33 - 1))


def _bits(seeds: Tensor, draw: Draw, counters: Tensor) -> Tensor:
    """64 random bits for each pair of a seed and a counter."""
    return _mix(_mix(seeds + _signed(_GOLDEN * (draw + 1))) + _GOLDEN * (counters + 1))


def _normal(bits: Tensor) -> Tensor:
    """Standard normal numbers by Box and Muller from 64 bits each."""
    radius = (-2 * torch.log((((bits >> 32) & 0xFFFFFFFF).float() + 0.5) / 2**32)).clamp(min=0).sqrt()
    return radius * torch.cos(2 * math.pi / 2**32 * (bits & 0xFFFFFFFF).float())
