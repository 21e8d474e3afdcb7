"""Attention over packed segments by the Triton kernels for segments, as an operator of PyTorch, with gradients.

It needs the package triton. Nothing is padded and nothing is transferred to the host: lists of tiles are as long as
they can become, whatever the lengths of the segments. So it may be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.operators import operator
from ..spatial_sparse_attention.kernels.arguments import HeadShape
from ..spatial_sparse_attention.kernels.backward_inputs import prepare_backward
from ..spatial_sparse_attention.kernels.segment_attention import add_parts, attend, attend_backward
from .kernels.clear_rows import clear_without_keys
from .plan import backward_plan, forward_plan
from .reference import fake_gradients


@operator("diffusers_sparse3d::packed_attention_kernels", kept_by_checkpoints=True, mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    order_q: Tensor | None,
    order_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """`packed_attention` of operands of one dtype.

    Returns:
        `[M, H, D_v]`, and the tensors that the backward pass needs besides the inputs: the log-sum-exp `[M, H]`
        float32, and with `order_k` keys and values grouped by segment.
    """
    grouped = _grouped(key, value, order_k)
    keys, values = grouped or (key.contiguous(), value.contiguous())
    heads = HeadShape.of(query, keys, values)
    plan = forward_plan(query, cu_seqlens_q, cu_seqlens_k, order_q, heads)
    output, log_sum = attend(query.contiguous(), keys, values, plan, scale)
    clear_without_keys(output, plan, heads)
    return output, [log_sum, *grouped]


def _grouped(key: Tensor, value: Tensor, order_k: Tensor | None) -> list[Tensor]:
    """Keys and values grouped by segment; an empty list if they are grouped already."""
    return [] if order_k is None else [key.index_select(0, order_k), value.index_select(0, order_k)]


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, _q: Tensor, _k: Tensor, order_q: Any, order_k: Tensor | None, scale: Any
) -> tuple[Tensor, list[Tensor]]:
    output = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
    log_sum = query.new_empty(query.shape[0], query.shape[1], dtype=torch.float32)
    return output, [log_sum, *_grouped(key, value, order_k)]


@operator("diffusers_sparse3d::packed_attention_kernels_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    order_q: Tensor | None,
    order_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in the row orders that these had; here `key` and `value` are grouped."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    plan = backward_plan(query, key, cu_seqlens_q, cu_seqlens_k, order_q, HeadShape.of(query, key, value))
    inputs = prepare_backward(output, log_sum, grad_output.contiguous(), scale)
    grad_query, *parts = attend_backward(query, key, value, inputs, plan, scale)
    grad_key, grad_value = (add_parts(part).to(query.dtype) for part in parts)
    if order_k is not None:
        grad_key = torch.empty_like(grad_key).index_copy_(0, order_k, grad_key)
        grad_value = torch.empty_like(grad_value).index_copy_(0, order_k, grad_value)
    return grad_query, grad_key, grad_value


_attend_backward.register_fake(fake_gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    query, key, value, *segments, ctx.scale = inputs
    attended, saved = output
    log_sum, *grouped = saved
    ctx.save_for_backward(query, *(grouped or (key, value)), attended, log_sum, *segments)
    ctx.mark_non_differentiable(*saved)
    # Otherwise zeros would be made for their gradients.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor, _: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad_output, *ctx.saved_tensors, ctx.scale), *(None,) * 5


_attend.register_autograd(_gradients, setup_context=_keep)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None = None,
    order_q: Tensor | None = None,
    order_k: Tensor | None = None,
) -> Tensor:
    """See `reference.packed_attention`; float16, bfloat16 or float32, and a positive scale."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    boundaries = cu_seqlens_q.int(), cu_seqlens_k.int()
    output, _ = _attend(query.to(value.dtype), key.to(value.dtype), value, *boundaries, order_q, order_k, scale)
    return output
