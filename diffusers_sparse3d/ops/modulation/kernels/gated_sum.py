"""Tokens times the gate of their sample, added to others, in one pass.

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
def _gated_sum_kernel(
    residual,  # [N, C]; None: nothing is added
    values,  # [N, C]
    gate,  # [B, C], rows `gate_stride` values apart
    output,  # [N, C]
    index,  # [N] the sample of each token, `index_stride` values apart; None: equal parts
    index_stride,
    rows_per_sample,  # tokens of a sample where there is no index
    gate_stride,
    num_rows,  # N
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C, padded to a power of two
    ROWS: tl.constexpr,  # tokens of a tile
):
    # [ROWS], [CHANNELS]
    rows, channels = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    valid = rows < num_rows
    # [ROWS, CHANNELS]
    mask = valid[:, None] & (channels < C)[None, :]
    # [ROWS]
    sample = sample_of(index, index_stride, rows, valid, rows_per_sample)
    # [ROWS, CHANNELS]
    total = load_tile(values, rows, C, channels, mask) * load_tile(gate, sample, gate_stride, channels, mask)
    if residual is not None:
        total += load_tile(residual, rows, C, channels, mask)
    store_tile(output, rows, C, channels, total, mask)


@on_device_of_first_argument
def _launch(values: Tensor, residual: Tensor | None, gate: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    num_rows, num_channels = values.shape
    gate = with_whole_rows(gate)
    output = torch.empty_like(values, dtype=dtype)
    tile = tile_of(num_channels)
    _gated_sum_kernel[(cdiv(num_rows, tile["ROWS"]),)](
        residual,
        values,
        gate,
        output,
        *index_of(index, num_rows, gate.shape[0]),
        gate.stride(0),
        num_rows,
        **tile,
    )
    return output


def gated_sum(residual: Tensor, values: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """`residual + gate * values`, `[N, C]` in the dtype of `residual`.

    Args:
        residual, values: `[N, C]`, contiguous, not empty.
        gate: `[B, C]`.
        index: `[N]` integer, the sample of each token; None where samples are equal parts.
    """
    return _launch(values, residual, gate, index, residual.dtype)


def gated_rows(values: Tensor, gate: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`gate * values`, `[N, C]` in `dtype`; arguments as in `gated_sum`."""
    return _launch(values, None, gate, index, dtype)
