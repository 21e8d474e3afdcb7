"""The branches of Spatial Sparse Attention by the kernels alone, with gradients, for tests. Needs triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import (
    compressed_attention,
    segment_attention,
    selection_attention,
)
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.backward_inputs import prepare_backward
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.selection_plan import SelectionPlan
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tile_shapes import shapes_for
from diffusers_sparse3d.ops.spatial_sparse_attention.plan import compression_plan, window_plan


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scale):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output, log_sum = segment_attention.attend(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, log_sum = ctx.saved_tensors
        inputs = prepare_backward(output, log_sum, grad_output.contiguous(), ctx.scale)
        grad_query, *parts = segment_attention.attend_backward(query, key, value, inputs, ctx.plan, ctx.scale)
        grad_key, grad_value = (segment_attention.add_parts(part).to(key.dtype) for part in parts)
        return grad_query, grad_key, grad_value, None, None


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, selection, scale):
        query, key, value = query.contiguous(), key[selection.order], value[selection.order]
        blocks = blocks.contiguous()
        output, log_sum, *choices = selection_attention.attend(query, key, value, blocks, selection, scale)
        ctx.save_for_backward(query, key, value, blocks, *choices, output, log_sum)
        ctx.selection, ctx.scale = selection, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        *arguments, output, log_sum = ctx.saved_tensors
        inputs = prepare_backward(output, log_sum, grad_output.contiguous(), ctx.scale)
        grad_query, grad_key, grad_value = selection_attention.attend_backward(
            *arguments, inputs, ctx.selection, ctx.scale
        )
        _, key, value, *_ = arguments
        inverse = ctx.selection.inverse
        return grad_query, grad_key[inverse].to(key.dtype), grad_value[inverse].to(value.dtype), None, None, None


@torch.no_grad()
def select_blocks(
    query, compressed_key, cache, compression_block_size, selection_block_size, topk, query_chunk_size=None
) -> Tensor:
    """The chosen blocks, with arguments and result as in `reference.select_blocks`."""
    heads = HeadShape.of(query, compressed_key, compressed_key)
    shapes = shapes_for(heads, query.dtype, query.device)
    _, plan, partition = compression_plan(
        cache, compression_block_size, selection_block_size, heads, shapes, query.dtype
    )
    query, compressed_key = query.contiguous(), compressed_key[partition.order]
    *_, blocks = compressed_attention.attend_and_select(
        query, compressed_key, compressed_key, plan, topk, heads.dim**-0.5, query_chunk_size=query_chunk_size or 0
    )
    return blocks.long()


def selected_attention(query, key, value, blocks, selection, scale=None) -> Tensor:
    """Attention to the chosen blocks, with arguments and result as in `reference.selected_attention`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shapes = shapes_for(HeadShape.of(query, key, value), query.dtype, query.device)
    plan = SelectionPlan.of(selection, shapes.of("selection"))
    return _SelectedAttention.apply(query, key, value, blocks, plan, scale)


def window_attention(query, key, value, cache, window_size, window_shift=0, scale=None) -> Tensor:
    """Attention inside the windows (x, y, z + `window_shift`) // `window_size` of the voxels in `cache`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = HeadShape.of(query, key, value)
    shapes = shapes_for(heads, query.dtype, query.device)
    plan = window_plan(cache, window_size, window_shift, heads, shapes.of("window"))
    # The order is a permutation: no row is added to twice in the backward pass.
    return _SegmentAttention.apply(query, key[plan.order], value[plan.order], plan, scale)
