"""The RMS norm of heads as an operator of PyTorch, with gradients. Needs the package triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..runtime.operators import operator
from .kernels.head_norm import head_norm
from .kernels.head_norm_backward import head_norm_backward


@operator("diffusers_sparse3d::head_rms_norm", mutates_args=())
def normalize_heads(hidden_states: Tensor, gamma: Tensor) -> Tensor:
    """The result of `ops.head_norm.head_rms_norm` for `[N, H, D]`, contiguous."""
    return head_norm(hidden_states, gamma)


@normalize_heads.register_fake
def _(hidden_states: Tensor, gamma: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@operator("diffusers_sparse3d::head_rms_norm_backward", mutates_args=())
def _normalize_heads_backward(grad_output: Tensor, hidden_states: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `hidden_states` `[N, H, D]` and `gamma` `[H, D]`."""
    grad_hidden_states, parts = head_norm_backward(grad_output, hidden_states, gamma)
    return grad_hidden_states, parts.sum(0).to(gamma.dtype)


@_normalize_heads_backward.register_fake
def _(grad_output: Tensor, hidden_states: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_states.new_empty(hidden_states.shape), gamma.new_empty(gamma.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
    return _normalize_heads_backward(grad_output, *ctx.saved_tensors)


normalize_heads.register_autograd(_gradients, setup_context=_keep)
