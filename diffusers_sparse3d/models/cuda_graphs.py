"""Calls of a model replayed as CUDA graphs: for small inputs, launching kernels takes longer than running them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .feed_forward import is_hooked


class CapturedCall:
    """A function of tensors on one GPU, captured as a CUDA graph and then replayed with other tensors of the same
    shapes, without gradients.

    Args:
        function: must not wait for the GPU, and must always launch the same kernels. It has run before, which compiles
            kernels and lets libraries make their handles, and is called once more.
        inputs: its first arguments. What else the function reads must stay in memory as long as this object.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(inputs[0]):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            # `torch.cuda.graph` would also empty the allocator's cache, which the next call would have to fill again.
            with torch.cuda.stream(stream):
                # Thread-local, so that other threads may go on using the GPU.
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._output = function(*self._inputs)
                finally:
                    self._graph.capture_end()
            current.wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.cuda.device_of(inputs[0]):
            for kept, given in zip(self._inputs, inputs):
                kept.copy_(given)
            self._graph.replay()
            return self._output.clone()


class ReplayedCalls:
    """Calls of models without gradients: the first of a kind runs, the second is captured, all others are replayed.

    Calls are of one kind if they have the same `capture_key`. The graphs, with the memory of a call each, live as long
    as this object.

    Args:
        max_tokens: calls with more tokens run as they are; no limit if None.
    """

    def __init__(self, max_tokens: int | None = None):
        self.max_tokens = max_tokens
        # None: the call has run once.
        self._calls: dict[Hashable, CapturedCall | None] = {}

    def __call__(
        self,
        model: nn.Module,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        num_tokens: int,
        keep: tuple[Any, ...] = (),
    ) -> Tensor:
        """
        Args:
            model: whose weights and processors the function uses.
            function: see [`CapturedCall`].
            inputs: all arguments of the function, tensors.
            num_tokens: that the call computes, for `max_tokens`.
            keep: objects that the result depends on besides, which stay in memory as long as this one. Another object
                makes a call of another kind.

        Returns:
            The function's result.
        """
        too_many = self.max_tokens is not None and num_tokens > self.max_tokens
        key = None if too_many else capture_key(model, inputs)
        if key is None:
            return function(*inputs)
        # The objects themselves: an identity may be given again to another one.
        key = (key, keep)
        if key not in self._calls:
            self._calls[key] = None
            return function(*inputs)
        call = self._calls[key]
        if call is None:
            call = self._calls[key] = CapturedCall(function, inputs)
        return call(*inputs)


_active_calls: ContextVar[ReplayedCalls | None] = ContextVar("active_calls", default=None)


@contextlib.contextmanager
def replaying_cuda_graphs(max_tokens: int | None) -> Iterator[None]:
    """Capture and replay the calls of transformers in this thread inside the `with` block.

    Args:
        max_tokens: see [`ReplayedCalls`]; 0 for no graphs.
    """
    token = _active_calls.set(ReplayedCalls(max_tokens))
    try:
        yield
    finally:
        _active_calls.reset(token)


def active_calls() -> ReplayedCalls | None:
    """The calls of the `replaying_cuda_graphs` block that this thread is in; None outside, and in `torch.compile`."""
    return None if torch.compiler.is_compiling() else _active_calls.get()


def capture_key(model: nn.Module, inputs: tuple[Tensor, ...]) -> Hashable:
    """Key under which a captured call of a model may be replayed, or None if the call cannot be captured.

    The key names everything that the call depends on beside the values of its inputs. A call cannot be captured where
    gradients are wanted, on a CPU, under autocast, or while something else compiles, captures or traces it; nor if it
    may differ from call to call: with LoRA layers, whose scale changes, with quantised weights, with parts that are
    compiled or have hooks, which move weights or skip blocks, or with attention processors of others.
    """
    if not inputs[0].is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return None
    if torch._C._len_torch_dispatch_stack() > 0:
        return None
    modules = list(model.modules())
    if getattr(model, "peft_config", None) or getattr(model, "hf_quantizer", None) is not None:
        return None
    processors = [part.processor for part in modules if hasattr(part, "processor")]
    if not all(_is_own_processor(processor) for processor in processors):
        return None
    # Calls of the model itself may have hooks: what they do is not captured.
    if any(differs_from_its_class(part) for part in modules[1:]) or _has_hooks_of_diffusers(model):
        return None
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())
    shapes = ((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
    return (model, weights, tuple(processors), *shapes)


def _is_own_processor(processor: Any) -> bool:
    """Whether an attention processor is one of this package, with PyTorch's attention."""
    is_own = type(processor).__module__.startswith(f"{__package__}.")
    return is_own and getattr(processor, "_attention_backend", None) is None


def differs_from_its_class(part: nn.Module) -> bool:
    """Whether something else than the forward method of its class happens at a call of a module."""
    is_compiled = part._compiled_call_impl is not None
    return is_hooked(part) or is_compiled or hasattr(part, "_hf_hook") or _has_hooks_of_diffusers(part)


def _has_hooks_of_diffusers(part: nn.Module) -> bool:
    # `cache_context` leaves a registry without hooks on a model.
    registry: Any = getattr(part, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)
