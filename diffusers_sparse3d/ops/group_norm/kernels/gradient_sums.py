"""Sums over the rows of each part of a sample that the gradients of group norm need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import Affine, Statistics, Tiles, part_range, silu_gradient


if TYPE_CHECKING:
    from ..plan import GroupNormPlan


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _sums_kernel(
    feats,
    grad_output,
    parts,
    affine,
    statistics,
    plan,
    channel_vectors,
    num_groups,
    num_parts,
    sizes,
    SILU: tl.constexpr,
):
    """The sums of some channels of one part of a sample.

    Args:
        feats: `[N, C]`.
        grad_output: `[N, C]`, gradient of the output.
        parts: `[B, num_parts, 2, C]` float32, written: sums of the gradient before the activation, and of its
            products with the normalised features.
        affine: `Affine`, scale and shift of each channel.
        statistics: `Statistics` of each sample and group.
        plan: `GroupNormPlan`, the rows of each sample.
        channel_vectors: C / VECTOR.
        num_groups: groups of channels.
        num_parts: parts of each sample.
        sizes: `Sizes`.
        SILU: whether SiLU was applied.
    """
    num_channels = channel_vectors * sizes.VECTOR
    ROWS: tl.constexpr = sizes.ROWS
    sample, part = tl.program_id(0), tl.program_id(1)
    start, end = part_range(plan, sample, part, num_parts)
    # [COLUMNS]
    channels = tl.program_id(2) * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)
    is_channel = channels < num_channels
    group = sample * num_groups + channels // (num_channels // num_groups)
    # [1, COLUMNS]
    mean = tl.load(statistics.mean + group, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(statistics.scale + group, mask=is_channel, other=0.0)[None, :]
    weight = tl.load(affine.weight + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(affine.bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    # [COLUMNS]
    gradients = tl.zeros((sizes.COLUMNS,), tl.float32)
    products = tl.zeros((sizes.COLUMNS,), tl.float32)
    for begin in range(start, end, ROWS):
        # [ROWS]
        places = begin + tl.arange(0, ROWS)
        valid = places < end
        rows = places if plan.order is None else tl.load(plan.order + places, mask=valid, other=0)
        starts = (rows.to(tl.int64) * num_channels)[:, None]
        # [ROWS, COLUMNS]
        mask = valid[:, None] & is_channel[None, :]
        normalized = (tl.load(feats + starts + channels[None, :], mask=mask, other=0.0).to(tl.float32) - mean) * scale
        gradient = tl.load(grad_output + starts + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        if SILU:
            gradient = silu_gradient(gradient, normalized, weight, bias)
        gradients += tl.sum(gradient, 0)
        products += tl.sum(gradient * normalized, 0)
    parts += (sample * num_parts + part).to(tl.int64) * (2 * num_channels)
    tl.store(parts + channels, gradients, mask=is_channel)
    tl.store(parts + num_channels + channels, products, mask=is_channel)


@on_device_of_first_argument
def gradient_sums(
    feats: Tensor,
    grad_output: Tensor,
    affine: Affine,
    statistics: Statistics,
    plan: GroupNormPlan,
    tiles: Tiles,
    silu: bool,
) -> Tensor:
    """Sums over each sample of the gradient before the activation, and of its products with the normalised features.

    Args:
        feats: `[N, C]`, contiguous.
        grad_output: `[N, C]`, contiguous.
        affine: scale and shift of each channel.
        statistics: of `feats`.
        plan: the rows of each sample.
        tiles: how the work is cut.
        silu: whether SiLU was applied.

    Returns:
        `[B, 2, C]` float32.
    """
    batch_size, num_groups = statistics.mean.shape
    parts = statistics.mean.new_empty(batch_size, tiles.parts, 2, feats.shape[1])
    _sums_kernel[batch_size, tiles.parts, tiles.column_tiles](
        feats,
        grad_output,
        parts,
        affine,
        statistics,
        plan,
        tiles.channel_vectors,
        num_groups,
        tiles.parts,
        tiles.sizes,
        SILU=silu,
    )
    return parts.sum(1)
