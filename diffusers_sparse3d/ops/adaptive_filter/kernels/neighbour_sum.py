"""Weighted sums over the 27 neighbours of every voxel, with weights of its own.

Floor in bytes: 27 taps and C values read, C values written a voxel. The values of neighbours and the taps come from
the cache after their first use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import Kernel
from ..reference import NUM_TAPS, SMALLEST_NORM


# Values of a tile.
_TILE_VALUES = 2048
_MOST_ROWS = 256


@triton.jit
def voxels_of_tile(num_rows, size_x, size_y, size_z, ROWS: tl.constexpr):
    """The voxels of a program: their rows `[ROWS]` int64, their places x, y and z, and which of them there are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z, y, x = rows % size_z, rows // size_z % size_y, rows // (size_z * size_y) % size_x
    return rows.to(tl.int64), x, y, z, rows < num_rows


@triton.jit
def neighbours_at_tap(rows, x, y, z, valid, size_x, size_y, size_z, tap: tl.constexpr, SIGN: tl.constexpr):
    """The neighbours of voxels at `SIGN` times the offset of a tap, `[ROWS]`, and which of them are in the patch."""
    dx, dy, dz = SIGN * (tap // 9 - 1), SIGN * (tap // 3 % 3 - 1), SIGN * (tap % 3 - 1)
    inside = (x + dx >= 0) & (x + dx < size_x) & (y + dy >= 0) & (y + dy < size_y)
    inside = inside & (z + dz >= 0) & (z + dz < size_z) & valid
    return rows + (dx * size_y + dy) * size_z + dz, inside


@Kernel
@triton.jit
def _neighbour_sum_kernel(
    hidden_states,  # [B * X * Y * Z, C], rows `row_stride` values apart
    taps,  # [B * X * Y * Z, NUM_TAPS], rows `tap_stride` values apart
    output,  # [B * X * Y * Z, C]
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
    # [CHANNELS]
    channels = tl.arange(0, CHANNELS)
    # [ROWS, CHANNELS]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    # [ROWS]
    norm = tl.zeros((ROWS,), tl.float32)
    for tap in tl.static_range(NUM_TAPS):
        # [ROWS]
        weights = tl.load(taps + rows * tap_stride + tap, mask=valid, other=0.0).to(tl.float32)
        norm += tl.abs(weights)
        neighbours, inside = neighbours_at_tap(rows, x, y, z, valid, size_x, size_y, size_z, tap, 1)
        # [ROWS, CHANNELS]
        values = tl.load(
            hidden_states + neighbours[:, None] * row_stride + channels[None, :],
            mask=inside[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        total += weights[:, None] * values.to(tl.float32)
    total /= tl.maximum(norm, smallest_norm)[:, None]
    places = output + rows[:, None] * C + channels[None, :]
    tl.store(places, total.to(output.dtype.element_ty), mask=valid[:, None] & (channels < C)[None, :])


def with_channels_last(tensor: Tensor) -> Tensor:
    """`[B, C, X, Y, Z]` whose voxels are rows of C consecutive values, a constant distance apart in memory."""
    _, channels, size_x, size_y, size_z = tensor.shape
    stride_b, stride_c, stride_x, stride_y, stride_z = tensor.stride()
    is_row = stride_c == 1 or channels == 1
    # The first channels of a wider tensor are fine too.
    is_apart = (stride_y, stride_x) == (stride_z * size_z, stride_y * size_y)
    if is_row and is_apart and (stride_b == stride_x * size_x or tensor.shape[0] == 1):
        return tensor
    # Not by the memory format, which leaves the stride of an axis of size 1 as it is: it may be that of all rows here.
    return tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def tile_of(channels: int) -> dict[str, int]:
    """The compile-time parameters of kernels on tiles of voxels with so many channels."""
    padded = next_power_of_2(channels)
    rows = max(1, min(_MOST_ROWS, _TILE_VALUES // padded))
    return {"C": channels, "NUM_TAPS": NUM_TAPS, "ROWS": rows, "CHANNELS": padded}


@on_device_of_first_argument
def neighbour_sum(hidden_states: Tensor, taps: Tensor) -> Tensor:
    """The filtered values `[B, C, X, Y, Z]`, in the memory format `torch.channels_last_3d`.

    Args:
        hidden_states: `[B, C, X, Y, Z]`, not empty.
        taps: `[B, 27, X, Y, Z]`.
    """
    batch_size, channels, *sizes = hidden_states.shape
    hidden_states, taps = with_channels_last(hidden_states), with_channels_last(taps)
    output = hidden_states.new_empty(batch_size, *sizes, channels).movedim(-1, 1)
    num_rows = batch_size * sizes[0] * sizes[1] * sizes[2]
    tile = tile_of(channels)
    _neighbour_sum_kernel[(cdiv(num_rows, tile["ROWS"]),)](
        hidden_states,
        taps,
        output,
        hidden_states.stride(4),
        taps.stride(4),
        num_rows,
        *sizes,
        SMALLEST_NORM,
        **tile,
    )
    return output
