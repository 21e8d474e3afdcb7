"""Sums over the tokens of each sample: the gradients of shift, scale and gate.

The tokens of a sample are cut into parts; a program adds up a part and some of the channels, and PyTorch adds up the
parts. Nothing is added by atomics, so the result is always the same.

Floor in bytes: 2 N C values (two reads).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel


# Channels and tokens of a tile, and parts of a sample at most.
_CHANNELS = 128
_ROWS = 32
_MOST_PARTS = 256


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _sample_sums_kernel(
    gradient,  # [N, C]
    values,  # [N, C]
    statistics,  # [2, N] float32, mean and inverse deviation that `values` are normalised by; None: they are not
    sums,  # [1 or 2, B, PARTS, C] float32: of the products, and of the gradient itself
    cu_rows,  # [B + 1] where each sample starts in `order`; None: equal parts
    order,  # [N] the tokens grouped by sample; None: they are
    num_rows,  # N
    rows_per_sample,  # tokens of a sample where there is no `cu_rows`
    plain_offset,  # values from the sums of products to those of the gradient
    C: tl.constexpr,
    PARTS: tl.constexpr,  # parts of a sample
    PLAIN: tl.constexpr,  # whether the sums of the gradient itself are wanted
    ROWS: tl.constexpr,  # tokens of a tile
    CHANNELS: tl.constexpr,  # channels of a tile
):
    sample, part = tl.program_id(0), tl.program_id(1)
    # [CHANNELS]
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < C
    if cu_rows is None:
        first, last = sample * rows_per_sample, (sample + 1) * rows_per_sample
    else:
        first, last = tl.load(cu_rows + sample), tl.load(cu_rows + sample + 1)
    share = tl.cdiv(last - first, PARTS)
    start = tl.minimum(first + part * share, last)
    # [ROWS, CHANNELS]
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    gradients = tl.zeros((ROWS, CHANNELS), tl.float32)
    end = tl.minimum(start + share, last)
    for begin in range(start, end, ROWS):
        # [ROWS]
        places = begin + tl.arange(0, ROWS)
        valid = places < end
        rows = places if order is None else tl.load(order + places, mask=valid, other=0)
        # [ROWS, CHANNELS]
        mask = valid[:, None] & is_channel[None, :]
        pointers = rows.to(tl.int64)[:, None] * C + channels[None, :]
        tile = tl.load(values + pointers, mask=mask, other=0.0).to(tl.float32)
        if statistics is not None:
            mean = tl.load(statistics + rows, mask=valid, other=0.0)
            inverse_deviation = tl.load(statistics + num_rows + rows, mask=valid, other=0.0)
            tile = (tile - mean[:, None]) * inverse_deviation[:, None]
        gradient_tile = tl.load(gradient + pointers, mask=mask, other=0.0).to(tl.float32)
        products += gradient_tile * tile
        if PLAIN:
            gradients += gradient_tile
    sums += (sample * PARTS + part).to(tl.int64) * C
    tl.store(sums + channels, tl.sum(products, 0), mask=is_channel)
    if PLAIN:
        tl.store(sums + plain_offset + channels, tl.sum(gradients, 0), mask=is_channel)


@on_device_of_first_argument
def sample_sums(
    gradient: Tensor,
    values: Tensor,
    statistics: Tensor | None,
    batch_size: int,
    cu_rows: Tensor | None,
    order: Tensor | None,
    dtype: torch.dtype,
    plain: bool,
) -> tuple[Tensor, ...]:
    """Sums over the tokens of each sample, `[B, C]` in `dtype`.

    Args:
        gradient, values: `[N, C]`, contiguous, not empty.
        statistics: `[2, N]` float32, what `values` are normalised by; None if they are not.
        batch_size: B.
        cu_rows, order: as in `SampleRows`.
        dtype: of the result.
        plain: whether the sums of the gradient itself are wanted.

    Returns:
        With `plain` the sums of `gradient`, and always the sums of `gradient` times the (normalised) `values`.
    """
    num_rows, num_channels = values.shape
    channel_tiles = cdiv(num_channels, _CHANNELS)
    parts = cdiv(4 * num_multiprocessors(values.device), batch_size * channel_tiles)
    parts = next_power_of_2(min(parts, cdiv(num_rows, _ROWS), _MOST_PARTS))
    sums = values.new_empty(1 + plain, batch_size, parts, num_channels, dtype=torch.float32)
    _sample_sums_kernel[batch_size, parts, channel_tiles](
        gradient,
        values,
        statistics,
        sums,
        cu_rows,
        order,
        num_rows,
        num_rows // batch_size,
        sums.stride(0),
        C=num_channels,
        PARTS=parts,
        PLAIN=plain,
        ROWS=_ROWS,
        CHANNELS=_CHANNELS,
    )
    # The gradient's own sums first. Summed one by one: results of an operator may not share memory.
    return tuple(part_sums.sum(1).to(dtype) for part_sums in reversed(sums.unbind(0)))
