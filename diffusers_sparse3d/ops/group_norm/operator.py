"""Group normalisation as an operator of PyTorch, with gradients. It needs the package triton.

To `torch.compile` it is opaque, and its plan is plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.operators import operator
from .kernels.common import Affine, Statistics, Tiles
from .kernels.feats_gradient import GradientMeans, feats_gradient
from .kernels.gradient_sums import gradient_sums
from .kernels.join_statistics import join_statistics
from .kernels.normalization import normalize
from .kernels.statistics import part_statistics
from .plan import GroupNormPlan, plan_group_norm


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


@operator("diffusers_sparse3d::sparse_group_norm", mutates_args=())
def _normalize(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    coords: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised features, and the statistics that the backward pass needs.

    Args:
        feats, weight, bias, num_groups, eps, silu: as in `ops.group_norm.sparse_group_norm`; at least one row.
        coords, cu_rows, order: as in `GroupNormPlan`.

    Returns:
        `[N, C]`, and mean and inverse standard deviation of each sample and group, `[B, G]` float32.
    """
    feats, affine = feats.contiguous(), Affine(weight.contiguous(), bias.contiguous())
    plan = GroupNormPlan(coords, cu_rows, order)
    tiles = Tiles.of(feats, len(cu_rows) - 1)
    statistics = join_statistics(part_statistics(feats, plan, tiles), plan, num_groups, eps)
    return normalize(feats, affine, statistics, plan, tiles, silu), statistics.mean, statistics.scale


@_normalize.register_fake
def _(
    feats: Tensor, weight: Tensor, bias: Tensor, coords: Tensor, cu_rows: Tensor, order: Any, num_groups: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = (feats.new_empty(cu_rows.shape[0] - 1, num_groups, dtype=torch.float32) for _ in range(2))
    return feats.new_empty(feats.shape), mean, scale


@operator("diffusers_sparse3d::sparse_group_norm_backward", mutates_args=())
def _normalize_backward(
    grad_output: Tensor,
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    coords: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `feats`, `weight` and `bias`, from `grad_output [N, C]` and what the operator took and returned."""
    feats, grad_output = feats.contiguous(), grad_output.contiguous()
    affine, statistics = Affine(weight.contiguous(), bias.contiguous()), Statistics(mean, scale)
    plan = GroupNormPlan(coords, cu_rows, order)
    batch_size, num_groups = mean.shape
    tiles = Tiles.of(feats, batch_size)
    sums = gradient_sums(feats, grad_output, affine, statistics, plan, tiles, silu)
    count = cu_rows.diff()[:, None, None].clamp(min=1) * (feats.shape[1] // num_groups)
    means = (sums * weight.float()).unflatten(2, (num_groups, -1)).sum(3) / count
    means = GradientMeans(*means.transpose(0, 1).contiguous())
    grad_feats = feats_gradient(feats, grad_output, affine, statistics, means, plan, tiles, silu)
    # Summed one by one: results of an operator may not share memory.
    grad_bias, grad_weight = sums[:, 0].sum(0), sums[:, 1].sum(0)
    return grad_feats, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@_normalize_backward.register_fake
def _(grad_output: Tensor, feats: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return feats.new_empty(feats.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    feats, weight, bias, *plan, _, _, ctx.silu = inputs
    _, mean, scale = output
    ctx.save_for_backward(feats, weight, bias, mean, scale, *plan)
    ctx.mark_non_differentiable(mean, scale)
    # Otherwise zeros would be made for the gradients of the statistics.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_normalize_backward(grad_output, *ctx.saved_tensors, ctx.silu), *(None,) * 6


_normalize.register_autograd(_gradients, setup_context=_keep)


def sparse_group_norm(
    feats: Tensor,
    cache: CoordinateCache,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """See `ops.group_norm.sparse_group_norm`; there is at least one row."""
    return _normalize(feats, weight, bias, *plan_group_norm(cache), num_groups, eps, silu)[0]


def dense_group_norm(
    hidden_states: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """See `ops.group_norm.dense_group_norm`; there is at least one value. A patch is a sample of packed rows."""
    # [B, positions, C]
    samples = hidden_states.movedim(1, -1).flatten(1, -2)
    num_rows = samples.shape[1]
    cu_rows = torch.arange(0, num_rows + 1, num_rows, dtype=torch.int32, device=samples.device)
    # A sample at a time: the kernels then look up no sample of a row, and do not read its coordinates.
    normalized = [
        _normalize(rows, weight, bias, cu_rows[:, None], cu_rows, None, num_groups, eps, silu)[0] for rows in samples
    ]
    output = normalized[0][None] if len(normalized) == 1 else torch.stack(normalized)
    return output.unflatten(1, hidden_states.shape[2:]).movedim(-1, 1)
