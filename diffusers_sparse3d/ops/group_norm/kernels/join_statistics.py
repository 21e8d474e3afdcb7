"""Mean and inverse standard deviation of each sample and group, from the statistics of parts and channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import MOST_PARTS, Statistics, part_range


if TYPE_CHECKING:
    from ..plan import GroupNormPlan


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _join_kernel(parts, statistics, plan, num_parts, num_groups, group_size, eps, PARTS: tl.constexpr):
    """The statistics of one group of a sample.

    Args:
        parts: `[B, num_parts, 2, C]` float32, mean and sum of squared deviations.
        statistics: `Statistics`, written.
        plan: `GroupNormPlan`, the rows of each sample.
        num_parts: parts of each sample.
        num_groups: groups of channels.
        group_size: channels of a group.
        eps: added to the variance.
        PARTS: the most parts of a sample.
    """
    num_channels = num_groups * group_size
    sample, group = tl.program_id(0), tl.program_id(1)
    # [PARTS]
    numbers = tl.arange(0, PARTS)
    is_part = numbers < num_parts
    # Parts beyond the last one have no rows.
    start, end = part_range(plan, sample, numbers, num_parts)
    counts = (end - start).to(tl.float32)
    places = parts + (sample * num_parts + numbers).to(tl.int64) * (2 * num_channels) + group * group_size
    total = tl.maximum(tl.sum(counts, 0), 1.0) * group_size
    sums = tl.zeros((PARTS,), tl.float32)
    for channel in range(group_size):
        sums += counts * tl.load(places + channel, mask=is_part, other=0.0)
    group_mean = tl.sum(sums, 0) / total
    # [PARTS]
    sums = tl.zeros((PARTS,), tl.float32)
    for channel in range(group_size):
        difference = tl.load(places + channel, mask=is_part, other=0.0) - group_mean
        deviations = tl.load(places + num_channels + channel, mask=is_part, other=0.0)
        sums += deviations + counts * difference * difference
    tl.store(statistics.mean + sample * num_groups + group, group_mean)
    tl.store(statistics.scale + sample * num_groups + group, 1.0 / tl.sqrt(tl.sum(sums, 0) / total + eps))


@on_device_of_first_argument
def join_statistics(parts: Tensor, plan: GroupNormPlan, num_groups: int, eps: float) -> Statistics:
    """The statistics of each sample and group, from those that `part_statistics` returns."""
    batch_size, num_parts, _, num_channels = parts.shape
    mean, scale = (parts.new_empty(batch_size, num_groups) for _ in range(2))
    statistics = Statistics(mean, scale)
    _join_kernel[batch_size, num_groups](
        parts, statistics, plan, num_parts, num_groups, num_channels // num_groups, eps, PARTS=MOST_PARTS
    )
    return statistics
