"""Timestep modulation as operators of PyTorch, with gradients. Needs the package triton.

Both take the fields of `SampleRows` as plain tensors, which `torch.compile` can trace.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..runtime.operators import operator
from .kernels.gated_sum import gated_rows, gated_sum
from .kernels.layer_norm import modulated_norm
from .kernels.layer_norm_backward import modulated_norm_backward
from .kernels.sample_sums import sample_sums


_SAMPLES = "Tensor? index, Tensor? cu_rows, Tensor? order"


@operator(
    "diffusers_sparse3d::modulated_layer_norm",
    mutates_args=(),
    schema=f"(Tensor hidden_states, Tensor shift, Tensor scale, {_SAMPLES}, float eps, float offset) -> Tensor",
)
def normalize_and_modulate(
    hidden_states: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    cu_rows: Tensor | None,
    order: Tensor | None,
    eps: float,
    offset: float,
) -> Tensor:
    """The result of `ops.modulation.modulated_layer_norm`, `[N, C]`."""
    return modulated_norm(hidden_states.contiguous(), shift, scale, index, eps, offset)


@normalize_and_modulate.register_fake
def _(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@operator(
    "diffusers_sparse3d::modulated_layer_norm_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor hidden_states, Tensor scale, {_SAMPLES}, float eps, float offset)"
    " -> (Tensor, Tensor, Tensor)",
)
def _normalize_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    scale: Tensor,
    index: Tensor | None,
    cu_rows: Tensor | None,
    order: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of tokens `[N, C]`, shift and scale `[B, C]`."""
    grad_output, hidden_states = grad_output.contiguous(), hidden_states.contiguous()
    grad_hidden_states, statistics = modulated_norm_backward(grad_output, hidden_states, scale, index, eps, offset)
    grad_shift, grad_scale = sample_sums(
        grad_output, hidden_states, statistics, scale.shape[0], cu_rows, order, scale.dtype, plain=True
    )
    return grad_hidden_states, grad_shift, grad_scale


@_normalize_backward.register_fake
def _(grad_output: Tensor, hidden_states: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden_states.new_empty(hidden_states.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_states, _, scale, index, cu_rows, order, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(hidden_states, scale, index, cu_rows, order)


def _norm_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_normalize_backward(grad_output, *ctx.saved_tensors, ctx.eps, ctx.offset), *(None,) * 5


normalize_and_modulate.register_autograd(_norm_gradients, setup_context=_keep_norm)


@operator(
    "diffusers_sparse3d::gated_sum",
    mutates_args=(),
    schema=f"(Tensor residual, Tensor values, Tensor gate, {_SAMPLES}) -> Tensor",
)
def add_gated(
    residual: Tensor,
    values: Tensor,
    gate: Tensor,
    index: Tensor | None,
    cu_rows: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    """The result of `ops.modulation.gated_sum`, `[N, C]`."""
    return gated_sum(residual.contiguous(), values.contiguous(), gate, index)


@add_gated.register_fake
def _(residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


@operator(
    "diffusers_sparse3d::gated_sum_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor values, Tensor gate, {_SAMPLES}) -> (Tensor, Tensor)",
)
def _add_gated_backward(
    grad_output: Tensor,
    values: Tensor,
    gate: Tensor,
    index: Tensor | None,
    cu_rows: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of values `[N, C]` and gate `[B, C]`."""
    grad_output, values = grad_output.contiguous(), values.contiguous()
    (grad_gate,) = sample_sums(grad_output, values, None, gate.shape[0], cu_rows, order, gate.dtype, plain=False)
    return gated_rows(grad_output, gate, index, values.dtype), grad_gate


@_add_gated_backward.register_fake
def _(grad_output: Tensor, values: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), gate.new_empty(gate.shape)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _sum_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return grad_output, *_add_gated_backward(grad_output, *ctx.saved_tensors), None, None, None


add_gated.register_autograd(_sum_gradients, setup_context=_keep_sum)
