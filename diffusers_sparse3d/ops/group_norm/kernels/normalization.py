"""Features normalised by given statistics, with scale, shift and activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import Affine, Statistics, Tiles, sigmoid


if TYPE_CHECKING:
    from ..plan import GroupNormPlan


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _normalize_kernel(
    feats, output, affine, statistics, plan, num_rows, channel_vectors, num_groups, sizes, SILU: tl.constexpr
):
    """A tile of the output.

    Args:
        feats: `[N, C]`.
        output: `[N, C]`, written.
        affine: `Affine`, scale and shift of each channel.
        statistics: `Statistics` of each sample and group.
        plan: `GroupNormPlan`, the sample of each row.
        num_rows: N.
        channel_vectors: C / VECTOR.
        num_groups: groups of channels.
        sizes: `Sizes`.
        SILU: whether SiLU is applied.
    """
    num_channels = channel_vectors * sizes.VECTOR
    group_size = num_channels // num_groups
    # [ROWS]
    rows = tl.program_id(0) * sizes.ROWS + tl.arange(0, sizes.ROWS)
    valid = rows < num_rows
    # [COLUMNS]
    channels = tl.program_id(1) * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)
    is_channel = channels < num_channels
    # [ROWS, COLUMNS]
    starts = (rows.to(tl.int64) * num_channels)[:, None]
    mask = valid[:, None] & is_channel[None, :]
    values = tl.load(feats + starts + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    # [ROWS, COLUMNS], or [1, COLUMNS] where there is one sample
    if plan.order is None:
        sample = tl.zeros((1, 1), tl.int32)
    else:
        sample = tl.load(plan.coords + rows.to(tl.int64) * 4, mask=valid, other=0)[:, None]
    group = sample * num_groups + (channels // group_size)[None, :]
    mean = tl.load(statistics.mean + group, mask=is_channel[None, :], other=0.0)
    normalized = values - mean
    normalized *= tl.load(statistics.scale + group, mask=is_channel[None, :], other=0.0)
    # [COLUMNS]
    weight = tl.load(affine.weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    bias = tl.load(affine.bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    # [ROWS, COLUMNS]
    result = normalized * weight[None, :] + bias[None, :]
    if SILU:
        result *= sigmoid(result)
    tl.store(output + starts + channels[None, :], result.to(output.dtype.element_ty), mask=mask)


@on_device_of_first_argument
def normalize(
    feats: Tensor, affine: Affine, statistics: Statistics, plan: GroupNormPlan, tiles: Tiles, silu: bool
) -> Tensor:
    """`feats [N, C]`, contiguous, N > 0 -> `[N, C]`, normalised, scaled, shifted and, with `silu`, activated."""
    output, num_groups = torch.empty_like(feats), statistics.mean.shape[1]
    _normalize_kernel[cdiv(len(feats), tiles.rows), tiles.column_tiles](
        feats,
        output,
        affine,
        statistics,
        plan,
        len(feats),
        tiles.channel_vectors,
        num_groups,
        tiles.sizes,
        SILU=silu,
    )
    return output
