"""Attention inside segments, as of every window to itself; backward also of every sample to its compressed keys.

A query tile belongs to one segment and loops over the keys of the segment; in the backward pass a second kernel has
tiles of keys that loop over the queries, so nothing is added up by atomics. Per score, the forward pass takes
2 (D + D_v) floating-point operations and one exponential, the backward pass 2 (4 D + 3 D_v) (scores and products with
the values are computed by both kernels) and two exponentials.
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
