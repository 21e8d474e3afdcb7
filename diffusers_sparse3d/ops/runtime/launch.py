"""Launches of Triton kernels that cost the host less.

Each launch by triton binds all arguments, compile-time ones too, describes each by text, and reads the environment:
20 to 40 microseconds, where the driver takes 3. A call of several kernels for a few thousand tokens waits for that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.language import constexpr


# What is told of launches: the compiled kernel for a grid, None if it is not known, and all that it takes.
Listener = Callable[[Callable[..., None] | None, tuple[Any, ...]], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
# Compiled kernels take the compile-time arguments too, and leave them out; before triton 3.3 they do not.
_TAKES_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def current_stream(tensor: Tensor) -> int:
    """The current stream of the device of a tensor on a GPU, as launches take it."""
    return triton.runtime.driver.active.get_current_stream(tensor.get_device())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of each launch, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def _kind(number: int) -> int:
    """What triton compiles for of an integer: one, multiples of 16, and their width."""
    if number == 1:
        return 1
    return 2 + (number % 16 == 0) + 2 * (number.bit_length() > 31) + 4 * (number.bit_length() > 63)


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor | None:
    """The first tensor among arguments and the fields of aggregates, in order."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, tuple):
            tensor = _first_tensor(argument)
            if tensor is not None:
                return tensor
    return None


def _add_kinds(arguments: tuple[Any, ...], kinds: list[Any]) -> bool:
    """Append to `kinds` what triton compiles for of each argument, at least; fields of aggregates follow their type.

    Returns:
        Whether all arguments are of types that compiled kernels can be told apart by here.
    """
    for argument in arguments:
        if isinstance(argument, Tensor):
            # A tuple is no dtype: pointers that are not aligned are told apart.
            kinds.append(argument.dtype if argument.data_ptr() % 16 == 0 else (argument.dtype,))
        elif argument is None:
            kinds.append(None)
        elif type(argument) is int:
            kinds.append(_kind(argument))
        elif type(argument) is float:
            kinds.append(float)
        elif isinstance(argument, constexpr):
            # With the type, because 1 equals True and 1.0.
            kinds.append((type(argument.value), argument.value))
        elif isinstance(argument, tuple):
            kinds.append(type(argument))
            kinds.append(len(argument))
            if not _add_kinds(argument, kinds):
                return False
        else:
            return False
    return True


class Kernel:
    """A Triton kernel, launched as `kernel[grid](*arguments, **constants)`.

    The first launch of its kind goes through triton, which compiles. What it compiled is kept by dtypes, alignments
    and compile-time arguments, and launched directly from then on. That is done for kernels of NVIDIA's GPUs, since
    for others triton looks at more than that; elsewhere, and in the interpreter, all launches go through triton.

    Arguments come in the order of the kernel's parameters, all compile-time ones by name after the others. An argument
    is a tensor on the current device, an integer, a float, None, a `tl.constexpr`, or an aggregate of such values: a
    tuple or named tuple, which may hold further ones.

    Attributes:
        function: the kernel as triton has it.
    """

    def __init__(self, function: Any):
        functools.update_wrapper(self, function.fn)
        self.function = function
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        tensor, kinds = _first_tensor(arguments), [*constants.items()]
        launch, passed = None, ()
        if tensor is None or not tensor.is_cuda or torch.version.hip is not None or not _add_kinds(arguments, kinds):
            self.function[grid](*arguments, **constants)
        else:
            key = (tensor.get_device(), *kinds)
            found = self._compiled.get(key)
            if found is None:
                compiled = self.function[grid](*arguments, **constants)
                names = self.function.arg_names[len(arguments) :] if _TAKES_CONSTANTS else ()
                passed = tuple(constants[name] for name in names)
                self._compiled[key] = compiled, passed
                launch = compiled[(*grid, 1, 1)]
            else:
                compiled, passed = found
                launch = compiled[(*grid, 1, 1)]
                launch(*arguments, *passed)
        listener = _listener.get()
        if listener is not None:
            listener(launch, (*arguments, *passed))
