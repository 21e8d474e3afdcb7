"""The feed-forward network of the transformer blocks, with its activation inside the first matrix product."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn


class GELUFeedForward(FeedForward):
    """diffusers' `FeedForward` with the GELU in its tanh approximation.

    Without gradients, in half precision on a GPU, cuBLAS applies bias and GELU before it writes the first product: one
    pass over the wide activations in place of three, and one rounding in place of two. On x86 CPUs, oneDNN does it in
    float32, and is given the second product as well: 27 ms for 2,606 tokens of 256 channels on one core, where the
    layers take 35. Otherwise, and where a layer is not a plain linear one (LoRA, quantised weights, hooks), the layers
    are called one by one.

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
        activated = dropout(_product_with_gelu(activation.proj, hidden_states.flatten(0, -2)))
        if activated.is_cuda or not is_plain_linear(proj_out):
            return proj_out(activated).unflatten(0, hidden_states.shape[:-1])
        return _onednn_product(proj_out, activated).unflatten(0, hidden_states.shape[:-1])


def _product_with_gelu(proj: nn.Linear, rows: Tensor) -> Tensor:
    """The GELU, in its tanh approximation, of a linear layer of `[N, dim]` rows."""
    if rows.is_cuda:
        # The GELU of this function is the tanh approximation on a GPU; on a CPU it would be the exact one.
        return torch._addmm_activation(proj.bias, rows, proj.weight.t(), use_gelu=True)
    return _onednn_product(proj, rows, "gelu", "tanh")


def _onednn_product(proj: nn.Linear, rows: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
    """A linear layer of `[N, dim]` rows by oneDNN, with an activation in the terms of PyTorch's compiler."""
    return torch.ops.mkldnn._linear_pointwise(rows, proj.weight, proj.bias, activation, [], algorithm)


def _can_fuse(activation: Any, hidden_states: Tensor) -> bool:
    """Whether the first layer and its activation may be computed as one matrix product."""
    proj, device_type = activation.proj, hidden_states.device.type
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _has_fused_product(hidden_states):
        return False
    if torch.is_autocast_enabled(device_type) or not is_plain_linear(proj) or proj.bias is None:
        return False
    return not is_hooked(activation) and proj.weight.dtype == hidden_states.dtype and hidden_states.numel() > 0


def _has_fused_product(hidden_states: Tensor) -> bool:
    """Whether a library for the device and dtype of the tokens computes a product with its GELU, and faster so."""
    if hidden_states.is_cuda:
        return hidden_states.dtype in (torch.float16, torch.bfloat16) and torch.version.hip is None
    return hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32 and _has_onednn()


def _has_onednn() -> bool:
    """Whether PyTorch runs oneDNN on this CPU, and has the operator by which its compiler calls it."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of a module is the product with its weight, and nothing else."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks, or another forward method than that of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
