"""Group norm of a packed batch as Triton kernels: one pass over the features for statistics, one to apply them.

The rows of each sample are cut into parts; a program goes through a part and keeps, per channel, the mean and the sum
of squared deviations, tile after tile (sums of squares would lose the variance of values far from zero). A small
kernel joins parts and channels. Nothing is added by atomics, no sample is looped over on the host.

Floors in bytes: forward 3 N C values (read, read, write), backward 5 N C (twice two reads, one write).

Operators for PyTorch: opaque to `torch.compile`, and what they take from the coordinates is plain tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.dispatch import cdiv, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ..runtime.launch import Kernel
from ..runtime.operators import operator


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


# Values of a tile, channels of a tile at most, and parts of a sample at most.
_TILE_VALUES = 4096
_MOST_CHANNELS = 128
_MOST_PARTS = 512


# Tracing would end at the lookup of tables that are not there yet. Nothing of this runs where they are made before.
@torch.compiler.disable
def _make_plan(cache: CoordinateCache) -> tuple[Tensor, Tensor | None]:
    boundaries = torch.arange(cache.batch_size + 1, dtype=torch.int32, device=cache.coords.device)
    if cache.batch_size == 1:
        return boundaries * cache.coords.shape[0], None
    batch, order = cache.coords[:, 0].sort(stable=True)
    return torch.searchsorted(batch, boundaries, out_int32=True), order.int()


def plan_group_norm(cache: CoordinateCache) -> tuple[Tensor, Tensor | None]:
    """What the operator takes from the coordinates, made at the first call for a cache.

    Returns:
        Where each sample starts in the order, `[B + 1]` int32, and the order, `[N]` int32; None where there is one
        sample.
    """
    return cache.derived("group_norm", lambda: _make_plan(cache))


@triton.jit
def _part(cu_rows, sample, part, PARTS: tl.constexpr):
    """The places start..end of a part of a sample."""
    first = tl.load(cu_rows + sample)
    last = tl.load(cu_rows + sample + 1)
    share = (last - first + PARTS - 1) // PARTS
    start = tl.minimum(first + part * share, last)
    return start, tl.minimum(start + share, last)


@triton.jit
def _load_rows(pointer, order, places, valid, channels, C: tl.constexpr, ORDERED: tl.constexpr):
    rows = tl.load(order + places, mask=valid, other=0) if ORDERED else places
    mask = valid[:, None] & (channels < C)[None, :]
    return tl.load(pointer + (rows.to(tl.int64) * C)[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@Kernel
@triton.jit
def _statistics_kernel(
    feats,
    order,
    cu_rows,
    parts,
    C: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    sample, part = tl.program_id(0), tl.program_id(1)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    start, end = _part(cu_rows, sample, part, PARTS)
    mean = tl.zeros((CHANNELS,), tl.float32)
    deviation = tl.zeros((CHANNELS,), tl.float32)
    for begin in range(start, end, ROWS):
        places = begin + tl.arange(0, ROWS)
        valid = places < end
        values = _load_rows(feats, order, places, valid, channels, C, ORDERED)
        before = (begin - start).to(tl.float32)
        count = tl.minimum(end - begin, ROWS).to(tl.float32)
        tile_mean = tl.sum(values, 0) / count
        centred = tl.where(valid[:, None], values - tile_mean[None, :], 0.0)
        difference = tile_mean - mean
        weight = count / (before + count)
        mean += difference * weight
        deviation += tl.sum(centred * centred, 0) + difference * difference * before * weight
    parts += (sample * PARTS + part).to(tl.int64) * (2 * C)
    tl.store(parts + channels, mean, mask=channels < C)
    tl.store(parts + C + channels, deviation, mask=channels < C)


@Kernel
@triton.jit
def _join_kernel(parts, cu_rows, mean, scale, eps, C: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr):
    sample, group = tl.program_id(0), tl.program_id(1)
    GROUP_SIZE: tl.constexpr = C // GROUPS
    numbers = tl.arange(0, PARTS)
    start, end = _part(cu_rows, sample, numbers, PARTS)
    counts = (end - start).to(tl.float32)
    places = parts + (sample * PARTS + numbers).to(tl.int64) * (2 * C) + group * GROUP_SIZE
    total = tl.maximum(tl.sum(counts, 0), 1.0) * GROUP_SIZE
    sums = tl.zeros((PARTS,), tl.float32)
    for channel in range(GROUP_SIZE):
        sums += counts * tl.load(places + channel)
    group_mean = tl.sum(sums, 0) / total
    sums = tl.zeros((PARTS,), tl.float32)
    for channel in range(GROUP_SIZE):
        difference = tl.load(places + channel) - group_mean
        sums += tl.load(places + C + channel) + counts * difference * difference
    tl.store(mean + sample * GROUPS + group, group_mean)
    tl.store(scale + sample * GROUPS + group, 1.0 / tl.sqrt(tl.sum(sums, 0) / total + eps))


@triton.jit
def _sigmoid(values):
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def _gradient(gradient, normalized, weight, bias, SILU: tl.constexpr):
    """The gradient of what the activation is applied to."""
    if SILU:
        activated = normalized * weight + bias
        sigmoid = _sigmoid(activated)
        gradient = gradient * sigmoid * (1.0 + activated * (1.0 - sigmoid))
    return gradient


@triton.jit
def _row_samples(coords, rows, valid, SAMPLES: tl.constexpr):
    """The sample of each row, `[ROWS, 1]`, or `[1, 1]` where there is one."""
    if SAMPLES == 1:
        return tl.zeros((1, 1), tl.int32)
    else:
        return tl.load(coords + rows.to(tl.int64) * 4, mask=valid, other=0)[:, None]


@Kernel
@triton.jit
def _apply_kernel(
    feats,
    weight,
    bias,
    mean,
    scale,
    coords,
    output,
    num_rows,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid, is_channel = rows < num_rows, channels < C
    values = _load_rows(feats, None, rows, valid, channels, C, False)
    statistic = _row_samples(coords, rows, valid, SAMPLES) * GROUPS + (channels // (C // GROUPS))[None, :]
    mask = is_channel[None, :]
    normalized = values - tl.load(mean + statistic, mask=mask, other=0.0)
    normalized *= tl.load(scale + statistic, mask=mask, other=0.0)
    weights = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    result = normalized * weights[None, :] + tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    if SILU:
        result *= _sigmoid(result)
    places = (rows.to(tl.int64) * C)[:, None] + channels[None, :]
    tl.store(output + places, result.to(output.dtype.element_ty), mask=valid[:, None] & mask)


@Kernel
@triton.jit
def _sums_kernel(
    feats,
    grad_output,
    weight,
    bias,
    mean,
    scale,
    order,
    cu_rows,
    parts,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    ORDERED: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    sample, part = tl.program_id(0), tl.program_id(1)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < C
    start, end = _part(cu_rows, sample, part, PARTS)
    statistic = sample * GROUPS + channels // (C // GROUPS)
    means = tl.load(mean + statistic, mask=is_channel, other=0.0)[None, :]
    scales = tl.load(scale + statistic, mask=is_channel, other=0.0)[None, :]
    weights = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    biases = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    gradients = tl.zeros((CHANNELS,), tl.float32)
    products = tl.zeros((CHANNELS,), tl.float32)
    for begin in range(start, end, ROWS):
        places = begin + tl.arange(0, ROWS)
        valid = places < end
        normalized = (_load_rows(feats, order, places, valid, channels, C, ORDERED) - means) * scales
        gradient = _load_rows(grad_output, order, places, valid, channels, C, ORDERED)
        gradient = _gradient(gradient, normalized, weights, biases, SILU)
        gradients += tl.sum(gradient, 0)
        products += tl.sum(gradient * normalized, 0)
    parts += (sample * PARTS + part).to(tl.int64) * (2 * C)
    tl.store(parts + channels, gradients, mask=is_channel)
    tl.store(parts + C + channels, products, mask=is_channel)


@Kernel
@triton.jit
def _backward_kernel(
    feats,
    grad_output,
    weight,
    bias,
    mean,
    scale,
    mean_gradient,
    mean_product,
    coords,
    grad_feats,
    num_rows,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid, is_channel = rows < num_rows, channels < C
    mask = is_channel[None, :]
    statistic = _row_samples(coords, rows, valid, SAMPLES) * GROUPS + (channels // (C // GROUPS))[None, :]
    scales = tl.load(scale + statistic, mask=mask, other=0.0)
    normalized = _load_rows(feats, None, rows, valid, channels, C, False)
    normalized = (normalized - tl.load(mean + statistic, mask=mask, other=0.0)) * scales
    weights = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    biases = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    gradient = _load_rows(grad_output, None, rows, valid, channels, C, False)
    gradient = _gradient(gradient, normalized, weights, biases, SILU) * weights
    gradient -= tl.load(mean_gradient + statistic, mask=mask, other=0.0)
    gradient -= normalized * tl.load(mean_product + statistic, mask=mask, other=0.0)
    places = (rows.to(tl.int64) * C)[:, None] + channels[None, :]
    tl.store(grad_feats + places, (gradient * scales).to(grad_feats.dtype.element_ty), mask=valid[:, None] & mask)


@dataclass(frozen=True)
class _Tiles:
    """Rows and channels of a tile, how many tiles the channels make, and parts of each sample."""

    rows: int
    channels: int
    channel_tiles: int
    parts: int

    @classmethod
    def of(cls, feats: Tensor, batch_size: int) -> _Tiles:
        channels = min(_MOST_CHANNELS, next_power_of_2(feats.shape[1]))
        channel_tiles = cdiv(feats.shape[1], channels)
        rows = _TILE_VALUES // channels
        parts = cdiv(8 * num_multiprocessors(feats.device), batch_size * channel_tiles)
        parts = min(parts, cdiv(feats.shape[0], rows), _MOST_PARTS)
        return cls(rows, channels, channel_tiles, next_power_of_2(parts))


@operator(
    "diffusers_sparse3d::sparse_group_norm",
    mutates_args=(),
    schema=(
        "(Tensor feats, Tensor weight, Tensor bias, Tensor coords, Tensor cu_rows, Tensor? order, SymInt num_groups, "
        "float eps, bool silu) -> (Tensor, Tensor, Tensor)"
    ),
)
@on_device_of_first_argument
def _normalize(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    coords: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        feats, weight, bias, num_groups, eps, silu: as in `ops.group_norm.sparse_group_norm`; at least one row.
        coords: `[N, 4]` int32, contiguous.
        cu_rows, order: what `plan_group_norm` returns.

    Returns:
        `[N, C]`, and mean and inverse standard deviation of each sample and group, `[B, G]` float32.
    """
    feats, weight, bias = feats.contiguous(), weight.contiguous(), bias.contiguous()
    (num_rows, channels), batch_size = feats.shape, len(cu_rows) - 1
    tiles = _Tiles.of(feats, batch_size)
    parts = feats.new_empty(batch_size, tiles.parts, 2, channels, dtype=torch.float32)
    mean = feats.new_empty(batch_size, num_groups, dtype=torch.float32)
    scale = torch.empty_like(mean)
    _statistics_kernel[batch_size, tiles.parts, tiles.channel_tiles](
        feats,
        order,
        cu_rows,
        parts,
        C=channels,
        ORDERED=order is not None,
        ROWS=tiles.rows,
        CHANNELS=tiles.channels,
        PARTS=tiles.parts,
    )
    _join_kernel[batch_size, num_groups](
        parts, cu_rows, mean, scale, eps, C=channels, GROUPS=num_groups, PARTS=tiles.parts
    )
    output = torch.empty_like(feats)
    _apply_kernel[cdiv(num_rows, tiles.rows), tiles.channel_tiles](
        feats,
        weight,
        bias,
        mean,
        scale,
        coords,
        output,
        num_rows,
        C=channels,
        GROUPS=num_groups,
        SAMPLES=min(batch_size, 2),
        SILU=silu,
        ROWS=tiles.rows,
        CHANNELS=tiles.channels,
    )
    return output, mean, scale


