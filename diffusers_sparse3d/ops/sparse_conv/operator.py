"""The convolution as operators of PyTorch, with gradients. They need the package triton.

To `torch.compile` they are opaque, and their plans are plain tensors. Nothing is transferred to the host, so they may
be captured in a CUDA graph as long as the plans stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.operators import operator
from .kernels.common import MERGE, NUM_OFFSETS, SAME, SUBDIVIDE
from .kernels.convolution import convolution_shape, convolve
from .kernels.corner_weights import corners_gradient, make_corners
from .kernels.weight_gradient import gradient_shape, weight_gradient
from .plan import ConvolutionPlan, GradientPlan, plan_convolution


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


@operator("diffusers_sparse3d::implicit_sparse_conv3d", mutates_args=())
def _convolve(
    feats: Tensor, weight: Tensor, bias: Tensor | None, plan: Sequence[Tensor], gradient_plan: Sequence[Tensor]
) -> Tensor:
    """The output of a convolution, or of one on the children of all voxels.

    Args:
        feats: `[N, Cin]`.
        weight: `[27, Cin, Cout]` in the dtype of `feats`, or `[8 children, 8 corners, Cin, Cout]` for the children.
        bias: `[Cout]` or None.
        plan: the first result of `plan_convolution`.
        gradient_plan: its second result, for the gradient of `weight` alone.

    Returns:
        `[N, Cout]`, or `[8 N, Cout]` of the children.
    """
    shape = convolution_shape(*weight.shape[-2:], feats.dtype)
    kind = SUBDIVIDE if weight.ndim == 4 else SAME
    bias = None if bias is None else bias.contiguous()
    return convolve(feats.contiguous(), weight.contiguous(), bias, ConvolutionPlan(*plan), shape, kind)


@_convolve.register_fake
def _(feats: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return feats.new_empty(feats.shape[0] * (8 if weight.ndim == 4 else 1), weight.shape[-1])


@operator("diffusers_sparse3d::implicit_sparse_conv3d_feats_gradient", mutates_args=())
def _feats_gradient(grad_output: Tensor, weight: Tensor, plan: Sequence[Tensor]) -> Tensor:
    """The gradient of `feats`, `[N, Cin]`, from that of the output; `weight` and `plan` as in `_convolve`."""
    subdivides = weight.ndim == 4
    # The neighbour relation is symmetric: the gradient gathers too.
    transposed = (weight if subdivides else weight.flip(0)).transpose(-2, -1).contiguous()
    shape = convolution_shape(*transposed.shape[-2:], grad_output.dtype)
    kind = MERGE if subdivides else SAME
    return convolve(grad_output.contiguous(), transposed, None, ConvolutionPlan(*plan), shape, kind)


@_feats_gradient.register_fake
def _(grad_output: Tensor, weight: Tensor, plan: Sequence[Tensor]) -> Tensor:
    return grad_output.new_empty(plan[0].shape[1], weight.shape[-2])


@operator("diffusers_sparse3d::implicit_sparse_conv3d_weight_gradient", mutates_args=())
def _weight_gradient(feats: Tensor, grad_output: Tensor, plan: Sequence[Tensor], subdivides: bool) -> Tensor:
    """The gradient of `weight`, in the dtype of `feats`; `plan` is the `gradient_plan` of `_convolve`."""
    shape = gradient_shape(feats.shape[1], grad_output.shape[1], feats.dtype)
    kind = SUBDIVIDE if subdivides else SAME
    gradient = weight_gradient(feats.contiguous(), grad_output.contiguous(), GradientPlan(*plan), shape, kind)
    return gradient.to(feats.dtype)


@_weight_gradient.register_fake
def _(feats: Tensor, grad_output: Tensor, plan: Sequence[Tensor], subdivides: bool) -> Tensor:
    matrices = (8, 8) if subdivides else (NUM_OFFSETS,)
    return feats.new_empty(*matrices, feats.shape[1], grad_output.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, weight, bias, plan, gradient_plan = inputs
    ctx.save_for_backward(feats, weight, *plan, *gradient_plan)
    ctx.num_tensors = len(plan), len(gradient_plan)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    feats, weight, *tensors = ctx.saved_tensors
    plan, gradient_plan = tensors[: ctx.num_tensors[0]], tensors[ctx.num_tensors[0] :]
    grad_feats = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_feats = _feats_gradient(grad_output, weight, plan)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(feats, grad_output, gradient_plan, weight.ndim == 4)
    if ctx.needs_input_grad[2]:
        grad_bias = grad_output.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_feats, grad_weight, grad_bias, *([None] * number for number in ctx.num_tensors)


_convolve.register_autograd(_gradients, setup_context=_keep)


@operator("diffusers_sparse3d::sparse_conv3d_corner_weight", mutates_args=())
def _corner_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`[27, Cin, Cout]` -> `[8 children, 8 corners, Cin, Cout]` in `dtype`, see `reference.corner_weight`.

    Weights that meet the same parent are summed in float32, and rounded once.
    """
    return make_corners(weight.contiguous(), dtype)


@_corner_weight.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(8, 8, *weight.shape[1:], dtype=dtype)


@operator("diffusers_sparse3d::sparse_conv3d_corner_weight_backward", mutates_args=())
def _corner_weight_backward(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of `weight` in `dtype`, from that of `_corner_weight`."""
    return corners_gradient(gradient.contiguous(), dtype)


@_corner_weight_backward.register_fake
def _(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(NUM_OFFSETS, *gradient.shape[2:], dtype=dtype)


def _keep_dtype(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _corner_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _corner_weight_backward(gradient, ctx.dtype), None


_corner_weight.register_autograd(_corner_gradients, setup_context=_keep_dtype)


def sparse_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """See `ops.sparse_conv.sparse_conv3d`; kernel size 3."""
    plans = plan_convolution(cache, weight, feats.dtype)
    return _convolve(feats, weight.to(feats.dtype), bias, *plans)


def sparse_subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """See `ops.sparse_conv.sparse_subdivide_conv3d`."""
    plans = plan_convolution(cache, weight, feats.dtype)
    return _convolve(feats, _corner_weight(weight, feats.dtype), bias, *plans)
