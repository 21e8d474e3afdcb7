"""Gradient of the features of mean pooling."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import make_grid, make_sizes


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _gradient_kernel(grad_output, grad_feats, parents, starts, num_rows, sizes):
    """A tile of the gradient of the features.

    Args:
        grad_output: `[M, CHANNELS]`, gradient of the output.
        grad_feats: `[N, CHANNELS]`, written.
        parents: `[N]` int32, the coarse row of each row.
        starts: `[M + 1]` int32; the difference of neighbouring entries is the number of children.
        num_rows: N.
        sizes: `Sizes`.
    """
    CHANNELS: tl.constexpr = sizes.CHANNELS
    # [ROWS]
    rows = tl.program_id(0) * sizes.ROWS + tl.arange(0, sizes.ROWS)
    valid = rows < num_rows
    parent = tl.load(parents + rows, mask=valid, other=0)
    count = tl.load(starts + parent + 1) - tl.load(starts + parent)
    # [1, COLUMNS]
    channels = (tl.program_id(1) * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS))[None, :]
    # [ROWS, COLUMNS]
    mask = valid[:, None] & (channels < CHANNELS)
    places = (parent.to(tl.int64) * CHANNELS)[:, None] + channels
    gradient = tl.load(grad_output + places, mask=mask, other=0.0).to(tl.float32)
    gradient /= (count + sizes.EXTRA).to(tl.float32)[:, None]
    places = (rows.to(tl.int64) * CHANNELS)[:, None] + channels
    tl.store(grad_feats + places, gradient.to(grad_feats.dtype.element_ty), mask=mask)


@on_device_of_first_argument
def mean_pool_gradient(grad_output: Tensor, parents: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    """`grad_output [M, C]`, contiguous, with `parents` and `starts` of `plan_pooling` -> `[N, C]`."""
    num_rows, num_channels = len(parents), grad_output.shape[1]
    grad_feats = grad_output.new_empty(num_rows, num_channels)
    sizes = make_sizes(num_channels, exact_mean)
    _gradient_kernel[make_grid(num_rows, sizes)](grad_output, grad_feats, parents, starts, num_rows, sizes)
    return grad_feats
