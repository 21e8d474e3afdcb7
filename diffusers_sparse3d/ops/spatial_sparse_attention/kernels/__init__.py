"""Spatial Sparse Attention in Triton, forward and backward. Needs the package triton.

The functions have the contracts of `..reference`, for float16, bfloat16 and float32, with accumulation in float32.
They wait for the GPU only where something is derived from coordinates for the first time; `CoordinateCache` keeps it.
The whole is an operator for PyTorch, whose plan is plain tensors and integers: opaque to `torch.compile`, without
transfers to the host, so it may be captured in a CUDA graph as long as the plan stays.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.dispatch import dot_precision
from ...runtime.operators import is_traced, operator
from ...runtime.recording import RepeatedCalls
from . import compressed_attention, segment_attention, selection_attention
from .arguments import AttentionShapes, HeadShape, OtherBranches
from .backward_inputs import BranchGate, prepare_backward
from .choice_lists import count_lists
from .compression_plan import CompressionPlan
from .key_gradients import key_gradients
from .key_rows import KeyOrders, keys_in_order
from .score_bounds import bounds_of_branches
from .segment_attention import SegmentAttention
from .segment_plan import SegmentPlan
from .selection_attention import SelectedAttention
from .selection_plan import SelectionPlan, chunk_size_of
from .tile_shapes import TileShapes, shapes_for


if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....sparse_tensor import CoordinateCache
    from ...coordinates import Partition


__all__ = [
    "HeadShape",
    "Plan",
    "TileShapes",
    "make_plan",
    "plan_attention",
    "select_blocks",
    "selected_attention",
    "spatial_sparse_attention",
    "window_attention",
]


class _PlanFields(NamedTuple):
    """Of a `Plan`: first tensors, then integers.

    Attributes:
        order, inverse, cu_blocks: the N tokens in selection blocks, see `SelectionPlan`.
        cu_tokens: `[B + 1]` int32, where each sample starts in `order`.
        cu_compressed: `[B + 1]` int32, where the compressed keys of each sample start.
        compressed_tiles, compressed_backward_tiles, compressed_key_tiles: of the compressed attention, see
            `SegmentPlan`.
        members, key_slots, slot_tiles, block_slots, cu_sample_blocks: of the choice of the blocks, see
            `CompressionPlan`.
        compressed_order: the compressed keys grouped by selection block, `[M]` int64.
        compressed_inverse: and back.
        window_order, window_inverse, cu_windows: the tokens in windows.
        window_tiles, window_backward_tiles, window_key_tiles: of the window attention.
        most_keys, most_slots, most_blocks, most_block_slots: see `CompressionPlan`.
        largest_block: tokens of a selection block at most.
        in_order: whether the tokens come in selection blocks.
        shape_numbers: `TileShapes.numbers`.
    """

    order: Tensor
    inverse: Tensor
    cu_blocks: Tensor
    cu_tokens: Tensor
    cu_compressed: Tensor
    compressed_tiles: Tensor
    compressed_backward_tiles: Tensor
    compressed_key_tiles: Tensor
    members: Tensor
    key_slots: Tensor
    slot_tiles: Tensor
    block_slots: Tensor
    cu_sample_blocks: Tensor
    compressed_order: Tensor
    compressed_inverse: Tensor
    window_order: Tensor
    window_inverse: Tensor
    cu_windows: Tensor
    window_tiles: Tensor
    window_backward_tiles: Tensor
    window_key_tiles: Tensor
    most_keys: int
    most_slots: int
    most_blocks: int
    most_block_slots: int
    largest_block: int
    in_order: int
    shape_numbers: tuple[int, ...]


class Plan(_PlanFields):
    """Everything about the coordinates that the three branches need; what is put together of it is so once."""

    @classmethod
    def of(cls, tensors: Plan | Sequence[Tensor], sizes: Sequence[int]) -> Plan:
        """Of what `flat` returns; a plan, without sizes, is what it is."""
        if isinstance(tensors, Plan):
            return tensors
        return cls(*tensors, *sizes[:_NUM_SIZES], tuple(sizes[_NUM_SIZES:]))

    @property
    def shapes(self) -> TileShapes:
        """Of the tiles; the lists of tiles are made for them."""
        return TileShapes.from_numbers(self.shape_numbers)

    @property
    def flat(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """As the operator takes it: the arguments of `of`."""
        fields = self[:-1]
        return fields[:-_NUM_SIZES], (*fields[-_NUM_SIZES:], *self.shape_numbers)

    @functools.cached_property
    def calls(self) -> RepeatedCalls:
        """Of the operator, for these coordinates."""
        return RepeatedCalls()

    @functools.cached_property
    def orders(self) -> KeyOrders:
        return KeyOrders(self.window_order, self.compressed_order, None if self.in_order else self.order)

    @functools.cached_property
    def inverses(self) -> KeyOrders:
        return KeyOrders(self.window_inverse, self.compressed_inverse, self.inverse)

    @functools.cached_property
    def compression(self) -> CompressionPlan:
        return CompressionPlan(
            None if self.in_order else self.order,
            self.compressed_tiles,
            self.cu_compressed,
            self.members,
            self.key_slots,
            self.slot_tiles,
            self.block_slots,
            self.cu_sample_blocks,
            self.most_keys,
            self.most_slots,
            self.most_blocks,
            self.most_block_slots,
            self.shapes.compressed_forward,
        )

    @functools.cached_property
    def compressed(self) -> SegmentPlan:
        tiles = (self.compressed_tiles, self.compressed_backward_tiles, self.compressed_key_tiles)
        order = None if self.in_order else self.order
        shapes = self.shapes.of("compressed")
        return SegmentPlan(order, self.cu_tokens, self.cu_compressed, *tiles, shapes)

    @functools.cached_property
    def selection(self) -> SelectionPlan:
        return SelectionPlan(self.order, self.inverse, self.cu_blocks, self.largest_block, self.shapes.of("selection"))

    @functools.cached_property
    def window(self) -> SegmentPlan:
        tiles = (self.window_tiles, self.window_backward_tiles, self.window_key_tiles)
        shapes = self.shapes.of("window")
        return SegmentPlan(self.window_order, self.cu_windows, self.cu_windows, *tiles, shapes)


# The integers of a plan before its shapes.
_NUM_SIZES = 6


def _compression_plan(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    heads: HeadShape,
    shapes: TileShapes,
    dtype: torch.dtype,
) -> tuple[SegmentPlan, CompressionPlan, Partition]:
    """For the compressed attention and its gradients, and the compressed keys in selection blocks."""

    def make() -> tuple[SegmentPlan, CompressionPlan, Partition]:
        selection = cache.partition(selection_block_size)
        compressed, _ = cache.downsample(compression_block_size)
        ratio = selection_block_size // compression_block_size
        forward = CompressionPlan.make(selection, compressed, ratio, heads, shapes.compressed_forward, dtype)
        cu_queries = selection.cu_seqlens[selection.batch_cu_blocks.long()]
        segments = SegmentPlan.make(
            forward.order, cu_queries, compressed.cu_seqlens, heads, shapes.of("compressed"), forward.tiles
        )
        return segments, forward, compressed.partition(ratio)

    # As text: `torch.compile` of older versions knows no keys that are classes, not even to look up another one.
    key = repr(("ssa compression", compression_block_size, selection_block_size, heads, shapes, dtype))
    return cache.derived(key, make)


def _window_plan(
    cache: CoordinateCache, window_size: int, window_shift: int, heads: HeadShape, shapes: AttentionShapes
) -> SegmentPlan:
    def make() -> SegmentPlan:
        windows = cache.partition(window_size, window_shift)
        return SegmentPlan.make(windows.order, windows.cu_seqlens, windows.cu_seqlens, heads, shapes)

    return cache.derived(repr(("ssa window", window_size, window_shift, heads, shapes)), make)


def make_plan(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    window_size: int,
    window_shift: int,
    heads: HeadShape,
    shapes: TileShapes,
    dtype: torch.dtype,
) -> Plan:
    segments, forward, compressed = _compression_plan(
        cache, compression_block_size, selection_block_size, heads, shapes, dtype
    )
    window = _window_plan(cache, window_size, window_shift, heads, shapes.of("window"))
    selection, windows = cache.partition(selection_block_size), cache.partition(window_size, window_shift)
    return Plan(
        order=selection.order,
        inverse=selection.inverse,
        cu_blocks=selection.cu_seqlens,
        cu_tokens=segments.cu_queries,
        cu_compressed=segments.cu_keys,
        compressed_tiles=segments.query_tiles,
        compressed_backward_tiles=segments.backward_query_tiles,
        compressed_key_tiles=segments.key_tiles,
        members=forward.members,
        key_slots=forward.key_slots,
        slot_tiles=forward.slot_tiles,
        block_slots=forward.block_slots,
        cu_sample_blocks=forward.cu_blocks,
        compressed_order=compressed.order,
        compressed_inverse=compressed.inverse,
        window_order=windows.order,
        window_inverse=windows.inverse,
        cu_windows=windows.cu_seqlens,
        window_tiles=window.query_tiles,
        window_backward_tiles=window.backward_query_tiles,
        window_key_tiles=window.key_tiles,
        most_keys=forward.most_keys,
        most_slots=forward.most_slots,
        most_blocks=forward.most_blocks,
        most_block_slots=forward.most_block_slots,
        largest_block=selection.max_seqlen,
        in_order=int(forward.order is None),
        shape_numbers=shapes.numbers,
    )


# Waits for the GPU: tracing would end here. Nothing of this runs where the plan is made before.
@torch.compiler.disable
def _make_flat_plan(
    cache: CoordinateCache, settings: tuple[int, int, int, int], heads: HeadShape, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return make_plan(cache, *settings, heads, shapes_for(heads, dtype, cache.coords.device), dtype).flat


def plan_attention(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    window_size: int,
    window_shift: int,
    heads: HeadShape,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors and integers that the operator takes from the coordinates, made at the first call for a cache."""
    settings = (compression_block_size, selection_block_size, window_size, window_shift)
    return cache.derived(
        _plan_key("flat", settings, heads, dtype), lambda: _make_flat_plan(cache, settings, heads, dtype)
    )


