"""Spatial Sparse Attention as an operator of PyTorch, run by Triton kernels. Needs the package triton.

The operator takes float16, bfloat16 or float32, accumulates in float32, and gets what depends on the coordinates as a
plan. It is opaque to `torch.compile` and transfers nothing to the host, so it may be captured in a CUDA graph as long
as the plan lives. Its arguments are stated once, by `Inputs` and `Settings`; the schemas are made from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..runtime.dispatch import dot_precision
from ..runtime.operators import is_traced, operator
from .kernels import compressed_attention, segment_attention, selection_attention
from .kernels.arguments import HeadShape, KeyGradients, OtherBranches
from .kernels.backward_inputs import BranchGate, prepare_backward
from .kernels.choice_lists import count_lists
from .kernels.key_gradients import key_gradients
from .kernels.key_rows import keys_in_order
from .kernels.score_bounds import bounds_of_branches
from .kernels.selection_plan import chunk_size_of
from .plan import Plan, flat_plan, whole_plan


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


class Inputs(NamedTuple):
    """The tensors that the operator takes and has gradients for, all but `gate` in one dtype.

    Attributes:
        query: `[N, H, D]`.
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        compressed_key: `[M, H_kv, D]`.
        compressed_value: `[M, H_kv, D_v]`.
        gate: `[N, 3]` weights of compression, selection and window.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    compressed_key: Tensor
    compressed_value: Tensor
    gate: Tensor


class Settings(NamedTuple):
    """The numbers that the operator takes.

    Attributes:
        topk: selection blocks per query and key/value head.
        scale: factor of the scores.
        query_chunk_size: queries whose blocks are chosen at once; 0 for a fixed memory budget.
        keep: whether there will be a backward pass.
    """

    topk: int
    scale: float
    query_chunk_size: int
    keep: bool


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass. Log-sum-exps are in base 2.

    Attributes:
        compressed_keys: `[M, H_kv, D]` compressed keys, grouped by selection block.
        compressed_values: `[M, H_kv, D_v]` compressed values in the same order.
        compressed_output: `[N, H, D_v]` output of compressed attention.
        compressed_log_sum: `[N, H]` float32, its log-sum-exp.
        blocks: `[N, H_kv, k]` int32, the chosen selection blocks.
        starts: `[lists + 1]` int32, see `SortedChoices`.
        choices: `[N * H_kv * k]` int64, see `SortedChoices`.
        selected_output: `[N, H, D_v]` output of the attention to the chosen blocks.
        selected_log_sum: `[N, H]` float32, its log-sum-exp.
        window_keys: `[N, H_kv, D]` keys, grouped by window.
        window_values: `[N, H_kv, D_v]` values in the same order.
        window_output: `[N, H, D_v]` output of window attention.
        window_log_sum: `[N, H]` float32, its log-sum-exp.
    """

    compressed_keys: Tensor
    compressed_values: Tensor
    compressed_output: Tensor
    compressed_log_sum: Tensor
    blocks: Tensor
    starts: Tensor
    choices: Tensor
    selected_output: Tensor
    selected_log_sum: Tensor
    window_keys: Tensor
    window_values: Tensor
    window_output: Tensor
    window_log_sum: Tensor


class GradientInputs(NamedTuple):
    """The tensors that the operator of the backward pass takes besides `Saved`: fields as in `Inputs`.

    Attributes:
        grad_output: `[N, H, D_v]`, the gradient of the operator's output.
    """

    grad_output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor


_NUM_INPUTS = len(Inputs._fields)
_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool"}


def _parameters(fields: type) -> str:
    """The fields of a named tuple as parameters in a schema of PyTorch."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


