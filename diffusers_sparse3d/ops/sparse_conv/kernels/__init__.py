"""Submanifold convolution as Triton kernels: implicit matrix products over the neighbour map, and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import corner_weight
from .convolution import MERGE, SAME, SPLIT, convolve, convolve_shape
from .gradients import gradient_shape, weight_gradient
from .plan import ConvPlan


if TYPE_CHECKING:
    from ....sparse_tensor import CoordinateCache


__all__ = ["sparse_conv3d", "sparse_subdivide_conv3d"]


class _SparseConv3d(torch.autograd.Function):
    """`convolve` with gradients; `weight` has 27 matrices, or 8 x 8 for the children of every voxel."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
        feats, weight = feats.contiguous(), weight.contiguous()
        ctx.save_for_backward(feats, weight)
        ctx.cache, ctx.bias_dtype = cache, None if bias is None else bias.dtype
        shape = convolve_shape(*weight.shape[-2:], feats.dtype)
        plan = ConvPlan.of(cache, shape.by_mask)
        return convolve(feats, weight, bias, plan, shape, SPLIT if weight.ndim == 4 else SAME)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        split = weight.ndim == 4
        grad_feats = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The neighbour relation is symmetric: the gradient gathers too.
            transposed = (weight if split else weight.flip(0)).transpose(-2, -1).contiguous()
            shape = convolve_shape(*transposed.shape[-2:], feats.dtype)
            plan = ConvPlan.of(ctx.cache, shape.by_mask)
            grad_feats = convolve(grad_output, transposed, None, plan, shape, MERGE if split else SAME)
        if ctx.needs_input_grad[1]:
            shape = gradient_shape(*weight.shape[-2:], feats.dtype)
            plan = ConvPlan.of(ctx.cache, shape.by_mask)
            grad_weight = weight_gradient(feats, grad_output, plan, shape, split).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_feats, grad_weight, grad_bias, None


def sparse_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """See `ops.sparse_conv.sparse_conv3d`; kernel size 3."""
    return _SparseConv3d.apply(feats, weight.to(feats.dtype), bias, cache)


def sparse_subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """See `ops.sparse_conv.sparse_subdivide_conv3d`."""
    # Weights that meet the same parent are summed in float32, and rounded once.
    corners = corner_weight(weight.float()).permute(2, 0, 1, 3).to(feats.dtype)
    return _SparseConv3d.apply(feats, corners, bias, cache)
