"""Mean pooling as Triton kernels: every coarse voxel adds up its own children, so nothing is added by atomics.

Floor in bytes: N C values read, M C written, and 4 bytes a child for its row.

Operators for PyTorch: opaque to `torch.compile`, and what they take from the coordinates is plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.dispatch import cdiv, next_power_of_2, on_device_of_first_argument
from ..runtime.launch import Kernel
from ..runtime.operators import operator


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


# Values of a tile, and channels of a tile at most.
_TILE_VALUES = 2048
_MOST_CHANNELS = 128


# Tracing would end at the lookup of tables that are not there yet. Nothing of this runs where they are made before.
@torch.compiler.disable
def _make_plan(cache: CoordinateCache, factor: int) -> tuple[Tensor, Tensor, Tensor]:
    coarse, parents = cache.downsample(factor)
    parents = parents.int()
    ordered, order = parents.sort(stable=True)
    numbers = torch.arange(coarse.coords.shape[0] + 1, dtype=torch.int32, device=parents.device)
    return parents, order.int(), torch.searchsorted(ordered, numbers, out_int32=True)


def plan_pooling(cache: CoordinateCache, factor: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator takes from the coordinates, all int32, made at the first call for a cache.

    Returns:
        The coarse row of each row, `[N]`; the rows grouped by coarse row, `[N]`; where each group starts, `[M + 1]`.
    """
    return cache.derived(("pooling", factor), lambda: _make_plan(cache, factor))


@Kernel
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


@Kernel
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
    channels = min(_MOST_CHANNELS, next_power_of_2(num_channels))
    rows = _TILE_VALUES // channels
    grid = (cdiv(num_rows, rows), cdiv(num_channels, channels))
    return grid, {"C": num_channels, "ROWS": rows, "CHANNELS": channels}


@operator(
    "diffusers_sparse3d::sparse_mean_pool",
    mutates_args=(),
    schema="(Tensor feats, Tensor parents, Tensor order, Tensor starts, bool exact_mean) -> Tensor",
)
@on_device_of_first_argument
def _pool(feats: Tensor, parents: Tensor, order: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    """`feats [N, C]` and the tensors of `plan_pooling` -> `[M, C]`; `parents` is for the gradient alone."""
    num_parents = len(starts) - 1
    output = feats.new_empty(num_parents, feats.shape[1])
    grid, sizes = _tiles(num_parents, feats.shape[1])
    _pool_kernel[grid](feats.contiguous(), order, starts, output, num_parents, EXTRA=int(not exact_mean), **sizes)
    return output


@_pool.register_fake
def _(feats: Tensor, parents: Tensor, order: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    return feats.new_empty(starts.shape[0] - 1, feats.shape[1])


@operator(
    "diffusers_sparse3d::sparse_mean_pool_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor parents, Tensor starts, bool exact_mean) -> Tensor",
)
@on_device_of_first_argument
def _pool_backward(grad_output: Tensor, parents: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    """`grad_output [M, C]` -> `[N, C]`."""
    num_rows, num_channels = len(parents), grad_output.shape[1]
    grad_feats = grad_output.new_empty(num_rows, num_channels)
    grid, sizes = _tiles(num_rows, num_channels)
    _backward_kernel[grid](
        grad_output.contiguous(), parents, starts, grad_feats, num_rows, EXTRA=int(not exact_mean), **sizes
    )
    return grad_feats


@_pool_backward.register_fake
def _(grad_output: Tensor, parents: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    return grad_output.new_empty(parents.shape[0], grad_output.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parents, _, starts, ctx.exact_mean = inputs
    ctx.save_for_backward(parents, starts)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _pool_backward(grad_output, *ctx.saved_tensors, ctx.exact_mean), None, None, None, None


_pool.register_autograd(_gradients, setup_context=_keep)


def sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int, exact_mean: bool) -> Tensor:
    """See `ops.pooling.sparse_mean_pool`; there is at least one row."""
    return _pool(feats, *plan_pooling(cache, factor), exact_mean)
