"""Submanifold convolution as Triton kernels: implicit matrix products over the neighbour map, and their gradients.

Operators for PyTorch, whose plans are plain tensors: opaque to `torch.compile`, without transfers to the host, so they
may be captured in a CUDA graph as long as the plans stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...runtime.operators import operator
from ..reference import corner_weight
from .convolution import MERGE, SAME, SPLIT, convolve, convolve_shape
from .gradients import gradient_shape, weight_gradient
from .plan import NUM_OFFSETS, ConvPlan, GradientPlan


if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....sparse_tensor import CoordinateCache


__all__ = ["plan_convolution", "sparse_conv3d", "sparse_subdivide_conv3d"]


# Tracing would end at the lookup of plans that are not there yet. Nothing of these runs where they are made before.
@torch.compiler.disable
def _make_plan(cache: CoordinateCache, in_channels: int, out_channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return ConvPlan.of(cache, convolve_shape(in_channels, out_channels, dtype).by_mask).tensors


@torch.compiler.disable
def _make_gradient_plan(
    cache: CoordinateCache, in_channels: int, out_channels: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return GradientPlan.of(cache, gradient_shape(in_channels, out_channels, dtype).by_pairs).tensors


def plan_convolution(
    cache: CoordinateCache, weight: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the operator takes from the coordinates, made at the first call for a cache.

    Args:
        cache: of the coordinates.
        weight: `[27, Cin, Cout]`, or any tensor of this shape that requires a gradient if that does.
        dtype: of the features.

    Returns:
        `ConvPlan.tensors` of the output and of the gradient of the features; `GradientPlan.tensors`, nothing where
        there will be no gradient of the weights.
    """
    in_channels, out_channels = weight.shape[1:]
    # No class: `torch.compile` looks it up too.
    key = ("sparse_conv layer", in_channels, out_channels, dtype)
    plan = cache.derived(key, lambda: _make_plan(cache, in_channels, out_channels, dtype))
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return plan, ()
    key = ("sparse_conv weight gradient of a layer", in_channels, out_channels, dtype)
    return plan, cache.derived(key, lambda: _make_gradient_plan(cache, in_channels, out_channels, dtype))


@operator(
    "diffusers_sparse3d::implicit_sparse_conv3d",
    mutates_args=(),
    schema=("(Tensor feats, Tensor weight, Tensor? bias, Tensor[] plan, Tensor[] gradient_plan) -> Tensor"),
)
def _convolve(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Sequence[Tensor],
    gradient_plan: Sequence[Tensor],
) -> Tensor:
    """
    Args:
        feats: `[N, Cin]`.
        weight: `[27, Cin, Cout]` in the dtype of `feats`, or `[8 children, 8 corners, Cin, Cout]` to split the voxels.
        bias: `[Cout]` or None.
        plan, gradient_plan: what `plan_convolution` returns.

    Returns:
        `[N, Cout]`, or `[8 N, Cout]` of the children.
    """
    shape = convolve_shape(*weight.shape[-2:], feats.dtype)
    layer = SPLIT if weight.ndim == 4 else SAME
    return convolve(feats.contiguous(), weight.contiguous(), bias, ConvPlan(*plan), shape, layer)


@_convolve.register_fake
def _(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Sequence[Tensor],
    gradient_plan: Sequence[Tensor],
) -> Tensor:
    return feats.new_empty(feats.shape[0] * (8 if weight.ndim == 4 else 1), weight.shape[-1])


@operator(
    "diffusers_sparse3d::implicit_sparse_conv3d_feats_gradient",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor weight, Tensor[] plan) -> Tensor",
)
def _feats_gradient(grad_output: Tensor, weight: Tensor, plan: Sequence[Tensor]) -> Tensor:
    """`grad_output` and `weight` of the operator and its plan -> `[N, Cin]`."""
    split = weight.ndim == 4
    # The neighbour relation is symmetric: the gradient gathers too.
    transposed = (weight if split else weight.flip(0)).transpose(-2, -1).contiguous()
    shape = convolve_shape(*transposed.shape[-2:], grad_output.dtype)
    return convolve(grad_output.contiguous(), transposed, None, ConvPlan(*plan), shape, MERGE if split else SAME)


@_feats_gradient.register_fake
def _(grad_output: Tensor, weight: Tensor, plan: Sequence[Tensor]) -> Tensor:
    return grad_output.new_empty(plan[0].shape[1], weight.shape[-2])


@operator(
    "diffusers_sparse3d::implicit_sparse_conv3d_weight_gradient",
    mutates_args=(),
    schema="(Tensor feats, Tensor grad_output, Tensor[] plan, bool split) -> Tensor",
)
def _weight_gradient(feats: Tensor, grad_output: Tensor, plan: Sequence[Tensor], split: bool) -> Tensor:
    """`feats`, `grad_output` and `gradient_plan` of the operator -> its `weight`'s gradient, in the same dtype."""
    shape = gradient_shape(feats.shape[1], grad_output.shape[1], feats.dtype)
    gradient = weight_gradient(feats.contiguous(), grad_output.contiguous(), GradientPlan(*plan), shape, split)
    return gradient.to(feats.dtype)


@_weight_gradient.register_fake
def _(feats: Tensor, grad_output: Tensor, plan: Sequence[Tensor], split: bool) -> Tensor:
    matrices = (8, 8) if split else (NUM_OFFSETS,)
    return feats.new_empty(*matrices, feats.shape[1], grad_output.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, weight, bias, plan, gradient_plan = inputs
    ctx.save_for_backward(feats, weight, *plan, *gradient_plan)
    ctx.num_tensors = len(plan), len(gradient_plan)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    feats, weight, *tensors = ctx.saved_tensors
    grad_feats = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_feats = _feats_gradient(grad_output, weight, tensors[: ctx.num_tensors[0]])
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(feats, grad_output, tensors[ctx.num_tensors[0] :], weight.ndim == 4)
    if ctx.needs_input_grad[2]:
        grad_bias = grad_output.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_feats, grad_weight, grad_bias, *([None] * number for number in ctx.num_tensors)


_convolve.register_autograd(_gradients, setup_context=_keep)


def sparse_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """See `ops.sparse_conv.sparse_conv3d`; kernel size 3."""
    plans = plan_convolution(cache, weight, feats.dtype)
    return _convolve(feats, weight.to(feats.dtype), bias, *plans)


def sparse_subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """See `ops.sparse_conv.sparse_subdivide_conv3d`."""
    # Weights that meet the same parent are summed in float32, and rounded once.
    corners = corner_weight(weight.float()).permute(2, 0, 1, 3).to(feats.dtype)
    plans = plan_convolution(cache, weight, feats.dtype)
    return _convolve(feats, corners, bias, *plans)
