"""Attention inside segments: windows, forward and backward; samples and their compressed keys, backward.

A tile of queries belongs to one segment and loops over the keys of the segment. In the backward pass a second kernel
has tiles of keys that loop over the queries, so nothing is added up by atomics. Per score, the forward pass takes
2 (D + D_v) floating-point operations and one exponential; the backward pass, in which both kernels compute scores and
products with values, takes 2 (4 D + 3 D_v) and two exponentials.
"""

from __future__ import annotations

from torch import Tensor

from .arguments import BackwardInputs
from .segment_backward_key import key_gradients
from .segment_backward_query import query_gradients
from .segment_forward import attend
from .segment_plan import SegmentPlan


__all__ = ["add_parts", "attend", "attend_backward"]


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: BackwardInputs,
    plan: SegmentPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of attention inside segments.

    Args:
        query, key, value, plan, scale: as in `attend`.
        inputs: see `backward_inputs.prepare_backward`.
        grad_query: `[N, H, D]`, the gradient is added to it in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[P, M, H_kv, D]` and value `[P, M, H_kv, D_v]`, the latter two in float32
        and as parts to be added up, see `add_parts`.
    """
    grad_query = query_gradients(query, key, value, inputs, plan, scale, grad_query)
    return grad_query, *key_gradients(query, key, value, inputs, plan, scale)


def add_parts(parts: Tensor) -> Tensor:
    """The sum `[M, ...]` of parts `[P, M, ...]`."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
