"""The feed-forward network of the transformer blocks, with its activation inside the first matrix product."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn


class GELUFeedForward(FeedForward):
    """diffusers' `FeedForward` with the GELU in its tanh approximation.

    Without gradients, in half precision on a GPU, cuBLAS applies bias and GELU before it writes the first product: one
    pass over the wide activations in place of three, and one rounding in place of two. Otherwise, and where a layer is
    not a plain linear one (LoRA, quantised weights, hooks), the layers are called one by one.

    Args:
        dim: channels of the tokens.
        inner_dim: channels between the two layers.
    """

    def __init__(self, dim: int, inner_dim: int | None = None):
        super().__init__(dim, inner_dim=inner_dim, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        # `Any`, because the type of a module's attribute is not known.
        layers: Any = self.net
        activation, dropout, proj_out = layers
        if not _can_fuse(activation, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        rows, proj = hidden_states.flatten(0, -2), activation.proj
        # The GELU of this function is the tanh approximation on a GPU.
        activated = torch._addmm_activation(proj.bias, rows, proj.weight.t(), use_gelu=True)
        return proj_out(dropout(activated)).unflatten(0, hidden_states.shape[:-1])


def _can_fuse(activation: Any, hidden_states: Tensor) -> bool:
    """Whether the first layer and its activation may be computed as one matrix product."""
    proj = activation.proj
    if not hidden_states.is_cuda or hidden_states.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    if torch.version.hip is not None or not is_plain_linear(proj) or proj.bias is None or is_hooked(activation):
        return False
    return proj.weight.dtype == hidden_states.dtype and hidden_states.numel() > 0


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of a module is the product with its weight, and nothing else."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks, or another forward method than that of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
