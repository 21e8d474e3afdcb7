"""Attention inside segments, as of every window to itself; backward also of every sample to its compressed keys.

A query tile belongs to one segment and loops over the keys of the segment; in the backward pass a second kernel has
tiles of keys that loop over the queries, so nothing is added up by atomics. Per score, the forward pass takes
2 (D + D_v) floating-point operations and one exponential, the backward pass 2 (4 D + 3 D_v) (scores and products with
the values are computed by both kernels) and two exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import BackwardInputs
from .backward_inputs import prepare_backward
from .segment_backward_key import key_gradients
from .segment_backward_query import query_gradients
from .segment_forward import attend
from .segment_plan import SegmentPlan


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: BackwardInputs,
    plan: SegmentPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `attend`.

    Args:
        query, key, value, plan, scale: as in `attend`.
        inputs: of its results and the gradient of the output.
        grad_query: added to, in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[P, M, H_kv, D]` and value `[P, M, H_kv, D_v]`, the latter two in float32
        and as parts to be added up, see `add_parts`.
    """
    grad_query = query_gradients(query, key, value, inputs, plan, scale, grad_query)
    return grad_query, *key_gradients(query, key, value, inputs, plan, scale)


def add_parts(parts: Tensor) -> Tensor:
    """`[P, M, ...]` -> `[M, ...]`."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


class SegmentAttention(torch.autograd.Function):
    """`attend` with gradients of query, key and value."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output, log_sum = attend(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        inputs = prepare_backward(output, log_sum, grad_output.contiguous(), ctx.scale)
        grad_query, *parts = attend_backward(query, key, value, inputs, ctx.plan, ctx.scale)
        grad_key, grad_value = (add_parts(part).to(key.dtype) for part in parts)
        return grad_query, grad_key, grad_value, None, None
