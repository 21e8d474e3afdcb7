"""Group normalisation in plain PyTorch: the oracle of the kernels and the path of the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


# Partial sums per sample: float32 sums of millions of rows stay accurate, and parallel additions rarely collide.
_PARTIAL_SUMS = 256


def _sample_sums(values: Tensor, batch_index: Tensor, batch_size: int) -> Tensor:
    """`[N, G]` values -> `[batch_size, G]` sums over the rows of each sample."""
    if batch_size == 1:
        return values.sum(0, keepdim=True)
    partial = torch.arange(values.shape[0], device=values.device) % _PARTIAL_SUMS
    sums = values.new_zeros(batch_size * _PARTIAL_SUMS, values.shape[1])
    sums.index_add_(0, batch_index.long() * _PARTIAL_SUMS + partial, values)
    return sums.unflatten(0, (batch_size, _PARTIAL_SUMS)).sum(1)


def _per_row(statistics: Tensor, batch_index: Tensor) -> Tensor:
    """`[batch_size, G]` -> `[N, G, 1]` (or `[1, G, 1]` where there is one sample)."""
    return (statistics if statistics.shape[0] == 1 else statistics[batch_index])[..., None]


class _SparseGroupNorm(torch.autograd.Function):
    """Normalisation that keeps its input in its own dtype and `[B, G]` statistics for the backward pass.

    Autograd would keep several float32 copies of the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor,
        batch_index: Tensor,
        batch_size: int,
        num_groups: int,
        eps: float,
    ) -> Tensor:
        dtype = torch.promote_types(feats.dtype, torch.float32)
        grouped = feats.to(dtype).unflatten(1, (num_groups, -1))
        ones = torch.ones(feats.shape[0], 1, dtype=dtype, device=feats.device)
        count = (_sample_sums(ones, batch_index, batch_size) * grouped.shape[2]).clamp(min=1)
        mean = _sample_sums(grouped.sum(2), batch_index, batch_size) / count
        centred = grouped - _per_row(mean, batch_index)
        variance = _sample_sums(centred.square().sum(2), batch_index, batch_size) / count
        scale = torch.rsqrt(variance + eps)
        normalized = centred.mul_(_per_row(scale, batch_index)).flatten(1)
        ctx.save_for_backward(feats, weight, batch_index, mean, scale, count)
        output = torch.addcmul(bias.to(dtype), normalized, weight.to(dtype))
        # A conversion that does nothing, as the result, has no gradient in compiled code of torch 2.11.
        return output if dtype == feats.dtype else output.to(feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight, batch_index, mean, scale, count = ctx.saved_tensors
        batch_size, num_groups = mean.shape
        row_scale = _per_row(scale, batch_index)
        grad_output = grad_output.to(mean.dtype)
        normalized = (feats.to(mean.dtype).unflatten(1, (num_groups, -1)) - _per_row(mean, batch_index)) * row_scale
        grad_weight = (grad_output * normalized.flatten(1)).sum(0).to(weight.dtype)
        grad_bias = grad_output.sum(0).to(weight.dtype)
        grad_normalized = (grad_output * weight.to(mean.dtype)).unflatten(1, (num_groups, -1))
        mean_grad = _sample_sums(grad_normalized.sum(2), batch_index, batch_size) / count
        mean_product = _sample_sums((grad_normalized * normalized).sum(2), batch_index, batch_size) / count
        grad = grad_normalized - _per_row(mean_grad, batch_index) - normalized * _per_row(mean_product, batch_index)
        return (grad * row_scale).flatten(1).to(feats.dtype), grad_weight, grad_bias, None, None, None, None


def sparse_group_norm_reference(
    feats: Tensor,
    batch_index: Tensor,
    batch_size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """See `ops.group_norm.sparse_group_norm`; `batch_index` `[N]` integer is the sample of each row."""
    normalized = _SparseGroupNorm.apply(feats, weight, bias, batch_index, batch_size, num_groups, eps)
    return F.silu(normalized) if silu else normalized


def _normalize_group(values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`[B, c, *sizes]` normalised over all but the first axis, times `weight` `[c]` plus `bias` `[c]`."""
    return (_normalize_on_gpu if values.is_cuda else _normalize_on_cpu)(values, weight, bias, eps)


def _normalize_on_cpu(values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.group_norm(values, 1, weight, bias, eps)


def _normalize_on_gpu(values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # `F.group_norm` has one thread block for all values of a group; this reduction is split over the whole GPU.
    variance, mean = torch.var_mean(values, dim=tuple(range(1, values.ndim)), correction=0, keepdim=True)
    shape = (-1, *(1,) * (values.ndim - 2))
    scale = torch.rsqrt(variance + eps) * weight.view(shape)
    return torch.addcmul(bias.view(shape) - mean * scale, values, scale)


def dense_group_norm_reference(
    hidden_states: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """See `ops.group_norm.dense_group_norm`. It takes one group after the other: copies in float32 stay small."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    output = torch.empty_like(hidden_states)
    size = hidden_states.shape[1] // num_groups
    for start in range(0, hidden_states.shape[1], size):
        group = slice(start, start + size)
        values = hidden_states[:, group].to(dtype)
        normalized = _normalize_group(values, weight[group].to(dtype), bias[group].to(dtype), eps)
        output[:, group] = F.silu(normalized) if silu else normalized
    return output
