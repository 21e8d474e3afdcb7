"""Mean pooling as Triton kernels: every coarse voxel adds up its own children, so nothing is added by atomics.

Floor in bytes: N C values read, M C written, and 4 bytes a child for its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


# Values of a tile, and channels of a tile at most.
_TILE_VALUES = 2048
_MOST_CHANNELS = 128


@dataclass
class _Children:
    """The children of coarse voxel i are the rows `order[starts[i]]` .. `order[starts[i + 1] - 1]`; all int32."""

    parents: Tensor
    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, cache: CoordinateCache, factor: int) -> _Children:
        return cache.derived(("pooling", factor), lambda: cls.make(cache, factor))

    @classmethod
    def make(cls, cache: CoordinateCache, factor: int) -> _Children:
        coarse, parents = cache.downsample(factor)
        parents = parents.int()
        ordered, order = parents.sort(stable=True)
        numbers = torch.arange(coarse.coords.shape[0] + 1, dtype=torch.int32, device=parents.device)
        return cls(parents, order.int(), torch.searchsorted(ordered, numbers, out_int32=True))


@triton.jit
def _pool_kernel(
    feats,
    order,
    starts,
    output,
    num_parents,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid, is_channel = rows < num_parents, (channels < C)[None, :]
    start = tl.load(starts + rows, mask=valid, other=0)
    count = tl.load(starts + rows + 1, mask=valid, other=0) - start
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for number in range(tl.max(count, 0)):
        exists = number < count
        child = tl.load(order + start + number, mask=exists, other=0).to(tl.int64)
        places = (child * C)[:, None] + channels[None, :]
        total += tl.load(feats + places, mask=exists[:, None] & is_channel, other=0.0).to(tl.float32)
    total /= tl.maximum(count + EXTRA, 1).to(tl.float32)[:, None]
    places = (rows.to(tl.int64) * C)[:, None] + channels[None, :]
    tl.store(output + places, total.to(output.dtype.element_ty), mask=valid[:, None] & is_channel)


@triton.jit
def _backward_kernel(
    grad_output,
    parents,
    starts,
    grad_feats,
    num_rows,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = rows < num_rows
    mask = valid[:, None] & (channels < C)[None, :]
    parent = tl.load(parents + rows, mask=valid, other=0)
    count = tl.load(starts + parent + 1) - tl.load(starts + parent)
    places = (parent.to(tl.int64) * C)[:, None] + channels[None, :]
    gradient = tl.load(grad_output + places, mask=mask, other=0.0).to(tl.float32)
    gradient /= (count + EXTRA).to(tl.float32)[:, None]
    places = (rows.to(tl.int64) * C)[:, None] + channels[None, :]
    tl.store(grad_feats + places, gradient.to(grad_feats.dtype.element_ty), mask=mask)


def _tiles(num_rows: int, num_channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    channels = min(_MOST_CHANNELS, triton.next_power_of_2(num_channels))
    rows = _TILE_VALUES // channels
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_channels, channels))
    return grid, {"C": num_channels, "ROWS": rows, "CHANNELS": channels}


class _SparseMeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, children: _Children, extra: int) -> Tensor:
        num_parents = children.starts.numel() - 1
        output = feats.new_empty(num_parents, feats.shape[1])
        grid, sizes = _tiles(num_parents, feats.shape[1])
        _pool_kernel[grid](
            feats.contiguous(), children.order, children.starts, output, num_parents, EXTRA=extra, **sizes
        )
        ctx.children, ctx.extra = children, extra
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        children = ctx.children
        num_rows = children.parents.numel()
        grad_feats = grad_output.new_empty(num_rows, grad_output.shape[1])
        grid, sizes = _tiles(num_rows, grad_output.shape[1])
        _backward_kernel[grid](
            grad_output.contiguous(),
            children.parents,
            children.starts,
            grad_feats,
            num_rows,
            EXTRA=ctx.extra,
            **sizes,
        )
        return grad_feats, None, None


def sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int, exact_mean: bool) -> Tensor:
    """See `ops.pooling.sparse_mean_pool`; there is at least one row."""
    return _SparseMeanPool.apply(feats, _Children.of(cache, factor), 0 if exact_mean else 1)