@_normalize.register_fake
def _(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    coords: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = (feats.new_empty(cu_rows.shape[0] - 1, num_groups, dtype=torch.float32) for _ in range(2))
    return feats.new_empty(feats.shape), mean, scale


@operator(
    "diffusers_sparse3d::sparse_group_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_output, Tensor feats, Tensor weight, Tensor bias, Tensor mean, Tensor scale, Tensor coords, "
        "Tensor cu_rows, Tensor? order, bool silu) -> (Tensor, Tensor, Tensor)"
    ),
)
@on_device_of_first_argument
def _normalize_backward(
    grad_output: Tensor,
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    coords: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `feats`, `weight` and `bias`, from `grad_output [N, C]` and what the operator took and returned."""
    feats, weight, bias = feats.contiguous(), weight.contiguous(), bias.contiguous()
    grad_output = grad_output.contiguous()
    (num_rows, channels), (batch_size, num_groups) = feats.shape, mean.shape
    tiles = _Tiles.of(feats, batch_size)
    parts = mean.new_empty(batch_size, tiles.parts, 2, channels)
    _sums_kernel[batch_size, tiles.parts, tiles.channel_tiles](
        feats,
        grad_output,
        weight,
        bias,
        mean,
        scale,
        order,
        cu_rows,
        parts,
        C=channels,
        GROUPS=num_groups,
        ORDERED=order is not None,
        SILU=silu,
        ROWS=tiles.rows,
        CHANNELS=tiles.channels,
        PARTS=tiles.parts,
    )
    sums = parts.sum(1)
    count = cu_rows.diff()[:, None, None].clamp(min=1) * (channels // num_groups)
    means = (sums * weight.float()).unflatten(2, (num_groups, -1)).sum(3) / count
    mean_gradient, mean_product = means.transpose(0, 1).contiguous()
    grad_feats = torch.empty_like(feats)
    _backward_kernel[cdiv(num_rows, tiles.rows), tiles.channel_tiles](
        feats,
        grad_output,
        weight,
        bias,
        mean,
        scale,
        mean_gradient,
        mean_product,
        coords,
        grad_feats,
        num_rows,
        C=channels,
        GROUPS=num_groups,
        SAMPLES=min(batch_size, 2),
        SILU=silu,
        ROWS=tiles.rows,
        CHANNELS=tiles.channels,
    )
    # Apart: results of an operator may not share memory.
    grad_bias, grad_weight = sums[:, 0].sum(0), sums[:, 1].sum(0)
    return grad_feats, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@_normalize_backward.register_fake
def _(
    grad_output: Tensor,
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    coords: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (feats, weight, bias))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """The input in its own dtype and statistics `[B, G]`."""
    feats, weight, bias, coords, cu_rows, order, _, _, ctx.silu = inputs
    _, mean, scale = output
    ctx.save_for_backward(feats, weight, bias, mean, scale, coords, cu_rows, order)
    ctx.mark_non_differentiable(mean, scale)
    # Else zeros would be made for the statistics.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_normalize_backward(grad_output, *ctx.saved_tensors, ctx.silu), *(None,) * 6


_normalize.register_autograd(_gradients, setup_context=_keep)


def sparse_group_norm(
    feats: Tensor,
    cache: CoordinateCache,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """See `ops.group_norm.sparse_group_norm`; there is at least one row."""
    cu_rows, order = plan_group_norm(cache)
    return _normalize(feats, weight, bias, cache.coords.contiguous(), cu_rows, order, num_groups, eps, silu)[0]
