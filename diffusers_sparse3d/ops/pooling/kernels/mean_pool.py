"""Means of the children of each coarse voxel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .common import make_grid, make_sizes


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _pool_kernel(feats, output, order, starts, num_parents, sizes):
    """A tile of the output.

    Args:
        feats: `[N, CHANNELS]`.
        output: `[M, CHANNELS]`, written.
        order: `[N]` int32, the rows grouped by parent.
        starts: `[M + 1]` int32, where each group starts.
        num_parents: M.
        sizes: `Sizes`.
    """
    CHANNELS: tl.constexpr = sizes.CHANNELS
    # [ROWS]
    rows = tl.program_id(0) * sizes.ROWS + tl.arange(0, sizes.ROWS)
    valid = rows < num_parents
    start = tl.load(starts + rows, mask=valid, other=0)
    count = tl.load(starts + rows + 1, mask=valid, other=0) - start
    # [1, COLUMNS]
    channels = (tl.program_id(1) * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS))[None, :]
    is_channel = channels < CHANNELS
    # [ROWS, COLUMNS]
    total = tl.zeros((sizes.ROWS, sizes.COLUMNS), tl.float32)
    for number in range(tl.max(count, 0)):
        # [ROWS]
        exists = number < count
        child = tl.load(order + start + number, mask=exists, other=0).to(tl.int64)
        # [ROWS, COLUMNS]
        places = (child * CHANNELS)[:, None] + channels
        total += tl.load(feats + places, mask=exists[:, None] & is_channel, other=0.0).to(tl.float32)
    total /= tl.maximum(count + sizes.EXTRA, 1).to(tl.float32)[:, None]
    places = (rows.to(tl.int64) * CHANNELS)[:, None] + channels
    tl.store(output + places, total.to(output.dtype.element_ty), mask=valid[:, None] & is_channel)


@on_device_of_first_argument
def mean_pool(feats: Tensor, order: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    """`feats [N, C]`, contiguous, with `order` and `starts` of `plan_pooling` -> `[M, C]`."""
    num_parents, num_channels = len(starts) - 1, feats.shape[1]
    output = feats.new_empty(num_parents, num_channels)
    sizes = make_sizes(num_channels, exact_mean)
    _pool_kernel[make_grid(num_parents, sizes)](feats, output, order, starts, num_parents, sizes)
    return output
