"""The gradients of keys and values in the row orders of the caller, from those in the orders of the branches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .arguments import KeyGradients
from .common import store_matrix
from .key_rows import MOST_ELEMENTS, KeyOrders


@triton.jit
def _add_rows(total, parts, inverse, row, num_rows, num_parts, width: tl.constexpr, WIDTH: tl.constexpr):
    """Adds some rows of all parts of a gradient.

    Args:
        total: `[ROWS, WIDTH]` float32, to which they are added.
        parts: `[num_parts, num_rows, width]` float32.
        inverse: `[num_rows]` int64, where each row is in a part.
        row: `[ROWS]` int64, the rows.
        num_rows, num_parts, width: the shape of `parts`; `WIDTH` is `width` padded to a power of two.
    """
    valid = row < num_rows
    columns = tl.arange(0, WIDTH)
    # [ROWS, WIDTH]
    mask = valid[:, None] & (columns < width)[None, :]
    parts += tl.load(inverse + row, mask=valid, other=0)[:, None] * width + columns[None, :]
    # Unrolled, so that loads do not wait for each other.
    for _ in tl.range(0, num_parts, loop_unroll_factor=4):
        # [ROWS, WIDTH]
        total += tl.load(parts, mask=mask, other=0.0)
        parts += num_rows * width
    return total


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _gradients_kernel(
    selected,  # KeyGradients [N, H_kv, *] float32, grouped by selection block
    window,  # KeyGradients [window_parts, N, H_kv, *] float32, grouped by window
    compressed,  # KeyGradients [compressed_parts, M, H_kv, *] float32, compressed keys grouped by selection block
    inverses,  # KeyOrders: the row of each token or compressed key in these orders
    gradients,  # KeyGradients [N, H_kv, *], written
    grad_compressed,  # KeyGradients [M, H_kv, *], written
    num_tokens,  # N
    num_compressed,  # M
    window_parts,  # parts of `window`
    compressed_parts,  # parts of `compressed`
    key_width: tl.constexpr,  # elements of a row of keys, H_kv * D
    value_width: tl.constexpr,  # elements of a row of values, H_kv * D_v
    KEY_WIDTH: tl.constexpr,  # `key_width`, padded to a power of two
    VALUE_WIDTH: tl.constexpr,  # `value_width`, padded to a power of two
    ROWS: tl.constexpr,  # rows of a program
):
    """A program has some rows of one of four gradients: of keys, values, compressed keys or compressed values."""
    # [ROWS]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    number = tl.program_id(1)
    # The names differ, since triton wants one shape of a name in all branches.
    if number == 0:
        # [ROWS, KEY_WIDTH]
        keys = tl.zeros((ROWS, KEY_WIDTH), tl.float32)
        keys = _add_rows(keys, selected.key, inverses.block, row, num_tokens, 1, key_width, KEY_WIDTH)
        keys = _add_rows(keys, window.key, inverses.window, row, num_tokens, window_parts, key_width, KEY_WIDTH)
        store_matrix(gradients.key, row, row < num_tokens, keys, key_width, KEY_WIDTH)
    elif number == 1:
        # [ROWS, VALUE_WIDTH]
        values = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
        values = _add_rows(values, selected.value, inverses.block, row, num_tokens, 1, value_width, VALUE_WIDTH)
        values = _add_rows(
            values, window.value, inverses.window, row, num_tokens, window_parts, value_width, VALUE_WIDTH
        )
        store_matrix(gradients.value, row, row < num_tokens, values, value_width, VALUE_WIDTH)
    elif number == 2:
        # [ROWS, KEY_WIDTH]
        keys = tl.zeros((ROWS, KEY_WIDTH), tl.float32)
        keys = _add_rows(
            keys, compressed.key, inverses.compressed, row, num_compressed, compressed_parts, key_width, KEY_WIDTH
        )
        store_matrix(grad_compressed.key, row, row < num_compressed, keys, key_width, KEY_WIDTH)
    else:
        # [ROWS, VALUE_WIDTH]
        values = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
        inverse = inverses.compressed
        values = _add_rows(
            values, compressed.value, inverse, row, num_compressed, compressed_parts, value_width, VALUE_WIDTH
        )
        store_matrix(grad_compressed.value, row, row < num_compressed, values, value_width, VALUE_WIDTH)


@on_device_of_first_argument
def key_gradients(
    selected_key: Tensor,
    selected_value: Tensor,
    window: KeyGradients,
    compressed: KeyGradients,
    inverses: KeyOrders,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of keys and values in the row orders of the caller.

    Args:
        selected_key: `[N, H_kv, D]` float32, the gradient of selected attention, grouped by selection block.
        selected_value: `[N, H_kv, D_v]` float32, the same.
        window: the gradients of window attention, float32, as parts `[P, N, H_kv, *]` that are added up.
        compressed: the gradients of compressed attention, float32, as parts `[P, M, H_kv, *]` that are added up.
        inverses: the row of each token or compressed key in these orders; `block` is not None.
        dtype: of the results.

    Returns:
        Gradients of key `[N, H_kv, D]`, value `[N, H_kv, D_v]`, compressed key `[M, H_kv, D]` and compressed value
        `[M, H_kv, D_v]`.
    """
    selected = KeyGradients(selected_key, selected_value)
    gradients = KeyGradients(*(part.new_empty(part.shape, dtype=dtype) for part in selected))
    grad_compressed = KeyGradients(*(part.new_empty(part.shape[1:], dtype=dtype) for part in compressed))
    num_tokens, num_compressed = selected.key.shape[0], compressed.key.shape[1]
    key_width, value_width = (part.shape[1] * part.shape[2] for part in selected)
    rows = max(1, MOST_ELEMENTS // next_power_of_2(max(key_width, value_width)))
    _gradients_kernel[cdiv(max(num_tokens, num_compressed), rows), 4](
        selected,
        window,
        compressed,
        inverses,
        gradients,
        grad_compressed,
        num_tokens,
        num_compressed,
        window.key.shape[0],
        compressed.key.shape[0],
        key_width=key_width,
        value_width=value_width,
        KEY_WIDTH=next_power_of_2(key_width),
        VALUE_WIDTH=next_power_of_2(value_width),
        ROWS=rows,
    )
    return *gradients, *grad_compressed
