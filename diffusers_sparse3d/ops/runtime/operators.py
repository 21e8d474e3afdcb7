"""Functions as operators of PyTorch, without what that costs where nothing traces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def is_traced(tensor: Any) -> bool:
    """Whether a call with this tensor has to be an operator's: `torch.compile` traces it, or something else does."""
    # The backward pass is traced with tensors of other types.
    return torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


class Operator:
    """A function that `torch.compile` takes as a whole, with gradients of its own or none.

    Elsewhere the function is called directly. PyTorch's dispatcher takes 0.05 to 0.1 ms of the host for a call of a
    custom operator, and several times as much with gradients: as long as a GPU needs for a few thousand tokens.

    The first argument is a tensor.

    Attributes:
        registered: what was registered with PyTorch.
    """

    def __init__(self, function: Callable[..., Any], registered: torch.library.CustomOpDef):
        self.registered = registered
        self._function = function
        self._differentiable: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if is_traced(arguments[0]):
            return self.registered(*arguments)
        if not torch.is_grad_enabled():
            return self._function(*arguments)
        if self._differentiable is not None:
            return self._differentiable.apply(*arguments)
        with torch.no_grad():
            return self._function(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As of `torch.library.custom_op`."""
        return self.registered.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As of `torch.library.custom_op`: the gradient of an argument that is a list is a list."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        keep, function = setup_context, self._function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return function(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                keep(ctx, inputs, output)

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
                # To autograd, lists are not tensors.
                results = backward(ctx, *gradients)
                results = results if isinstance(results, tuple) else (results,)
                return tuple(None if isinstance(result, list) else result for result in results)

        self._differentiable = Differentiable


def operator(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator with the arguments of `torch.library.custom_op`."""

    def decorate(function: Callable[..., Any]) -> Operator:
        return Operator(function, torch.library.custom_op(name, function, **settings))

    return decorate
