"""The weights with which the children of a voxel meet the parents around it, see `reference.corner_weight`.

One launch, and one for the gradient, where the sums axis by axis of the reference take dozens of small operations,
which a GPU waits for: some 17 forward and 40 backward in each layer of the decoder.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import NUM_OFFSETS


_COLUMNS = 128
# The offsets of a 3x3x3 cube, as a power of two.
_OFFSETS = 32


@triton.jit
def _corner_of(offsets, children):
    """The corners cx + 2 cy + 4 cz at which children 4 bx + 2 by + bz meet their neighbours at offsets x + 3 y + 9 z.

    Along an axis, offsets are 0 to 2, and a lower child (0) finds only offset 0 in the parent before, an upper child
    (1) only offset 2 in the parent after.
    """
    x = (offsets % 3 > (children >> 2 & 1)).to(tl.int32)
    y = (offsets // 3 % 3 > (children >> 1 & 1)).to(tl.int32)
    z = (offsets // 9 > (children & 1)).to(tl.int32)
    return x + 2 * y + 4 * z


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _corners_kernel(weight, corners, num_columns, COLUMNS: tl.constexpr, OFFSETS: tl.constexpr):
    """The weights of one child, of some columns.

    Args:
        weight: `[27, num_columns]`.
        corners: `[8 children, 8 corners, num_columns]`, written.
        num_columns: input times output channels.
        COLUMNS: columns of a program.
        OFFSETS: 32.
    """
    child = tl.program_id(1)
    # [COLUMNS]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = columns < num_columns
    # [OFFSETS, 1]
    offsets = tl.arange(0, OFFSETS)[:, None]
    met = _corner_of(offsets, child)
    # [OFFSETS, COLUMNS]
    places = offsets.to(tl.int64) * num_columns + columns[None, :]
    values = tl.load(weight + places, mask=(offsets < 27) & valid[None, :], other=0.0).to(tl.float32)
    for corner in range(8):
        # [COLUMNS]
        total = tl.sum(tl.where(met == corner, values, 0.0), 0)
        row = (8 * child + corner).to(tl.int64) * num_columns
        tl.store(corners + row + columns, total.to(corners.dtype.element_ty), mask=valid)


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _corners_gradient_kernel(grad_corners, grad_weight, num_columns, COLUMNS: tl.constexpr):
    """The gradient of the weights at one offset, of some columns: each child meets the offset at one corner.

    Args:
        grad_corners: `[8 children, 8 corners, num_columns]`.
        grad_weight: `[27, num_columns]`, written.
        num_columns: input times output channels.
        COLUMNS: columns of a program.
    """
    offset = tl.program_id(1)
    # [COLUMNS]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = columns < num_columns
    # [8, 1]
    children = tl.arange(0, 8)[:, None]
    rows = 8 * children + _corner_of(offset, children)
    # [8, COLUMNS]
    places = rows.to(tl.int64) * num_columns + columns[None, :]
    values = tl.load(grad_corners + places, mask=valid[None, :], other=0.0).to(tl.float32)
    row = offset.to(tl.int64) * num_columns
    tl.store(grad_weight + row + columns, tl.sum(values, 0).to(grad_weight.dtype.element_ty), mask=valid)


@on_device_of_first_argument
def make_corners(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous weights `[27, Cin, Cout]` -> `[8 children, 8 corners, Cin, Cout]`, summed in float32, in `dtype`."""
    corners = weight.new_empty(8, 8, *weight.shape[1:], dtype=dtype)
    if num_columns := weight.shape[1:].numel():
        grid = cdiv(num_columns, _COLUMNS), 8
        _corners_kernel[grid](weight, corners, num_columns, COLUMNS=_COLUMNS, OFFSETS=_OFFSETS)
    return corners


@on_device_of_first_argument
def corners_gradient(grad_corners: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the weights in `dtype`, from that of `make_corners`, contiguous."""
    grad_weight = grad_corners.new_empty(NUM_OFFSETS, *grad_corners.shape[2:], dtype=dtype)
    if num_columns := grad_corners.shape[2:].numel():
        grid = cdiv(num_columns, _COLUMNS), NUM_OFFSETS
        _corners_gradient_kernel[grid](grad_corners, grad_weight, num_columns, COLUMNS=_COLUMNS)
    return grad_weight
