"""Gradient of the features of group norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import Affine, Statistics, Tiles, silu_gradient


if TYPE_CHECKING:
    from ..plan import GroupNormPlan


class GradientMeans(NamedTuple):
    """Means over each sample and group, `[B, G]` float32.

    Attributes:
        gradient: of the gradient of the normalised features.
        product: of its product with the normalised features.
    """

    gradient: Tensor
    product: Tensor


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _gradient_kernel(
    feats,
    grad_output,
    grad_feats,
    affine,
    statistics,
    means,
    plan,
    num_rows,
    channel_vectors,
    num_groups,
    sizes,
    SILU: tl.constexpr,
):
    """A tile of the gradient of the features.

    Args:
        feats: `[N, C]`.
        grad_output: `[N, C]`, gradient of the output.
        grad_feats: `[N, C]`, written.
        affine: `Affine`, scale and shift of each channel.
        statistics: `Statistics` of each sample and group.
        means: `GradientMeans` of each sample and group.
        plan: `GroupNormPlan`, the sample of each row.
        num_rows: N.
        channel_vectors: C / VECTOR.
        num_groups: groups of channels.
        sizes: `Sizes`.
        SILU: whether SiLU was applied.
    """
    num_channels = channel_vectors * sizes.VECTOR
    # [ROWS]
    rows = tl.program_id(0) * sizes.ROWS + tl.arange(0, sizes.ROWS)
    valid = rows < num_rows
    # [COLUMNS]
    channels = tl.program_id(1) * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)
    is_channel = channels < num_channels
    is_column = is_channel[None, :]
    # [ROWS, COLUMNS], or [1, COLUMNS] where there is one sample
    if plan.order is None:
        sample = tl.zeros((1, 1), tl.int32)
    else:
        sample = tl.load(plan.coords + rows.to(tl.int64) * 4, mask=valid, other=0)[:, None]
    group = sample * num_groups + (channels // (num_channels // num_groups))[None, :]
    scale = tl.load(statistics.scale + group, mask=is_column, other=0.0)
    # [ROWS, COLUMNS]
    starts = (rows.to(tl.int64) * num_channels)[:, None]
    mask = valid[:, None] & is_column
    normalized = tl.load(feats + starts + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    normalized = (normalized - tl.load(statistics.mean + group, mask=is_column, other=0.0)) * scale
    # [1, COLUMNS]
    weight = tl.load(affine.weight + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(affine.bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    # [ROWS, COLUMNS]
    gradient = tl.load(grad_output + starts + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    if SILU:
        gradient = silu_gradient(gradient, normalized, weight, bias)
    gradient *= weight
    gradient -= tl.load(means.gradient + group, mask=is_column, other=0.0)
    gradient -= normalized * tl.load(means.product + group, mask=is_column, other=0.0)
    gradient *= scale
    tl.store(grad_feats + starts + channels[None, :], gradient.to(grad_feats.dtype.element_ty), mask=mask)


@on_device_of_first_argument
def feats_gradient(
    feats: Tensor,
    grad_output: Tensor,
    affine: Affine,
    statistics: Statistics,
    means: GradientMeans,
    plan: GroupNormPlan,
    tiles: Tiles,
    silu: bool,
) -> Tensor:
    """The gradient of the features.

    Args:
        feats: `[N, C]`, contiguous, N > 0.
        grad_output: `[N, C]`, contiguous.
        affine: scale and shift of each channel.
        statistics: of `feats`.
        means: of the gradients.
        plan: the sample of each row.
        tiles: how the work is cut.
        silu: whether SiLU was applied.

    Returns:
        `[N, C]`.
    """
    grad_feats, num_groups = torch.empty_like(feats), statistics.mean.shape[1]
    _gradient_kernel[cdiv(len(feats), tiles.rows), tiles.column_tiles](
        feats,
        grad_output,
        grad_feats,
        affine,
        statistics,
        means,
        plan,
        len(feats),
        tiles.channel_vectors,
        num_groups,
        tiles.sizes,
        SILU=silu,
    )
    return grad_feats
