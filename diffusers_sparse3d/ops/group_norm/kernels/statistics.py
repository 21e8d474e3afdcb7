"""Mean and sum of squared deviations of each channel in each part of a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import Tiles, part_range


if TYPE_CHECKING:
    from ..plan import GroupNormPlan


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _statistics_kernel(feats, parts, plan, channel_vectors, num_parts, sizes):
    """The statistics of some channels of one part of a sample.

    Args:
        feats: `[N, C]`.
        parts: `[B, num_parts, 2, C]` float32, written: mean and sum of squared deviations.
        plan: `GroupNormPlan`, the rows of each sample.
        channel_vectors: C / VECTOR.
        num_parts: parts of each sample.
        sizes: `Sizes`.
    """
    num_channels = channel_vectors * sizes.VECTOR
    ROWS: tl.constexpr = sizes.ROWS
    sample, part = tl.program_id(0), tl.program_id(1)
    start, end = part_range(plan, sample, part, num_parts)
    # [COLUMNS]
    channels = tl.program_id(2) * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)
    is_channel = channels < num_channels
    mean = tl.zeros((sizes.COLUMNS,), tl.float32)
    deviation = tl.zeros((sizes.COLUMNS,), tl.float32)
    for begin in range(start, end, ROWS):
        # [ROWS]
        places = begin + tl.arange(0, ROWS)
        valid = places < end
        rows = places if plan.order is None else tl.load(plan.order + places, mask=valid, other=0)
        starts = (rows.to(tl.int64) * num_channels)[:, None]
        # [ROWS, COLUMNS]
        mask = valid[:, None] & is_channel[None, :]
        values = tl.load(feats + starts + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        # The statistics of the tile are joined with those of the tiles before it.
        before = (begin - start).to(tl.float32)
        count = tl.minimum(end - begin, ROWS).to(tl.float32)
        # [COLUMNS]
        tile_mean = tl.sum(values, 0) / count
        centred = tl.where(valid[:, None], values - tile_mean[None, :], 0.0)
        difference = tile_mean - mean
        weight = count / (before + count)
        mean += difference * weight
        deviation += tl.sum(centred * centred, 0) + difference * difference * before * weight
    parts += (sample * num_parts + part).to(tl.int64) * (2 * num_channels)
    tl.store(parts + channels, mean, mask=is_channel)
    tl.store(parts + num_channels + channels, deviation, mask=is_channel)


@on_device_of_first_argument
def part_statistics(feats: Tensor, plan: GroupNormPlan, tiles: Tiles) -> Tensor:
    """`feats [N, C]`, contiguous -> `[B, parts, 2, C]` float32: mean and sum of squared deviations of each part."""
    batch_size = len(plan.cu_rows) - 1
    parts = feats.new_empty(batch_size, tiles.parts, 2, feats.shape[1], dtype=torch.float32)
    _statistics_kernel[batch_size, tiles.parts, tiles.column_tiles](
        feats, parts, plan, tiles.channel_vectors, tiles.parts, tiles.sizes
    )
    return parts
