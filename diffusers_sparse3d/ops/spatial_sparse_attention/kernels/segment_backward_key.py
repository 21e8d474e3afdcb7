"""The gradients of the keys and values of attention inside segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .arguments import LOG2_E, BackwardInputs, HeadShape, KeyGradients
from .backward_tiles import key_gradient_step
from .common import head_rows, load_matrix, store_matrix
from .segment_plan import SegmentPlan
from .tiles import end_of_full_tiles


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _backward_key_kernel(
    query,  # [N, H, D]
    key,  # [M, H_kv, D], grouped by segment
    value,  # [M, H_kv, D_v], grouped by segment
    inputs,  # BackwardInputs
    parts,  # KeyGradients [P, M, H_kv, *] float32, written
    order,  # [N] int64, the queries grouped by segment; None if they are
    tiles,  # [tiles, 3] int32: segment, first key, key after the last
    cu_queries,  # [S + 1] int32, the first place in `order` of each segment
    num_keys,  # M
    scale,  # factor of the scores, times log2(e)
    score_scale,  # factor of the scores
    heads,  # HeadConstants
    tile,  # TileConstants
):
    """A program has one tile of keys of one key/value head, and loops over a P-th of the queries of its segment."""
    TOKENS: tl.constexpr = tile.ROWS // heads.GROUP
    kv_head = tl.program_id(1)
    part, num_parts = tl.program_id(2), tl.num_programs(2)
    tiles += 3 * tl.program_id(0)
    segment, start, end = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    # [KEYS]
    places = start + tl.arange(0, tile.KEYS)
    is_key = places < end
    key_rows = places.to(tl.int64) * heads.num_kv_heads + kv_head
    # [KEYS, DIM], [KEYS, VALUE_DIM]
    keys = load_matrix(key, key_rows, is_key, heads.dim, heads.DIM)
    values = load_matrix(value, key_rows, is_key, heads.value_dim, heads.VALUE_DIM)

    first_query, last_query = tl.load(cu_queries + segment), tl.load(cu_queries + segment + 1)
    tiles_per_part = tl.cdiv(tl.cdiv(last_query - first_query, TOKENS), num_parts)
    first_query += part * tiles_per_part * TOKENS
    last_query = tl.minimum(last_query, first_query + tiles_per_part * TOKENS)

    # [KEYS, DIM], [KEYS, VALUE_DIM]
    grad_keys = tl.zeros((tile.KEYS, heads.DIM), tl.float32)
    grad_values = tl.zeros((tile.KEYS, heads.VALUE_DIM), tl.float32)
    num_queries = tl.maximum(last_query - first_query, 0)
    end_full = first_query + end_of_full_tiles(num_queries, TOKENS, query.dtype.element_ty)
    for MASKED in tl.static_range(2):
        for begin in range(end_full if MASKED else first_query, last_query if MASKED else end_full, TOKENS):
            # [ROWS]
            rows, valid = head_rows(order, begin, last_query, kv_head, heads, tile.ROWS, not MASKED)
            # [KEYS, DIM], [KEYS, VALUE_DIM]
            grad_keys, grad_values = key_gradient_step(
                query, inputs, rows, valid, keys, values, grad_keys, grad_values, scale, heads, tile.KEYS
            )
    key_rows += part.to(tl.int64) * num_keys * heads.num_kv_heads
    store_matrix(parts.key, key_rows, is_key, grad_keys * score_scale, heads.dim, heads.DIM)
    store_matrix(parts.value, key_rows, is_key, grad_values, heads.value_dim, heads.VALUE_DIM)


@on_device_of_first_argument
def key_gradients(
    query: Tensor, key: Tensor, value: Tensor, inputs: BackwardInputs, plan: SegmentPlan, scale: float
) -> KeyGradients:
    """The gradients of keys and values, as parts; arguments as in `segment_attention.attend_backward`.

    Returns:
        `[P, M, H_kv, D]` and `[P, M, H_kv, D_v]`, float32, to be added up over the first dimension.
    """
    heads, shape = HeadShape.of(query, key, value), plan.shapes.key_gradient
    num_query_tiles, num_key_tiles = plan.backward_query_tiles.shape[0], plan.key_tiles.shape[0]
    # Compressed attention has few keys with many queries each, so the queries are divided among several programs: as
    # many as fill the GPU three times, with three on a multiprocessor, and none of a fourth time.
    programs = max(1, num_key_tiles * heads.num_kv_heads)
    wanted = 9 * num_multiprocessors(query.device) // programs
    num_parts = max(1, min(wanted, cdiv(num_query_tiles, max(1, num_key_tiles)), 32))
    parts = KeyGradients(
        torch.empty(num_parts, *key.shape, dtype=torch.float32, device=key.device),
        torch.empty(num_parts, *value.shape, dtype=torch.float32, device=key.device),
    )
    if num_key_tiles:
        _backward_key_kernel[num_key_tiles, heads.num_kv_heads, num_parts](
            query,
            key,
            value,
            inputs,
            parts,
            plan.order,
            plan.key_tiles,
            plan.cu_queries,
            key.shape[0],
            scale * LOG2_E,
            scale,
            heads.constants(query.dtype),
            shape.constants,
            **shape.launch,
        )
    return parts
