"""Custom operators of PyTorch that are called without the dispatcher where nothing traces them.

`torch.compile` and `torch.export` need operators that are registered with PyTorch. A call of a registered operator
costs the host 0.05 to 0.1 ms, and several times as much with gradients: as long as a GPU needs for a few thousand
tokens. `Operator` goes through the registration only while something traces the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .collection import current_collector
from .kept_results import computed_or_kept
from .settings import call_with, chosen_settings


def is_traced(tensor: Any) -> bool:
    """Whether a call with this tensor is being traced, by `torch.compile` or by a tensor subclass or mode."""
    # The backward pass is traced with tensors of types such as `FakeTensor`.
    return torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


class Operator:
    """A function that is registered as a custom operator, and called directly where nothing traces the call.

    The first argument is a tensor. Without `register_autograd` the operator has no gradients.

    Args:
        function: computes the results.
        registered: the custom operator that PyTorch made of it; kept as an attribute.
        kept_by_checkpoints: whether checkpoints may keep its results, see `kept_results`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        registered: torch.library.CustomOpDef,
        kept_by_checkpoints: bool = False,
    ):
        self.registered = registered
        self._function = function
        self._kept_by_checkpoints = kept_by_checkpoints
        self._differentiable: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        # The registration would hide the kernels that are collected.
        if is_traced(arguments[0]) and (torch.compiler.is_compiling() or current_collector() is None):
            return self.registered(*arguments)
        if not torch.is_grad_enabled():
            return self._function(*arguments)
        if self._differentiable is not None:
            return self._differentiable.apply(*arguments)
        with torch.no_grad():
            return self._function(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the function that makes empty results, like `torch.library.CustomOpDef.register_fake`."""
        return self.registered.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Register gradients, like `torch.library.CustomOpDef.register_autograd`.

        Args:
            backward: returns the gradients of all arguments; of an argument that is a list of tensors, a list.
            setup_context: saves in `ctx` what `backward` needs.
        """
        self.registered.register_autograd(backward, setup_context=setup_context)
        save, function, kept = setup_context, self._function, self._kept_by_checkpoints

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return computed_or_kept(function, arguments) if kept else function(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                # The backward pass on a GPU runs in a thread of autograd's, which has settings of its own.
                ctx.runtime_settings = chosen_settings()
                save(ctx, inputs, output)

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
                results = call_with(ctx.runtime_settings, backward, ctx, *gradients)
                results = results if isinstance(results, tuple) else (results,)
                # To `torch.autograd.Function`, lists are not tensors.
                return tuple(None if isinstance(result, list) else result for result in results)

        self._differentiable = Differentiable


def operator(
    name: str, kept_by_checkpoints: bool = False, **settings: Any
) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator that makes an `Operator` of a function.

    Args:
        name: of the custom operator, with its namespace.
        kept_by_checkpoints: see `Operator`.
        settings: further arguments of `torch.library.custom_op`.
    """

    def decorate(function: Callable[..., Any]) -> Operator:
        return Operator(function, torch.library.custom_op(name, function, **settings), kept_by_checkpoints)

    return decorate
