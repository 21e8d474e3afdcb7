"""Layer norm with the shift and scale of each token's sample, in one pass.

Floor in bytes: 2 N C values (read, write).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .rows import index_of, load_tile, sample_of, store_tile, tile_of, with_whole_rows


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _layer_norm_kernel(
    hidden_states,  # [N, C]
    shift,  # [B, C], rows `shift_stride` values apart
    scale,  # [B, C], rows `scale_stride` values apart
    output,  # [N, C]
    index,  # [N] the sample of each token, `index_stride` values apart; None: equal parts
    index_stride,
    rows_per_sample,  # tokens of a sample where there is no index
    shift_stride,
    scale_stride,
    num_rows,  # N
    eps,
    offset,  # added to the scale
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C, padded to a power of two
    ROWS: tl.constexpr,  # tokens of a tile
):
    # [ROWS], [CHANNELS]
    rows, channels = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    valid = rows < num_rows
    # [ROWS, CHANNELS]
    mask = valid[:, None] & (channels < C)[None, :]
    values = load_tile(hidden_states, rows, C, channels, mask)
    # [ROWS, 1]
    mean = tl.sum(values, 1)[:, None] / C
    # [ROWS, CHANNELS]
    centred = tl.where(mask, values - mean, 0.0)
    # [ROWS, 1]
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / C + eps)
    # [ROWS]
    sample = sample_of(index, index_stride, rows, valid, rows_per_sample)
    # [ROWS, CHANNELS]
    scales = load_tile(scale, sample, scale_stride, channels, mask)
    shifts = load_tile(shift, sample, shift_stride, channels, mask)
    store_tile(output, rows, C, channels, centred * inverse_deviation * (offset + scales) + shifts, mask)


@on_device_of_first_argument
def modulated_norm(
    hidden_states: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float, offset: float
) -> Tensor:
    """Normalised and modulated tokens `[N, C]`.

    Args:
        hidden_states: `[N, C]`, contiguous, not empty.
        shift, scale: `[B, C]`.
        index: `[N]` integer, the sample of each token; None where samples are equal parts.
        eps: added to the variance.
        offset: added to the scale.
    """
    num_rows, num_channels = hidden_states.shape
    shift, scale = with_whole_rows(shift), with_whole_rows(scale)
    output = torch.empty_like(hidden_states)
    tile = tile_of(num_channels)
    _layer_norm_kernel[(cdiv(num_rows, tile["ROWS"]),)](
        hidden_states,
        shift,
        scale,
        output,
        *index_of(index, num_rows, scale.shape[0]),
        shift.stride(0),
        scale.stride(0),
        num_rows,
        eps,
        offset,
        **tile,
    )
    return output
