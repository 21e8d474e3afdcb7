"""Mean and inverse standard deviation of each sample and group, from the statistics of parts and channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import Kernel
from .common import Statistics, Tiles, part_range


if TYPE_CHECKING:
    from ..plan import GroupNormPlan


@Kernel
@triton.jit
def _join_kernel(parts, statistics, plan, eps, sizes):
    """The statistics of one group of a sample.

    Args:
        parts: `[B, PARTS, 2, CHANNELS]` float32, mean and sum of squared deviations.
        statistics: `Statistics`, written.
        plan: `GroupNormPlan`, the rows of each sample.
        eps: added to the variance.
        sizes: `Sizes`.
    """
    GROUP_SIZE: tl.constexpr = sizes.CHANNELS // sizes.GROUPS
    sample, group = tl.program_id(0), tl.program_id(1)
    # [PARTS]
    numbers = tl.arange(0, sizes.PARTS)
    start, end = part_range(plan, sample, numbers, sizes)
    counts = (end - start).to(tl.float32)
    places = parts + (sample * sizes.PARTS + numbers).to(tl.int64) * (2 * sizes.CHANNELS) + group * GROUP_SIZE
    total = tl.maximum(tl.sum(counts, 0), 1.0) * GROUP_SIZE
    sums = tl.zeros((sizes.PARTS,), tl.float32)
    for channel in range(GROUP_SIZE):
        sums += counts * tl.load(places + channel)
    group_mean = tl.sum(sums, 0) / total
    # [PARTS]
    sums = tl.zeros((sizes.PARTS,), tl.float32)
    for channel in range(GROUP_SIZE):
        difference = tl.load(places + channel) - group_mean
        sums += tl.load(places + sizes.CHANNELS + channel) + counts * difference * difference
    tl.store(statistics.mean + sample * sizes.GROUPS + group, group_mean)
    tl.store(statistics.scale + sample * sizes.GROUPS + group, 1.0 / tl.sqrt(tl.sum(sums, 0) / total + eps))


@on_device_of_first_argument
def join_statistics(parts: Tensor, plan: GroupNormPlan, tiles: Tiles, num_groups: int, eps: float) -> Statistics:
    """The statistics of each sample and group, from those that `part_statistics` returns."""
    batch_size = parts.shape[0]
    mean, scale = (parts.new_empty(batch_size, num_groups) for _ in range(2))
    statistics = Statistics(mean, scale)
    _join_kernel[batch_size, num_groups](parts, statistics, plan, eps, tiles.sizes)
    return statistics
