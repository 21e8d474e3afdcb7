"""Spatial Sparse Attention in Triton, forward and backward. Needs the package triton.

The functions have the contracts of `..reference`, for float16, bfloat16 and float32, with accumulation in float32.
They wait for the GPU only where something is derived from coordinates for the first time; `CoordinateCache` keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import block_selection, segment_attention, selection_attention
from .block_selection import BlockPlan
from .common import HeadShape
from .segment_attention import SegmentAttention, SegmentPlan
from .selection_attention import SelectedAttention


if TYPE_CHECKING:
    from ....sparse_tensor import CoordinateCache
    from ...coordinates import Partition


__all__ = ["select_blocks", "selected_attention", "spatial_sparse_attention", "window_attention"]


@triton.jit
def _gated_sum_kernel(compressed, selected, window, gate, output, num_tokens, width, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask, places = columns < width, token * width + columns
    total = tl.load(gate + token) * tl.load(compressed + places, mask=mask, other=0.0).to(tl.float32)
    gate += num_tokens
    total += tl.load(gate + token) * tl.load(selected + places, mask=mask, other=0.0).to(tl.float32)
    gate += num_tokens
    total += tl.load(gate + token) * tl.load(window + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + places, total.to(output.dtype.element_ty), mask=mask)


def _gated_sum(outputs: tuple[Tensor, Tensor, Tensor], gate: Tensor) -> Tensor:
    """Three `[N, H, D_v]` and `gate [3, N]` float32 -> `[N, H, D_v]`."""
    num_tokens, width = len(outputs[0]), outputs[0][0].numel()
    block = min(1024, triton.next_power_of_2(width))
    result = torch.empty_like(outputs[0])
    _gated_sum_kernel[num_tokens, triton.cdiv(width, block)](*outputs, gate, result, num_tokens, width, WIDTH=block)
    return result


@dataclass(frozen=True)
class _Plan:
    """Everything about the coordinates that the three branches need.

    Attributes:
        compressed: queries and compressed keys of each sample.
        compressed_order: the compressed keys grouped by selection block, `[M]` int64, and back.
        blocks: for the choice of the blocks.
        selection: the tokens in selection blocks.
        window: queries and keys of each window.
        window_partition: the tokens in windows.
    """

    compressed: SegmentPlan
    compressed_order: Tensor
    compressed_inverse: Tensor
    blocks: BlockPlan
    selection: Partition
    window: SegmentPlan
    window_partition: Partition


def _compression_plan(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    heads: HeadShape,
    dtype: torch.dtype,
) -> tuple[SegmentPlan, BlockPlan, Partition]:
    """For the compressed attention, for the choice of the blocks, and the compressed keys in selection blocks."""

    def make() -> tuple[SegmentPlan, BlockPlan, Partition]:
        selection = cache.partition(selection_block_size)
        compressed, _ = cache.downsample(compression_block_size)
        blocks = compressed.partition(selection_block_size // compression_block_size)
        cu_queries = selection.cu_seqlens[selection.batch_cu_blocks.long()]
        segments = SegmentPlan.make(
            selection.order, cu_queries, compressed.cu_seqlens, len(compressed.coords), heads, dtype
        )
        return segments, BlockPlan.make(selection, compressed, blocks, heads, dtype), blocks

    key = ("ssa compression", compression_block_size, selection_block_size, heads, dtype)
    return cache.derived(key, make)


def _window_plan(
    cache: CoordinateCache, window_size: int, window_shift: int, heads: HeadShape, dtype: torch.dtype
) -> SegmentPlan:
    def make() -> SegmentPlan:
        windows = cache.partition(window_size, window_shift)
        return SegmentPlan.make(
            windows.order, windows.cu_seqlens, windows.cu_seqlens, len(windows.order), heads, dtype
        )

    return cache.derived(("ssa window", window_size, window_shift, heads, dtype), make)


class _SpatialSparseAttention(torch.autograd.Function):
    """The three branches and their gated sum. The backward kernels apply the gates, and add to one gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        compressed_key: Tensor,
        compressed_value: Tensor,
        gate: Tensor,
        plan: _Plan,
        topk: int,
        scale: float,
        query_chunk_size: int | None,
    ) -> Tensor:
        query, gates = query.contiguous(), gate.float().t().contiguous()
        compressed_key, compressed_value = (
            compressed_key[plan.compressed_order],
            compressed_value[plan.compressed_order],
        )
        compressed, compressed_sum = segment_attention.attend(
            query, compressed_key, compressed_value, plan.compressed, scale
        )
        blocks = block_selection.select(
            query, compressed_key, compressed_sum, plan.blocks, topk, scale, query_chunk_size
        )
        selected_key, selected_value = key[plan.selection.order], value[plan.selection.order]
        selected, selected_sum = selection_attention.attend(
            query, selected_key, selected_value, blocks, plan.selection, scale
        )
        window_key, window_value = key[plan.window_partition.order], value[plan.window_partition.order]
        window, window_sum = segment_attention.attend(query, window_key, window_value, plan.window, scale)
        ctx.save_for_backward(
            query,
            gates,
            *(compressed_key, compressed_value, compressed, compressed_sum),
            *(selected_key, selected_value, blocks, selected, selected_sum),
            *(window_key, window_value, window, window_sum),
        )
        ctx.plan, ctx.scale, ctx.gate_dtype = plan, scale, gate.dtype
        return _gated_sum((compressed, selected, window), gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, gates, *saved = ctx.saved_tensors
        plan, scale, dtype = ctx.plan, ctx.scale, query.dtype
        grad_output = grad_output.contiguous()
        grad_query, grad_compressed_key, grad_compressed_value, compressed_product = segment_attention.attend_backward(
            query, *saved[:4], grad_output, plan.compressed, scale, gates[0]
        )
        grad_query, grad_key, grad_value, selected_product = selection_attention.attend_backward(
            query, *saved[4:9], grad_output, plan.selection, scale, gates[1], grad_query
        )
        grad_query, window_grad_key, window_grad_value, window_product = segment_attention.attend_backward(
            query, *saved[9:], grad_output, plan.window, scale, gates[2], grad_query
        )
        grad_key = grad_key[plan.selection.inverse].add_(window_grad_key[plan.window_partition.inverse])
        grad_value = grad_value[plan.selection.inverse].add_(window_grad_value[plan.window_partition.inverse])
        products = (compressed_product, selected_product, window_product)
        return (
            grad_query,
            grad_key.to(dtype),
            grad_value.to(dtype),
            grad_compressed_key[plan.compressed_inverse].to(dtype),
            grad_compressed_value[plan.compressed_inverse].to(dtype),
            torch.stack([product.sum(1) for product in products], 1).to(ctx.gate_dtype),
            *(None,) * 4,
        )


@torch.no_grad()
def select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `reference.select_blocks`; works out the log-sum-exp for itself."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = HeadShape.of(query, compressed_key, compressed_key)
    segments, plan, order = _compression_plan(cache, compression_block_size, selection_block_size, heads, query.dtype)
    query, compressed_key = query.contiguous(), compressed_key[order.order]
    _, log_sum = segment_attention.attend(query, compressed_key, compressed_key, segments, scale)
    return block_selection.select(query, compressed_key, log_sum, plan, topk, scale, query_chunk_size).long()


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: Partition, scale: float | None = None
) -> Tensor:
    """Arguments and result as in `reference.selected_attention`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return SelectedAttention.apply(query, key, value, blocks, selection, scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: CoordinateCache,
    window_size: int,
    window_shift: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attention inside the windows (x, y, z + `window_shift`) // `window_size`.

    Args:
        query: `[N, H, D]`.
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        cache: the N voxels, in any order.
        window_size: edge of a window.
        window_shift: added to the coordinates first.
        scale: factor of the scores, positive; 1 / sqrt(D) if None.

    Returns:
        `[N, H, D_v]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plan = _window_plan(cache, window_size, window_shift, HeadShape.of(query, key, value), query.dtype)
    # A permutation: no row is added to twice in the backward pass.
    return SegmentAttention.apply(query, key[plan.order], value[plan.order], plan, scale)[0]


# Tracing would have to go through launches and through what is planned on the host.
@torch.compiler.disable
def spatial_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    window_size: int,
    window_shift: int = 0,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `ops.spatial_sparse_attention.spatial_sparse_attention`.

    Everything is computed in the dtype of `value`. `query_chunk_size` bounds the buffer of the choice of the blocks,
    the one place where memory grows with queries times compressed keys.
    """
    if query.shape[0] == 0:
        return value.new_zeros(0, query.shape[1], value.shape[-1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype, heads = value.dtype, HeadShape.of(query, key, value)
    segments, blocks, compressed = _compression_plan(cache, compression_block_size, selection_block_size, heads, dtype)
    plan = _Plan(
        compressed=segments,
        compressed_order=compressed.order,
        compressed_inverse=compressed.inverse,
        blocks=blocks,
        selection=cache.partition(selection_block_size),
        window=_window_plan(cache, window_size, window_shift, heads, dtype),
        window_partition=cache.partition(window_size, window_shift),
    )
    return _SpatialSparseAttention.apply(
        query.to(dtype),
        key.to(dtype),
        value,
        compressed_key.to(dtype),
        compressed_value.to(dtype),
        gate,
        plan,
        topk,
        scale,
        query_chunk_size,
    )
