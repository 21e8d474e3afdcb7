"""The gradient of tokens under a modulated layer norm; mean and deviation are computed again.

Floor in bytes: 3 N C values (two reads, one write).
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
def _layer_norm_backward_kernel(
    grad_output,  # [N, C]
    hidden_states,  # [N, C]
    scale,  # [B, C], rows `scale_stride` values apart
    grad_hidden_states,  # [N, C]
    statistics,  # [2, N] float32: mean and inverse deviation of each token
    index,  # [N] the sample of each token, `index_stride` values apart; None: equal parts
    index_stride,
    rows_per_sample,  # tokens of a sample where there is no index
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
    # [ROWS]
    mean = tl.sum(values, 1) / C
    # [ROWS, CHANNELS]
    normalized = tl.where(mask, values - mean[:, None], 0.0)
    # [ROWS]
    inverse_deviation = tl.rsqrt(tl.sum(normalized * normalized, 1) / C + eps)
    sample = sample_of(index, index_stride, rows, valid, rows_per_sample)
    # [ROWS, CHANNELS]
    normalized *= inverse_deviation[:, None]
    gradient = load_tile(grad_output, rows, C, channels, mask)
    gradient *= offset + load_tile(scale, sample, scale_stride, channels, mask)
    # [ROWS]
    mean_gradient = tl.sum(gradient, 1) / C
    mean_product = tl.sum(gradient * normalized, 1) / C
    # [ROWS, CHANNELS]
    gradient = (gradient - mean_gradient[:, None] - normalized * mean_product[:, None]) * inverse_deviation[:, None]
    store_tile(grad_hidden_states, rows, C, channels, gradient, mask)
    tl.store(statistics + rows, mean, mask=valid)
    tl.store(statistics + num_rows + rows, inverse_deviation, mask=valid)


@on_device_of_first_argument
def modulated_norm_backward(
    grad_output: Tensor, hidden_states: Tensor, scale: Tensor, index: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradient of the tokens `[N, C]`, and their means and inverse deviations `[2, N]` float32.

    Args:
        grad_output, hidden_states: `[N, C]`, contiguous, not empty.
        scale, index, eps, offset: as in the forward pass.
    """
    num_rows, num_channels = hidden_states.shape
    scale = with_whole_rows(scale)
    grad_hidden_states = torch.empty_like(hidden_states)
    statistics = hidden_states.new_empty(2, num_rows, dtype=torch.float32)
    tile = tile_of(num_channels)
    _layer_norm_backward_kernel[(cdiv(num_rows, tile["ROWS"]),)](
        grad_output,
        hidden_states,
        scale,
        grad_hidden_states,
        statistics,
        *index_of(index, num_rows, scale.shape[0]),
        scale.stride(0),
        num_rows,
        eps,
        offset,
        **tile,
    )
    return grad_hidden_states, statistics
