"""Attention inside segments: every query attends to all keys of its window or of its sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, HeadShape
from .common import load_matrix, query_rows, store_matrix
from .segment_plan import SegmentPlan
from .tiles import attend_to_keys


@Kernel
@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    output,
    log_sum,
    order,
    tiles,
    cu_keys,
    scale,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    kv_head = tl.program_id(1)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
    queries = load_matrix(query, rows, valid, dim, DIM)
    first_key = tl.load(cu_keys + segment).to(tl.int64)
    num_keys = (tl.load(cu_keys + segment + 1) - first_key).to(tl.int32)
    attended, log_sums = attend_to_keys(
        queries,
        key + (first_key * num_kv_heads + kv_head) * dim,
        value + (first_key * num_kv_heads + kv_head) * value_dim,
        num_keys,
        tl.full((ROWS,), float("-inf"), tl.float32),
        scale,
        num_kv_heads,
        dim,
        value_dim,
        DIM,
        VALUE_DIM,
        PRECISION,
        ROWS,
        KEYS,
        False,
    )
    store_matrix(output, rows, valid, attended, value_dim, VALUE_DIM)
    tl.store(log_sum + rows, log_sums, mask=valid)


@on_device_of_first_argument
def attend(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> tuple[Tensor, Tensor]:
    """
    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, H_kv, D]`, contiguous, grouped by segment.
        value: `[M, H_kv, D_v]`, contiguous, grouped by segment.
        plan: the segments. A segment with queries has keys.
        scale: factor of the scores, positive.

    Returns:
        The output `[N, H, D_v]`, and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`.
    """
    heads = HeadShape.of(query, key, value)
    output = value.new_empty(*query.shape[:2], heads.value_dim)
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
    num_tiles = plan.query_tiles.shape[0]
    if num_tiles:
        _forward_kernel[num_tiles, heads.num_kv_heads](
            query,
            key,
            value,
            output,
            log_sum,
            plan.order,
            plan.query_tiles,
            plan.cu_keys,
            scale * LOG2_E,
            **heads.arguments(query.dtype),
            **plan.shapes.forward.arguments(),
        )
    return output, log_sum