@operator(
    "diffusers_sparse3d::spatial_sparse_attention",
    kept_by_checkpoints=True,
    mutates_args=(),
    schema=(f"({_parameters(Inputs)}, Tensor[] plan, SymInt[] sizes, {_parameters(Settings)}) -> (Tensor, Tensor[])"),
)
def attend_with_plan(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The gated sum of the three branches.

    Args:
        arguments: the fields of `Inputs`; the plan, as the two parts of a `FlatPlan`, or as a `Plan` and an empty
            tuple; the fields of `Settings`.

    Returns:
        The output `[N, H, D_v]`, and the tensors of `Saved`, or none if there will be no backward pass.
    """
    tensors, settings = arguments[:_NUM_INPUTS], arguments[_NUM_INPUTS + 2 :]
    plan = Plan.of(arguments[_NUM_INPUTS], arguments[_NUM_INPUTS + 1])
    # Named tuples are made only where the call is not repeated from its record, as making them takes the host time.
    output, *saved = plan.calls(
        lambda *tensors: _forward(Inputs(*tensors), plan, Settings(*settings)),
        tensors,
        function_name="forward",
        precision=dot_precision(tensors[0].dtype),
        **dict(zip(Settings._fields, settings)),
    )
    return output, saved


def _forward(inputs: Inputs, plan: Plan, settings: Settings) -> list[Tensor]:
    """The output, followed by the tensors of `Saved` if there will be a backward pass."""
    topk, scale, query_chunk_size, keep = settings
    query, gate = inputs.query.contiguous(), inputs.gate.contiguous()
    counter = torch.empty(1, dtype=torch.int32, device=query.device)
    keys = keys_in_order(*inputs[1:5], plan.orders, counter)
    bounds, selected_bounds = bounds_of_branches(query, keys.block[0], keys.compressed[0], plan.most_keys)
    compressed, compressed_log_sum, blocks = compressed_attention.attend_and_select(
        query, *keys.compressed, plan.compression, topk, scale, bounds, query_chunk_size, counter
    )
    window, window_log_sum = segment_attention.attend(query, *keys.window, plan.window, scale)
    # Without a backward pass, the sum of the branches may take the place of the compressed attention.
    output = torch.empty_like(compressed) if keep else compressed
    others = OtherBranches(gate, compressed, window, output)
    selected, selected_log_sum, starts, choices = selection_attention.attend(
        query, *keys.block, blocks, plan.selection, scale, selected_bounds, others, keep
    )
    if selected is None or selected_log_sum is None:
        return [output]
    compressed_keys, compressed_values = keys.compressed
    window_keys, window_values = keys.window
    saved = Saved(
        compressed_keys=compressed_keys,
        compressed_values=compressed_values,
        compressed_output=compressed,
        compressed_log_sum=compressed_log_sum,
        blocks=blocks,
        starts=starts,
        choices=choices,
        selected_output=selected,
        selected_log_sum=selected_log_sum,
        window_keys=window_keys,
        window_values=window_values,
        window_output=window,
        window_log_sum=window_log_sum,
    )
    return [output, *saved]


@attend_with_plan.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    inputs, settings = Inputs(*arguments[:_NUM_INPUTS]), Settings(*arguments[_NUM_INPUTS + 2 :])
    plan = Plan.of(arguments[_NUM_INPUTS], arguments[_NUM_INPUTS + 1])
    query, key, value = inputs.query, inputs.key, inputs.value

    def output() -> Tensor:
        return value.new_empty(query.shape[0], query.shape[1], value.shape[2])

    def log_sum() -> Tensor:
        return query.new_empty(query.shape[0], query.shape[1], dtype=torch.float32)

    if not settings.keep:
        return output(), []
    num_blocks = torch.sym_min(settings.topk, plan.most_blocks)
    blocks = query.new_empty(query.shape[0], key.shape[1], num_blocks, dtype=torch.int32)
    chunk_size = chunk_size_of(blocks.shape, HeadShape.of(query, key, value), query.dtype)
    num_lists = count_lists(query.shape[0], key.shape[1], plan.cu_blocks.shape[0] - 1, chunk_size)
    saved = Saved(
        compressed_keys=inputs.compressed_key.new_empty(inputs.compressed_key.shape),
        compressed_values=inputs.compressed_value.new_empty(inputs.compressed_value.shape),
        compressed_output=output(),
        compressed_log_sum=log_sum(),
        blocks=blocks,
        starts=blocks.new_empty(num_lists + 1),
        choices=blocks.new_empty(blocks.numel(), dtype=torch.int64),
        selected_output=output(),
        selected_log_sum=log_sum(),
        window_keys=key.new_empty(key.shape),
        window_values=value.new_empty(value.shape),
        window_output=output(),
        window_log_sum=log_sum(),
    )
    return output(), [*saved]


@operator(
    "diffusers_sparse3d::spatial_sparse_attention_backward",
    mutates_args=(),
    schema=(
        f"({_parameters(GradientInputs)}, Tensor[] saved, Tensor[] plan, SymInt[] sizes, float scale) "
        f"-> ({', '.join(['Tensor'] * _NUM_INPUTS)})"
    ),
)
def attend_backward_with_plan(*arguments: Any) -> Sequence[Tensor]:
    """The gradients of the `Inputs` of `attend_with_plan`.

    Args:
        arguments: the fields of `GradientInputs`, the list of tensors that `attend_with_plan` saved, and the plan and
            the scale that it was called with.
    """
    *tensors, saved, plan, sizes, scale = arguments
    num_tensors, whole_plan = len(tensors), Plan.of(plan, sizes)
    gradients = whole_plan.calls(
        lambda *tensors: _backward(
            GradientInputs(*tensors[:num_tensors]), Saved(*tensors[num_tensors:]), whole_plan, scale
        ),
        (*tensors, *saved),
        function_name="backward",
        precision=dot_precision(tensors[1].dtype),
        scale=scale,
    )
    return tuple(gradients)


def _backward(inputs: GradientInputs, saved: Saved, plan: Plan, scale: float) -> tuple[Tensor, ...]:
    """The gradients of `Inputs`. The kernels apply the gates, and all branches add to one gradient of the query."""
    query, grad_output, gate = (tensor.contiguous() for tensor in (inputs.query, inputs.grad_output, inputs.gate))
    grad_gate = torch.empty_like(gate)
    # The branches are prepared one after the other, so that only one of them has its gradient in memory.
    prepared = prepare_backward(
        saved.compressed_output, saved.compressed_log_sum, grad_output, scale, BranchGate(gate, grad_gate, 0)
    )
    grad_query, *compressed = segment_attention.attend_backward(
        query, saved.compressed_keys, saved.compressed_values, prepared, plan.compressed, scale
    )
    del prepared
    prepared = prepare_backward(
        saved.selected_output, saved.selected_log_sum, grad_output, scale, BranchGate(gate, grad_gate, 1)
    )
    choices = (saved.blocks, saved.starts, saved.choices)
    keys = _in_blocks(plan, inputs.key, inputs.value)
    grad_query, selected_key, selected_value = selection_attention.attend_backward(
        query, *keys, *choices, prepared, plan.selection, scale, grad_query
    )
    del prepared
    prepared = prepare_backward(
        saved.window_output, saved.window_log_sum, grad_output, scale, BranchGate(gate, grad_gate, 2)
    )
    grad_query, *window = segment_attention.attend_backward(
        query, saved.window_keys, saved.window_values, prepared, plan.window, scale, grad_query
    )
    gradients = key_gradients(
        selected_key,
        selected_value,
        KeyGradients(*window),
        KeyGradients(*compressed),
        plan.inverses,
        query.dtype,
    )
    return grad_query, *gradients, grad_gate


def _in_blocks(plan: Plan, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens, grouped by selection block."""
    if plan.in_order:
        return key.contiguous(), value.contiguous()
    return key.index_select(0, plan.order), value.index_select(0, plan.order)


@attend_backward_with_plan.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, saved, _, _, _ = arguments
    inputs, kept = GradientInputs(*tensors), Saved(*saved)
    compressed = (kept.compressed_keys, kept.compressed_values)
    differentiated = Inputs(inputs.query, inputs.key, inputs.value, *compressed, inputs.gate)
    return tuple(tensor.new_empty(tensor.shape) for tensor in differentiated)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    query, key, value, _, _, gate, plan, sizes, *settings = inputs
    saved = output[1]
    # A `Plan` is kept by the cache of the coordinates; the tensors of a flat plan are saved like all others.
    ctx.plan, tensors = (plan, ()) if isinstance(plan, Plan) else (None, plan)
    ctx.save_for_backward(query, key, value, gate, *saved, *tensors)
    ctx.num_saved, ctx.sizes, ctx.scale = len(saved), sizes, Settings(*settings).scale
    ctx.mark_non_differentiable(*saved)
    # Otherwise PyTorch would make zeros as the gradients of all that is saved.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor, _: list[Tensor | None]) -> tuple[Any, ...]:
    # Saved tensors are read once: activation checkpointing computes them again at every access.
    query, key, value, gate, *tensors = ctx.saved_tensors
    saved, plan = tensors[: ctx.num_saved], tensors[ctx.num_saved :]
    plan = plan if ctx.plan is None else ctx.plan
    gradients = attend_backward_with_plan(grad_output, query, key, value, gate, saved, plan, ctx.sizes, ctx.scale)
    # None for the sizes of the plan and for each of the settings.
    return *gradients, [None] * len(plan), None, *(None for _ in Settings._fields)


attend_with_plan.register_autograd(_gradients, setup_context=_keep)


def attend(
    inputs: tuple[Tensor, ...],
    cache: CoordinateCache,
    sizes: tuple[int, int, int, int],
    topk: int,
    scale: float,
    query_chunk_size: int | None,
) -> Tensor:
    """Spatial Sparse Attention by the kernels, in the dtype of `value`.

    Args:
        inputs: the fields of `Inputs`, of at least one token.
        cache: the coordinates of the tokens; it keeps the plan.
        sizes: edges of compression blocks, selection blocks and windows, and the shift of the windows.
        topk: selection blocks per query and key/value head.
        scale: factor of the scores.
        query_chunk_size: queries whose blocks are chosen at once. It bounds the scratch buffer of the choice, whose
            size grows with the number of compressed keys; a fixed memory budget if None.

    Returns:
        `[N, H, D_v]`.
    """
    query, key, value, *_ = inputs
    dtype, heads = value.dtype, HeadShape.of(query, key, value)
    plan = flat_plan(cache, sizes, heads, dtype) if is_traced(query) else (whole_plan(cache, sizes, heads, dtype), ())
    output, _ = attend_with_plan(
        *[tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in inputs[:-1]],
        inputs[-1],
        *plan,
        topk,
        scale,
        query_chunk_size or 0,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs),
    )
    return output
