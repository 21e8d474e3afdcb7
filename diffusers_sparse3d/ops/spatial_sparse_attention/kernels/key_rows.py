"""Keys and values in the row orders that the branches need: one launch for all of them.

With a few thousand tokens, a launch takes the host longer than the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from ...whole_tokens import with_whole_tokens
from .common import store_matrix


# Elements that a program holds in registers: few, so that there are many programs.
MOST_ELEMENTS = 2048


class KeyOrders(NamedTuple):
    """Row numbers of keys and values, in the order of each branch: `[N]` or `[M]` int64.

    Attributes:
        window: the tokens grouped by window.
        compressed: the compressed keys grouped by selection block.
        block: the tokens grouped by selection block; None if they are.
    """

    window: Tensor
    compressed: Tensor
    block: Tensor | None


class KeysInOrder(NamedTuple):
    """Keys `[*, H_kv, D]` and values `[*, H_kv, D_v]`, contiguous, in each of the `KeyOrders`."""

    window: tuple[Tensor, Tensor]
    compressed: tuple[Tensor, Tensor]
    block: tuple[Tensor, Tensor]


class KeysAndValues(NamedTuple):
    """Keys and values as the caller has them, whose rows may be apart.

    Attributes:
        key: `[*, H_kv, D]`.
        value: `[*, H_kv, D_v]`.
        key_stride, value_stride: elements from one row to the next.
    """

    key: Tensor
    value: Tensor
    key_stride: int
    value_stride: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> KeysAndValues:
        """Copies tensors with rows that are not contiguous themselves."""
        key, value = with_whole_tokens(key), with_whole_tokens(value)
        return cls(key, value, key.stride(0), value.stride(0))


@triton.jit
def _copy_rows(source, order, target, row, valid, stride, width: tl.constexpr, WIDTH: tl.constexpr):
    """Copies the rows `order[row]` of a source to the rows `row` of a target, where `valid`."""
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < width)[None, :]
    # [ROWS, WIDTH]
    source += tl.load(order + row, mask=valid, other=0)[:, None] * stride + columns[None, :]
    store_matrix(target, row, valid, tl.load(source, mask=mask, other=0.0), width, WIDTH)


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _gather_kernel(
    tokens,  # KeysAndValues of the N tokens
    compressed,  # KeysAndValues of the M compressed keys
    orders,  # KeyOrders
    copies,  # KeysInOrder, written
    counter,  # [1] int32, becomes zero
    num_tokens,  # N
    num_compressed,  # M
    key_width: tl.constexpr,  # elements of a row of keys, H_kv * D
    value_width: tl.constexpr,  # elements of a row of values, H_kv * D_v
    KEY_WIDTH: tl.constexpr,  # `key_width`, padded to a power of two
    VALUE_WIDTH: tl.constexpr,  # `value_width`, padded to a power of two
    ROWS: tl.constexpr,  # rows of a program
):
    """A program copies some rows for one branch: windows, compressed keys, or selection blocks."""
    # [ROWS]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_token, is_compressed = row < num_tokens, row < num_compressed
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(counter, 0)
    if tl.program_id(1) == 0:
        order, keys, values = orders.window, copies.window[0], copies.window[1]
        _copy_rows(tokens.key, order, keys, row, is_token, tokens.key_stride, key_width, KEY_WIDTH)
        _copy_rows(tokens.value, order, values, row, is_token, tokens.value_stride, value_width, VALUE_WIDTH)
    elif tl.program_id(1) == 1:
        order, keys, values = orders.compressed, copies.compressed[0], copies.compressed[1]
        _copy_rows(compressed.key, order, keys, row, is_compressed, compressed.key_stride, key_width, KEY_WIDTH)
        _copy_rows(
            compressed.value, order, values, row, is_compressed, compressed.value_stride, value_width, VALUE_WIDTH
        )
    elif orders.block is not None:
        order, keys, values = orders.block, copies.block[0], copies.block[1]
        _copy_rows(tokens.key, order, keys, row, is_token, tokens.key_stride, key_width, KEY_WIDTH)
        _copy_rows(tokens.value, order, values, row, is_token, tokens.value_stride, value_width, VALUE_WIDTH)


@on_device_of_first_argument
def keys_in_order(
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    orders: KeyOrders,
    counter: Tensor,
) -> KeysInOrder:
    """Keys and values in the order of each branch.

    Args:
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        compressed_key: `[M, H_kv, D]`.
        compressed_value: `[M, H_kv, D_v]`.
        orders: the row numbers.
        counter: `[1]` int32, which becomes zero for a later kernel: a kernel of its own would take longer.
    """
    in_windows = key.new_empty(key.shape), value.new_empty(value.shape)
    in_samples = compressed_key.new_empty(compressed_key.shape), compressed_value.new_empty(compressed_value.shape)
    if orders.block is None:
        in_blocks = key.contiguous(), value.contiguous()
    else:
        in_blocks = key.new_empty(key.shape), value.new_empty(value.shape)
    copies = KeysInOrder(in_windows, in_samples, in_blocks)
    num_tokens, num_compressed = key.shape[0], compressed_key.shape[0]
    key_width, value_width = key.shape[1] * key.shape[2], value.shape[1] * value.shape[2]
    rows = max(1, MOST_ELEMENTS // next_power_of_2(max(key_width, value_width)))
    _gather_kernel[cdiv(max(num_tokens, num_compressed), rows), 2 if orders.block is None else 3](
        KeysAndValues.of(key, value),
        KeysAndValues.of(compressed_key, compressed_value),
        orders,
        copies,
        counter,
        num_tokens,
        num_compressed,
        key_width=key_width,
        value_width=value_width,
        KEY_WIDTH=next_power_of_2(key_width),
        VALUE_WIDTH=next_power_of_2(value_width),
        ROWS=rows,
    )
    return copies
