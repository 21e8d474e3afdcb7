"""Calls of a model replayed as CUDA graphs: for small inputs, launching kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn


class CapturedCall:
    """A function of tensors on one GPU, captured as a CUDA graph and then replayed with other tensors of the same
    shapes, without gradients.

    Args:
        function: must not wait for the GPU, and must always launch the same kernels. It is called twice.
        inputs: its first arguments.
        keep: an object that must stay in memory as long as the graph.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], keep: Any = None):
        self._inputs, self._keep = tuple(tensor.clone() for tensor in inputs), keep
        with torch.cuda.device_of(inputs[0]):
            # A first call compiles kernels and lets libraries make their handles, on a stream that is not the default.
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function(*self._inputs)
            current.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Thread-local, so that other threads may go on using the GPU.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.cuda.device_of(inputs[0]):
            for kept, given in zip(self._inputs, inputs):
                kept.copy_(given)
            self._graph.replay()
            return self._output.clone()


def capture_key(model: nn.Module, inputs: tuple[Tensor, ...]) -> Hashable:
    """Key under which a captured call of a model may be replayed, or None if the call cannot be captured.

    The key names everything that the call depends on beside the values of its inputs. A call cannot be captured where
    gradients are wanted, on a CPU, under autocast, or while something else compiles or captures it; nor if it differs
    from call to call: with LoRA layers, whose scale changes, or with hooks on parts of the model, which move weights
    or skip blocks.
    """
    if not inputs[0].is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return None
    modules = list(model.modules())
    if getattr(model, "peft_config", None) or any(hasattr(part, "_hf_hook") for part in modules[1:]):
        return None
    # `cache_context` leaves a registry without hooks on a model.
    registries = [getattr(part, "_diffusers_hook", None) for part in modules]
    if any(registry is not None and registry.hooks for registry in registries):
        return None
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())
    processors = tuple(id(part.processor) for part in modules if hasattr(part, "processor"))
    return (weights, processors, *((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs))