def _plan_key(form: str, settings: tuple[int, ...], heads: HeadShape, dtype: torch.dtype) -> tuple[Any, ...]:
    # Flat, and no class: `torch.compile` looks it up too.
    return ("ssa", form, *settings, heads.num_kv_heads, heads.group_size, heads.dim, heads.value_dim, dtype)


def _in_blocks(parts: Plan, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens, grouped by selection block."""
    if parts.in_order:
        return key.contiguous(), value.contiguous()
    return key.index_select(0, parts.order), value.index_select(0, parts.order)


@operator(
    "diffusers_sparse3d::spatial_sparse_attention",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor compressed_key, Tensor compressed_value, Tensor gate, "
        "Tensor[] plan, SymInt[] sizes, SymInt topk, float scale, SymInt query_chunk_size, bool keep) "
        "-> (Tensor, Tensor[])"
    ),
)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    topk: int,
    scale: float,
    query_chunk_size: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The three branches and their gated sum.

    Args:
        query, key, value, compressed_key, compressed_value, gate, topk, scale: as in
            `ops.spatial_sparse_attention.spatial_sparse_attention`; all but `gate` in one dtype.
        plan, sizes: what `plan_attention` returns.
        query_chunk_size: as in `compressed_attention.attend_and_select`.
        keep: whether there will be a backward pass.

    Returns:
        `[N, H, D_v]`, and what the backward pass needs, if there is one: keys, values, output and log-sum-exp of
        compressed attention, of selection with the chosen blocks, and of windows.
    """
    parts, settings = Plan.of(plan, sizes), (topk, scale, query_chunk_size, keep)
    output, *saved = parts.calls(
        ("forward", *settings, dot_precision(query.dtype)),
        lambda *tensors: _forward(*tensors, parts, *settings),
        (query, key, value, compressed_key, compressed_value, gate),
    )
    return output, saved


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    parts: Plan,
    topk: int,
    scale: float,
    query_chunk_size: int,
    keep: bool,
) -> list[Tensor]:
    """Arguments as in `_attend`; the output, then what is saved."""
    query, gate = query.contiguous(), gate.contiguous()
    counter = torch.empty(1, dtype=torch.int32, device=query.device)
    keys = keys_in_order(key, value, compressed_key, compressed_value, parts.orders, counter)
    bounds, selected_bounds = bounds_of_branches(query, keys.block[0], keys.compressed[0], parts.most_keys)
    compressed, compressed_sum, blocks = compressed_attention.attend_and_select(
        query, *keys.compressed, parts.compression, topk, scale, bounds, query_chunk_size, counter
    )
    window, window_sum = segment_attention.attend(query, *keys.window, parts.window, scale)
    output = torch.empty_like(compressed) if keep else compressed
    others = OtherBranches(gate, compressed, window, output)
    selected, selected_sum, *choices = selection_attention.attend(
        query, *keys.block, blocks, parts.selection, scale, selected_bounds, others, keep
    )
    if not keep:
        return [output]
    return [
        output,
        *(*keys.compressed, compressed, compressed_sum),
        *(blocks, *choices, selected, selected_sum),
        *(*keys.window, window, window_sum),
    ]


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    topk: int,
    scale: float,
    query_chunk_size: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    parts = Plan.of(plan, sizes)

    def branch(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
        log_sum = query.new_empty(query.shape[0], query.shape[1], dtype=torch.float32)
        return key.new_empty(key.shape), value.new_empty(value.shape), output, log_sum

    if not keep:
        return value.new_empty(query.shape[0], query.shape[1], value.shape[2]), []
    *_, selected, selected_sum = branch(key, value)
    num_blocks = torch.sym_min(topk, parts.most_blocks)
    blocks = query.new_empty(query.shape[0], key.shape[1], num_blocks, dtype=torch.int32)
    chunk_size = chunk_size_of(blocks.shape, HeadShape.of(query, key, value), query.dtype)
    num_lists = count_lists(*blocks.shape[:2], parts.cu_blocks.shape[0] - 1, chunk_size)
    starts, choices = blocks.new_empty(num_lists + 1), blocks.new_empty(blocks.numel(), dtype=torch.int64)
    return torch.empty_like(selected), [
        *branch(compressed_key, compressed_value),
        *(blocks, starts, choices, selected, selected_sum),
        *branch(key, value),
    ]


@operator(
    "diffusers_sparse3d::spatial_sparse_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor gate, Tensor[] saved, Tensor[] plan, "
        "SymInt[] sizes, float scale) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    saved: Sequence[Tensor],
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six arguments. The kernels apply the gates, and add to one gradient of the query.

    Args:
        grad_output: `[N, H, D_v]`.
        query, key, value, gate, plan, sizes, scale: what the operator was called with.
        saved: its second result.
    """
    parts = Plan.of(plan, sizes)
    return tuple(
        parts.calls(
            ("backward", scale, dot_precision(query.dtype)),
            lambda *tensors: _backward(*tensors[:5], tensors[5:], parts, scale),
            (grad_output, query, key, value, gate, *saved),
        )
    )


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    saved: Sequence[Tensor],
    parts: Plan,
    scale: float,
) -> tuple[Tensor, ...]:
    """Arguments and results as in `_attend_backward`."""
    query, grad_output, gate = query.contiguous(), grad_output.contiguous(), gate.contiguous()
    grad_gate = torch.empty_like(gate)
    compressed, selected, window = saved[:2], saved[4:7], saved[9:11]
    # Prepared one after the other, so that only one has its gradient in memory.
    inputs = prepare_backward(*saved[2:4], grad_output, scale, BranchGate(gate, grad_gate, 0))
    grad_query, *compressed_parts = segment_attention.attend_backward(
        query, *compressed, inputs, parts.compressed, scale
    )
    del inputs
    inputs = prepare_backward(*saved[7:9], grad_output, scale, BranchGate(gate, grad_gate, 1))
    grad_query, *selected_gradients = selection_attention.attend_backward(
        query, *_in_blocks(parts, key, value), *selected, inputs, parts.selection, scale, grad_query
    )
    del inputs
    inputs = prepare_backward(*saved[11:13], grad_output, scale, BranchGate(gate, grad_gate, 2))
    grad_query, *window_parts = segment_attention.attend_backward(
        query, *window, inputs, parts.window, scale, grad_query
    )
    gradients = key_gradients(*selected_gradients, window_parts, compressed_parts, parts.inverses, query.dtype)
    return grad_query, *gradients, grad_gate


@_attend_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    saved: Sequence[Tensor],
    plan: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, ...]:
    compressed_key, compressed_value, *_ = saved
    tensors = (query, key, value, compressed_key, compressed_value, gate)
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    query, key, value, _, _, gate, plan, sizes, _, scale, _, _ = inputs
    saved = output[1]
    # A whole plan is not of tensors that autograd has to know.
    ctx.plan, tensors = (plan, ()) if isinstance(plan, Plan) else (None, plan)
    ctx.save_for_backward(query, key, value, gate, *saved, *tensors)
    ctx.num_saved, ctx.sizes, ctx.scale = len(saved), sizes, scale
    ctx.mark_non_differentiable(*saved)
    # Else zeros would be made for each of them.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor, _: list[Tensor | None]) -> tuple[Any, ...]:
    # Asked for once: activation checkpointing hands them out once.
    query, key, value, gate, *tensors = ctx.saved_tensors
    saved, plan = tensors[: ctx.num_saved], tensors[ctx.num_saved :]
    plan = plan if ctx.plan is None else ctx.plan
    gradients = _attend_backward(grad_output, query, key, value, gate, saved, plan, ctx.sizes, ctx.scale)
    return *gradients, [None] * len(plan), *(None,) * 5


_attend.register_autograd(_gradients, setup_context=_keep)


@torch.no_grad()
def select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `reference.select_blocks`; attends to the compressed keys as well."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = HeadShape.of(query, compressed_key, compressed_key)
    shapes = shapes_for(heads, query.dtype, query.device)
    _, plan, partition = _compression_plan(
        cache, compression_block_size, selection_block_size, heads, shapes, query.dtype
    )
    query, compressed_key = query.contiguous(), compressed_key[partition.order]
    *_, blocks = compressed_attention.attend_and_select(
        query, compressed_key, compressed_key, plan, topk, scale, query_chunk_size=query_chunk_size or 0
    )
    return blocks.long()


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, selection: Partition, scale: float | None = None
) -> Tensor:
    """Arguments and result as in `reference.selected_attention`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shapes = shapes_for(HeadShape.of(query, key, value), query.dtype, query.device)
    plan = SelectionPlan.of(selection, shapes.of("selection"))
    return SelectedAttention.apply(query, key, value, blocks, plan, scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: CoordinateCache,
    window_size: int,
    window_shift: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attention inside the windows (x, y, z + `window_shift`) // `window_size`.

    Args:
        query: `[N, H, D]`.
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        cache: the N voxels, in any order.
        window_size: edge of a window.
        window_shift: added to the coordinates first.
        scale: factor of the scores, positive; 1 / sqrt(D) if None.

    Returns:
        `[N, H, D_v]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = HeadShape.of(query, key, value)
    shapes = shapes_for(heads, query.dtype, query.device)
    plan = _window_plan(cache, window_size, window_shift, heads, shapes.of("window"))
    # A permutation: no row is added to twice in the backward pass.
    return SegmentAttention.apply(query, key[plan.order], value[plan.order], plan, scale)


def spatial_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    window_size: int,
    window_shift: int = 0,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `ops.spatial_sparse_attention.spatial_sparse_attention`.

    Everything is computed in the dtype of `value`. `query_chunk_size` bounds the scratch buffer of the choice of the
    blocks, for which memory grows with the compressed keys.
    """
    if query.shape[0] == 0:
        return value.new_zeros(0, query.shape[1], value.shape[-1])
    dtype, heads = value.dtype, HeadShape.of(query, key, value)
    settings = (compression_block_size, selection_block_size, window_size, window_shift)
    if is_traced(query):
        plan, sizes = plan_attention(cache, *settings, heads, dtype)
    else:
        # Taken apart for tracers alone.
        whole = _plan_key("whole", settings, heads, dtype)
        plan, sizes = cache.derived(whole, lambda: Plan.of(*plan_attention(cache, *settings, heads, dtype))), ()
    tensors = (query, key, value, compressed_key, compressed_value)
    tensors = (*(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors), gate)
    output, _ = _attend(
        *tensors,
        plan,
        sizes,
        topk,
        query.shape[-1] ** -0.5 if scale is None else scale,
        query_chunk_size or 0,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )
    return output
