"""Attention over packed segments without padding, by the Triton kernels for segments. Needs the package triton.

Operators of their own for PyTorch, as in `.reference`. Nothing is transferred to the host: lists of tiles are as long
as they can become, whatever the lengths of the segments. So it may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.dispatch import next_power_of_2, on_device_of_first_argument
from ..runtime.launch import Kernel
from ..runtime.operators import operator
from ..spatial_sparse_attention.kernels import segment_attention
from ..spatial_sparse_attention.kernels.arguments import AttentionShapes, HeadShape
from ..spatial_sparse_attention.kernels.backward_inputs import prepare_backward
from ..spatial_sparse_attention.kernels.common import query_rows, store_matrix
from ..spatial_sparse_attention.kernels.segment_plan import SegmentPlan
from ..spatial_sparse_attention.kernels.tile_shapes import shapes_for


@Kernel
@triton.jit
def _tiles_kernel(cu_seqlens, tiles, num_segments, num_rows, SIZE: tl.constexpr, PLACES: tl.constexpr):
    segment = tl.program_id(0)
    first = tl.load(cu_seqlens + segment)
    end = num_rows
    if segment < num_segments:
        end = tl.load(cu_seqlens + segment + 1)
    # The next segment's places start where these end. There are as many as tiles, or one more.
    first_place, end_place = first // SIZE + segment, end // SIZE + segment + 1
    for begin in range(first_place, end_place, PLACES):
        places = begin + tl.arange(0, PLACES)
        start = tl.minimum(first + (places - first_place) * SIZE, end)
        tile, valid = tiles + 3 * places, places < end_place
        tl.store(tile, tl.where(start < end, segment, num_segments), mask=valid)
        tl.store(tile + 1, start, mask=valid)
        tl.store(tile + 2, tl.minimum(start + SIZE, end), mask=valid)


@on_device_of_first_argument
def segment_tiles(cu_seqlens: Tensor, num_rows: int, size: int) -> Tensor:
    """Segments cut into tiles of at most `size` rows, with tiles of no rows among them.

    Args:
        cu_seqlens: `[S + 1]` int32, where each segment starts. Rows after the last one count as a segment S.
        num_rows: of all segments.
        size: rows of a tile.

    Returns:
        `[num_rows // size + S + 1, 3]` int32: segment, first row, row after the last. The segment is S without rows.
    """
    num_segments = len(cu_seqlens) - 1
    tiles = cu_seqlens.new_empty(num_rows // size + num_segments + 1, 3)
    _tiles_kernel[(num_segments + 1,)](cu_seqlens, tiles, num_segments, num_rows, SIZE=size, PLACES=64, num_warps=1)
    return tiles


@Kernel
@triton.jit
def _clear_kernel(
    output,
    order,
    tiles,
    cu_keys,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    value_dim: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    segment, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if tl.load(cu_keys + segment) == tl.load(cu_keys + segment + 1):
        zeros = tl.zeros((ROWS, VALUE_DIM), tl.float32)
        for kv_head in range(num_kv_heads):
            rows, valid = query_rows(order, start, end, kv_head, num_kv_heads, group_size, GROUP, ROWS)
            store_matrix(output, rows, valid, zeros, value_dim, VALUE_DIM)


@on_device_of_first_argument
def _clear_without_keys(output: Tensor, plan: SegmentPlan, heads: HeadShape) -> None:
    """Zeros for queries whose segment has no key; sums over no keys were divided by zero there."""
    _clear_kernel[(len(plan.query_tiles),)](
        output,
        plan.order,
        plan.query_tiles,
        plan.cu_keys,
        num_kv_heads=heads.num_kv_heads,
        group_size=heads.group_size,
        value_dim=heads.value_dim,
        GROUP=heads.group,
        VALUE_DIM=next_power_of_2(heads.value_dim),
        ROWS=plan.shapes.forward.rows,
    )


def _with_empty_segment(cu_seqlens: Tensor) -> Tensor:
    """With one segment more, for the tiles that have no counterpart: `[S + 1]` -> `[S + 2]`."""
    return torch.cat([cu_seqlens, cu_seqlens[-1:]])


def _shapes(heads: HeadShape, tensor: Tensor) -> AttentionShapes:
    return shapes_for(heads, tensor.dtype, tensor.device).of("window")


@operator(
    "diffusers_sparse3d::packed_attention_kernels",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? order_q, "
        "Tensor? order_k, float scale) -> (Tensor, Tensor[])"
    ),
)
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
    """What `packed_attention` does, all in one dtype.

    Returns:
        `[M, H, D_v]`, and what the backward pass needs besides the inputs: the log-sum-exp `[M, H]` float32, and with
        `order_k` keys and values grouped by segment.
    """
    grouped = _grouped(key, value, order_k)
    keys, values = grouped or (key.contiguous(), value.contiguous())
    heads = HeadShape.of(query, keys, values)
    shapes = _shapes(heads, query)
    tiles = segment_tiles(cu_seqlens_q, len(query), heads.tokens(shapes.forward.rows))
    # The other two lists are of the backward pass.
    plan = SegmentPlan(order_q, cu_seqlens_q, _with_empty_segment(cu_seqlens_k), tiles, tiles[:0], tiles[:0], shapes)
    output, log_sum = segment_attention.attend(query.contiguous(), keys, values, plan, scale)
    _clear_without_keys(output, plan, heads)
    return output, [log_sum, *grouped]


def _grouped(key: Tensor, value: Tensor, order_k: Tensor | None) -> list[Tensor]:
    """Keys and values grouped by segment; nothing if they are."""
    return [] if order_k is None else [key.index_select(0, order_k), value.index_select(0, order_k)]


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    order_q: Tensor | None,
    order_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    output = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
    log_sum = query.new_empty(query.shape[0], query.shape[1], dtype=torch.float32)
    return output, [log_sum, *_grouped(key, value, order_k)]


@operator(
    "diffusers_sparse3d::packed_attention_kernels_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sum, "
        "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? order_q, Tensor? order_k, float scale) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
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
    heads = HeadShape.of(query, key, value)
    shapes = _shapes(heads, query)
    query_tiles = segment_tiles(cu_seqlens_q, len(query), heads.tokens(shapes.query_gradient.rows))
    key_tiles = segment_tiles(cu_seqlens_k, len(key), shapes.key_gradient.keys)
    boundaries = _with_empty_segment(cu_seqlens_q), _with_empty_segment(cu_seqlens_k)
    # The first list is of the forward pass.
    plan = SegmentPlan(order_q, *boundaries, query_tiles[:0], query_tiles, key_tiles, shapes)
    inputs = prepare_backward(output, log_sum, grad_output.contiguous(), scale)
    grad_query, *parts = segment_attention.attend_backward(query, key, value, inputs, plan, scale)
    grad_key, grad_value = (segment_attention.add_parts(part).to(query.dtype) for part in parts)
    if order_k is None:
        return grad_query, grad_key, grad_value
    return grad_query, *(torch.empty_like(grad).index_copy_(0, order_k, grad) for grad in (grad_key, grad_value))


@_attend_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Sequence[Tensor]]) -> None:
    query, key, value, *segments, ctx.scale = inputs
    attended, saved = output
    log_sum, *grouped = saved
    ctx.save_for_backward(query, *(grouped or (key, value)), attended, log_sum, *segments)
    ctx.mark_non_differentiable(*saved)
    # Else zeros would be made for each of them.
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
    """Arguments and result as in `reference.packed_attention`; float16, bfloat16 or float32, and a positive scale."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    boundaries = cu_seqlens_q.int(), cu_seqlens_k.int()
    output, _ = _attend(query.to(value.dtype), key.to(value.dtype), value, *boundaries, order_q, order_k, scale)
    return output
