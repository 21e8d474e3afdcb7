"""The gradients of keys and values in the row orders of the caller, from those in the orders of the branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import Kernel
from .common import store_matrix
from .key_rows import MOST_ELEMENTS, KeyOrders


if TYPE_CHECKING:
    from collections.abc import Sequence


@triton.jit
def _add_rows(total, parts, inverse, row, valid, num_rows, num_parts, width: tl.constexpr, WIDTH: tl.constexpr):
    """Adds rows of each of `[num_parts, num_rows, width]` to `[ROWS, WIDTH]`."""
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < width)[None, :]
    parts += tl.load(inverse + row, mask=valid, other=0)[:, None] * width + columns[None, :]
    # Unrolled, so that loads do not wait for each other.
    for _ in tl.range(0, num_parts, loop_unroll_factor=4):
        total += tl.load(parts, mask=mask, other=0.0)
        parts += num_rows * width
    return total


@triton.jit
def _sum_rows(
    selected,
    block_inverse,
    parts,
    inverse,
    gradient,
    row,
    num_rows,
    num_parts,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Stores the sum of the parts and, if there is one, the gradient of the selection."""
    valid = row < num_rows
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if selected is not None:
        total = _add_rows(total, selected, block_inverse, row, valid, num_rows, 1, width, WIDTH)
    total = _add_rows(total, parts, inverse, row, valid, num_rows, num_parts, width, WIDTH)
    store_matrix(gradient, row, valid, total, width, WIDTH)


@Kernel
@triton.jit
def _gradients_kernel(
    selected_key,
    selected_value,
    window_key,
    window_value,
    compressed_key,
    compressed_value,
    block_inverse,
    window_inverse,
    compressed_inverse,
    grad_key,
    grad_value,
    grad_compressed_key,
    grad_compressed_value,
    num_tokens,
    num_compressed,
    window_parts,
    compressed_parts,
    key_width: tl.constexpr,
    value_width: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    number = tl.program_id(1)
    if number == 0:
        _sum_rows(
            selected_key,
            block_inverse,
            window_key,
            window_inverse,
            grad_key,
            row,
            num_tokens,
            window_parts,
            key_width,
            KEY_WIDTH,
            ROWS,
        )
    elif number == 1:
        _sum_rows(
            selected_value,
            block_inverse,
            window_value,
            window_inverse,
            grad_value,
            row,
            num_tokens,
            window_parts,
            value_width,
            VALUE_WIDTH,
            ROWS,
        )
    elif number == 2:
        _sum_rows(
            None,
            None,
            compressed_key,
            compressed_inverse,
            grad_compressed_key,
            row,
            num_compressed,
            compressed_parts,
            key_width,
            KEY_WIDTH,
            ROWS,
        )
    else:
        _sum_rows(
            None,
            None,
            compressed_value,
            compressed_inverse,
            grad_compressed_value,
            row,
            num_compressed,
            compressed_parts,
            value_width,
            VALUE_WIDTH,
            ROWS,
        )


@on_device_of_first_argument
def key_gradients(
    selected_key: Tensor,
    selected_value: Tensor,
    window: Sequence[Tensor],
    compressed: Sequence[Tensor],
    inverses: KeyOrders,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of keys and values in the row orders of the caller.

    Args:
        selected_key: `[N, H_kv, D]` float32, gradient of the selection, in blocks.
        selected_value: `[N, H_kv, D_v]`, the same.
        window: the same two of windows, as parts `[P, N, ...]` that are added up.
        compressed: those of the compressed keys and values, as parts `[P, M, ...]`.
        inverses: of the orders; `block` is not None.
        dtype: of the results.

    Returns:
        Gradients of key, value, compressed key and compressed value.
    """
    selected = selected_key, selected_value
    gradients = [part.new_empty(part.shape[-3:], dtype=dtype) for part in (*selected, *compressed)]
    num_tokens, num_compressed = selected_key.shape[0], compressed[0].shape[1]
    key_width, value_width = (part.shape[1] * part.shape[2] for part in selected)
    rows = max(1, MOST_ELEMENTS // next_power_of_2(max(key_width, value_width)))
    _gradients_kernel[cdiv(max(num_tokens, num_compressed), rows), 4](
        *selected,
        *window,
        *compressed,
        inverses.block,
        inverses.window,
        inverses.compressed,
        *gradients,
        num_tokens,
        num_compressed,
        window[0].shape[0],
        compressed[0].shape[0],
        key_width=key_width,
        value_width=value_width,
        KEY_WIDTH=next_power_of_2(key_width),
        VALUE_WIDTH=next_power_of_2(value_width),
        ROWS=rows,
    )
    return tuple(gradients)
