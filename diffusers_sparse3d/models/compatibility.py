"""Interfaces of diffusers that are private, or differ between its versions: this file alone depends on them.

- The registries of transformer blocks and attention processors, by which the caches and the layer skipping of
  diffusers know models. From diffusers 0.36 to 0.42 there is no public way to register a class.
- The hook by which FasterCache runs a model, and the registry of hooks on a module.
- `apply_lora_scale`, which diffusers 0.36 does not have yet.
- The argument of `from_pretrained` that is called `dtype` today and was called `torch_dtype`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers.utils
import torch
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.hooks.faster_cache import _FASTER_CACHE_DENOISER_HOOK as FASTER_CACHE_DENOISER_HOOK
from diffusers.hooks.faster_cache import FasterCacheDenoiserHook
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor, nn


try:
    from diffusers.utils import apply_lora_scale
except ImportError:
    from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

    def apply_lora_scale(kwargs_name: str) -> Callable[[Callable], Callable]:
        """Decorator of `forward` that weights LoRA layers with the `scale` in the argument `kwargs_name`."""

        def decorator(forward: Callable) -> Callable:
            @functools.wraps(forward)
            def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                attention_kwargs = dict(kwargs.get(kwargs_name) or {})
                lora_scale = attention_kwargs.pop("scale", 1.0)
                if kwargs.get(kwargs_name) is not None:
                    kwargs[kwargs_name] = attention_kwargs
                if not USE_PEFT_BACKEND:
                    return forward(self, *args, **kwargs)
                scale_lora_layers(self, lora_scale)
                try:
                    return forward(self, *args, **kwargs)
                finally:
                    unscale_lora_layers(self, lora_scale)

            return wrapper

        return decorator


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """The keyword argument of `from_pretrained` for the dtype, by the name that the installed diffusers knows."""
    return {"dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype": dtype}


def register_block(block_class: type[nn.Module]) -> None:
    """Make a transformer block known to diffusers; its `forward` takes `hidden_states` first and returns them."""
    TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(return_hidden_states_index=0))


def register_processor(processor_class: type) -> None:
    """Make an attention processor known to diffusers: where it is skipped, its `hidden_states` are the output."""
    AttentionProcessorRegistry.register(processor_class, AttentionProcessorMetadata(_skip_attention))


def _skip_attention(attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


__all__ = [
    "FASTER_CACHE_DENOISER_HOOK",
    "FasterCacheDenoiserHook",
    "HookRegistry",
    "apply_lora_scale",
    "dtype_argument",
    "register_block",
    "register_processor",
]
