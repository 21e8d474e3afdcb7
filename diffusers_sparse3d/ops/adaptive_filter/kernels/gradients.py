"""Gradients of the adaptive filter.

With the filtered value o = sum_t taps_t x_t / n and n = sum_t |taps_t|, the gradient g of o gives

    taps_t:  (g x_t - (g o) sign(taps_t)) / n, without the second term where n was too small to divide by;
    x:       what each neighbour's taps have passed on of g / n.

The first kernel has a program for the voxels of `taps` and leaves g / n, the second one for those of x, so that
nothing is added by several programs. Floor in bytes: 2 x 27 + 4 C values and twice C in float32 a voxel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel
from ..reference import NUM_TAPS, SMALLEST_NORM
from .neighbour_sum import neighbours_at_tap, tile_of, voxels_of_tile, with_channels_last


@Kernel
@triton.jit
def _tap_gradient_kernel(
    grad_output,  # [B * X * Y * Z, C], rows `grad_stride` values apart
    hidden_states,  # [B * X * Y * Z, C], rows `row_stride` values apart
    taps,  # [B * X * Y * Z, NUM_TAPS], rows `tap_stride` values apart
    output,  # [B * X * Y * Z, C]
    scaled,  # [B * X * Y * Z, C] float32: the gradient of the output over the norm of the taps
    grad_taps,  # [B * X * Y * Z, NUM_TAPS]
    grad_stride,
    row_stride,
    tap_stride,
    num_rows,  # B * X * Y * Z
    size_x,  # X
    size_y,  # Y
    size_z,  # Z
    smallest_norm,  # the smallest divisor
    C: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    ROWS: tl.constexpr,  # voxels of a tile
    CHANNELS: tl.constexpr,  # C, padded to a power of two
):
    rows, x, y, z, valid = voxels_of_tile(num_rows, size_x, size_y, size_z, ROWS)
    # [ROWS]
    norm = tl.zeros((ROWS,), tl.float32)
    for tap in tl.static_range(NUM_TAPS):
        norm += tl.abs(tl.load(taps + rows * tap_stride + tap, mask=valid, other=0.0).to(tl.float32))
    # [CHANNELS]
    channels = tl.arange(0, CHANNELS)
    # [ROWS, CHANNELS]
    mask = valid[:, None] & (channels < C)[None, :]
    gradient = tl.load(grad_output + rows[:, None] * grad_stride + channels[None, :], mask=mask, other=0.0)
    gradient = gradient.to(tl.float32) / tl.maximum(norm, smallest_norm)[:, None]
    tl.store(scaled + rows[:, None] * C + channels[None, :], gradient, mask=mask)
    values = tl.load(output + rows[:, None] * C + channels[None, :], mask=mask, other=0.0)
    # [ROWS]
    of_norm = tl.where(norm >= smallest_norm, tl.sum(gradient * values.to(tl.float32), 1), 0.0)
    for tap in tl.static_range(NUM_TAPS):
        neighbours, inside = neighbours_at_tap(rows, x, y, z, valid, size_x, size_y, size_z, tap, 1)
        # [ROWS, CHANNELS]
        values = tl.load(
            hidden_states + neighbours[:, None] * row_stride + channels[None, :],
            mask=inside[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        # [ROWS]
        weights = tl.load(taps + rows * tap_stride + tap, mask=valid, other=0.0).to(tl.float32)
        sign = tl.where(weights > 0, 1.0, tl.where(weights < 0, -1.0, 0.0))
        of_tap = tl.sum(gradient * values.to(tl.float32), 1) - sign * of_norm
        tl.store(grad_taps + rows * NUM_TAPS + tap, of_tap.to(grad_taps.dtype.element_ty), mask=valid)


@Kernel
@triton.jit
def _value_gradient_kernel(
    scaled,  # [B * X * Y * Z, C] float32
    taps,  # [B * X * Y * Z, NUM_TAPS], rows `tap_stride` values apart
    grad_hidden_states,  # [B * X * Y * Z, C]
    tap_stride,
    num_rows,  # B * X * Y * Z
    size_x,  # X
    size_y,  # Y
    size_z,  # Z
    C: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    ROWS: tl.constexpr,  # voxels of a tile
    CHANNELS: tl.constexpr,  # C, padded to a power of two
):
    rows, x, y, z, valid = voxels_of_tile(num_rows, size_x, size_y, size_z, ROWS)
    # [CHANNELS]
    channels = tl.arange(0, CHANNELS)
    # [ROWS, CHANNELS]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tap in tl.static_range(NUM_TAPS):
        # The voxel that has this one as its neighbour of the tap.
        sources, inside = neighbours_at_tap(rows, x, y, z, valid, size_x, size_y, size_z, tap, -1)
        # [ROWS]
        weights = tl.load(taps + sources * tap_stride + tap, mask=inside, other=0.0).to(tl.float32)
        # [ROWS, CHANNELS]
        gradient = tl.load(
            scaled + sources[:, None] * C + channels[None, :],
            mask=inside[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        total += weights[:, None] * gradient
    places = grad_hidden_states + rows[:, None] * C + channels[None, :]
    mask = valid[:, None] & (channels < C)[None, :]
    tl.store(places, total.to(grad_hidden_states.dtype.element_ty), mask=mask)


@on_device_of_first_argument
def filter_gradients(
    grad_output: Tensor, hidden_states: Tensor, taps: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `hidden_states` and `taps`, in the memory format `torch.channels_last_3d`.

    Args:
        grad_output: `[B, C, X, Y, Z]`, of the filtered values.
        hidden_states: `[B, C, X, Y, Z]`, not empty.
        taps: `[B, 27, X, Y, Z]`.
        output: `[B, C, X, Y, Z]`, the filtered values, from `neighbour_sum`.
    """
    batch_size, channels, *sizes = hidden_states.shape
    grad_output, hidden_states, taps = map(with_channels_last, (grad_output, hidden_states, taps))
    scaled = hidden_states.new_empty(batch_size, *sizes, channels, dtype=torch.float32)
    grad_hidden_states = hidden_states.new_empty(batch_size, *sizes, channels)
    grad_taps = taps.new_empty(batch_size, *sizes, NUM_TAPS)
    num_rows = batch_size * sizes[0] * sizes[1] * sizes[2]
    tile = tile_of(channels)
    grid = (cdiv(num_rows, tile["ROWS"]),)
    strides = grad_output.stride(4), hidden_states.stride(4), taps.stride(4)
    tensors = grad_output, hidden_states, taps, output, scaled, grad_taps
    _tap_gradient_kernel[grid](*tensors, *strides, num_rows, *sizes, SMALLEST_NORM, **tile)
    _value_gradient_kernel[grid](scaled, taps, grad_hidden_states, taps.stride(4), num_rows, *sizes, **tile)
    return grad_hidden_states.movedim(-1, 1), grad_taps.movedim(-1, 1)
