"""Keys and values in the orders that the branches need, and their gradients back from these.

Each is one launch for all branches: with a few thousand tokens, a launch takes the host longer than the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import Kernel
from .common import store_matrix


# Elements that a program has in registers: few, so that there are many programs.
MOST_ELEMENTS = 2048


@triton.jit
def _copy_rows(source, order, target, row, valid, stride, width: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < width)[None, :]
    source += tl.load(order + row, mask=valid, other=0)[:, None] * stride + columns[None, :]
    store_matrix(target, row, valid, tl.load(source, mask=mask, other=0.0), width, WIDTH)


@Kernel
@triton.jit
def _gather_kernel(
    key,
    value,
    compressed_key,
    compressed_value,
    window_order,
    compressed_order,
    block_order,
    window_keys,
    window_values,
    compressed_keys,
    compressed_values,
    block_keys,
    block_values,
    counter,
    num_tokens,
    num_compressed,
    key_stride,
    value_stride,
    compressed_key_stride,
    compressed_value_stride,
    key_width: tl.constexpr,
    value_width: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(counter, 0)
    if tl.program_id(1) == 0:
        _copy_rows(key, window_order, window_keys, row, row < num_tokens, key_stride, key_width, KEY_WIDTH)
        _copy_rows(value, window_order, window_values, row, row < num_tokens, value_stride, value_width, VALUE_WIDTH)
    elif tl.program_id(1) == 1:
        valid = row < num_compressed
        _copy_rows(
            compressed_key, compressed_order, compressed_keys, row, valid, compressed_key_stride, key_width, KEY_WIDTH
        )
        _copy_rows(
            compressed_value,
            compressed_order,
            compressed_values,
            row,
            valid,
            compressed_value_stride,
            value_width,
            VALUE_WIDTH,
        )
    elif block_order is not None:
        _copy_rows(key, block_order, block_keys, row, row < num_tokens, key_stride, key_width, KEY_WIDTH)
        _copy_rows(value, block_order, block_values, row, row < num_tokens, value_stride, value_width, VALUE_WIDTH)


class KeyOrders(NamedTuple):
    """Rows of keys and values, `[N]` and `[M]` int64.

    Attributes:
        window: the tokens in windows.
        compressed: the compressed keys in selection blocks.
        block: the tokens in selection blocks; None if they are.
    """

    window: Tensor
    compressed: Tensor
    block: Tensor | None


class KeysInOrder(NamedTuple):
    """Keys `[*, H_kv, D]` and values `[*, H_kv, D_v]`, contiguous, in each of the `KeyOrders`."""

    window: tuple[Tensor, Tensor]
    compressed: tuple[Tensor, Tensor]
    block: tuple[Tensor, Tensor]


def _with_whole_rows(tensor: Tensor) -> Tensor:
    """`[N, H, D]` whose rows are contiguous; they may be apart, as of a projection to keys and values at once."""
    _, num_heads, dim = tensor.shape
    _, head_stride, stride = tensor.stride()
    contiguous = (stride == 1 or dim == 1) and (head_stride == dim or num_heads == 1)
    return tensor if contiguous else tensor.contiguous()


@on_device_of_first_argument
def keys_in_order(
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    orders: KeyOrders,
    counter: Tensor,
) -> KeysInOrder:
    """
    Args:
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        compressed_key: `[M, H_kv, D]`.
        compressed_value: `[M, H_kv, D_v]`.
        orders: of the rows.
        counter: `[1]` int32, becomes zero: a kernel of its own would take longer.
    """
    tensors = [_with_whole_rows(tensor) for tensor in (key, value, compressed_key, compressed_value)]
    in_windows = key.new_empty(key.shape), value.new_empty(value.shape)
    compressed = compressed_key.new_empty(compressed_key.shape), compressed_value.new_empty(compressed_value.shape)
    if orders.block is None:
        in_blocks = key.contiguous(), value.contiguous()
    else:
        in_blocks = key.new_empty(key.shape), value.new_empty(value.shape)
    num_tokens, num_compressed = key.shape[0], compressed_key.shape[0]
    key_width, value_width = key.shape[1] * key.shape[2], value.shape[1] * value.shape[2]
    rows = max(1, MOST_ELEMENTS // next_power_of_2(max(key_width, value_width)))
    _gather_kernel[cdiv(max(num_tokens, num_compressed), rows), 2 if orders.block is None else 3](
        *tensors,
        *orders,
        *in_windows,
        *compressed,
        *in_blocks,
        counter,
        num_tokens,
        num_compressed,
        *(tensor.stride(0) for tensor in tensors),
        key_width=key_width,
        value_width=value_width,
        KEY_WIDTH=next_power_of_2(key_width),
        VALUE_WIDTH=next_power_of_2(value_width),
        ROWS=rows,
    )
    return KeysInOrder(in_windows, compressed, in_blocks)
