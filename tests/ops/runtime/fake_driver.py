"""A GPU driver for tests on the CPU: triton's own launch code runs on it, with all checks that a GPU cannot make.

Triton binds and specializes arguments as ever (`JITFunction.run`) and launches through its own runner
(`CompiledKernel.__getitem__`). What it would compile is an `_Emulated` kernel instead, which remembers what it was
specialized on. At each launch the fake driver checks that device, stream, number and nesting of arguments, dtypes,
alignments and constants are those that the kernel was compiled for, and then does the work of the kernel in Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction


# The types of pointers and of numbers in triton's signatures, as PyTorch and Python have them.
_POINTERS = {"*fp32": torch.float32, "*fp64": torch.float64, "*i32": torch.int32, "*i64": torch.int64}
_NUMBERS: dict[str, type[Any]] = {"fp32": float, "i32": int, "i64": int, "i1": bool, "u1": bool}


@functools.cache
def _tensor_type(device: int) -> type[Tensor]:
    """The type of tensors of a fake GPU. Results of operations on them are of this type as well."""
    return type("FakeGPUTensor", (Tensor,), {"is_cuda": True, "get_device": lambda tensor: device})


def on_gpu(tensor: Tensor, device: int = 0) -> Tensor:
    """The tensor as one of a fake GPU; it stays where it is."""
    return tensor.as_subclass(_tensor_type(device))


def numbers_at(pointer: int, dtype: torch.dtype, count: int) -> Tensor:
    """`count` elements at an address, as a tensor that shares the memory."""
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), dtype=dtype)


class FakeDriver:
    """The driver of two fake GPUs, as triton asks it.

    Attributes:
        device: the current device.
        bodies: what kernels do, by their names: functions of the grid and of all arguments. A pointer is given as a
            function from a number of elements to a tensor, an aggregate as a tuple.
        compiled: the names of the kernels that were compiled, in order.
        launched: the names of the kernels that were launched, in order.
    """

    def __init__(self, bodies: dict[str, Callable[..., None]]):
        self.device = 0
        self.bodies = bodies
        self.compiled: list[str] = []
        self.launched: list[str] = []

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, source: Any, **_: Any) -> _Emulated:
        self.compiled.append(source.fn.__name__)
        return _Emulated(self, source)


class _Emulated(CompiledKernel):
    """A compiled kernel that Python works off, with the runner of triton's: `__getitem__` and `launch_metadata`."""

    def __init__(self, driver: FakeDriver, source: Any):
        self.driver, self.src = driver, source
        self.device, self.module, self.packed_metadata = driver.device, None, ("packed",)
        self.name = self.function = source.fn.__name__

    def _init_handles(self) -> None:
        pass

    @property
    def run(self) -> Callable[..., None]:
        return self._run_checked

    def _run_checked(self, *arguments: Any) -> None:
        *grid, stream, function, packed, _metadata, _enter_hook, _exit_hook = arguments[:9]
        assert (function, packed) == (self.function, self.packed_metadata)
        assert self.driver.device == self.device, "launched on another device than it was compiled on"
        assert stream == self.driver.get_current_stream(self.device)
        values = self._checked(tuple(self.src.signature.values()), arguments[9:], ())
        self.driver.launched.append(self.name)
        self.driver.bodies[self.name](tuple(grid), *values)

    def _checked(self, types: tuple[Any, ...], arguments: tuple[Any, ...], path: tuple[int, ...]) -> tuple[Any, ...]:
        """The arguments as the body takes them, after checks against what the kernel was compiled for."""
        assert isinstance(arguments, tuple) and len(arguments) == len(types), f"arguments {path}: {arguments}"
        return tuple(
            self._checked(kind, argument, (*path, place))
            if isinstance(kind, tuple)
            else self._checked_leaf(kind, argument, (*path, place))
            for place, (kind, argument) in enumerate(zip(types, arguments))
        )

    def _checked_leaf(self, kind: str, argument: Any, path: tuple[int, ...]) -> Any:
        multiple_of_16 = ["tt.divisibility", 16] in self.src.attrs.get(path, [])
        if kind == "constexpr":
            # A kernel does not see the argument, but the constant that it was compiled with.
            constant = self.src.constants[path]
            assert getattr(argument, "value", argument) == getattr(constant, "value", constant), path
            return getattr(constant, "value", constant)
        if kind.startswith("*"):
            pointer = argument
            if isinstance(argument, Tensor):
                assert argument.get_device() == self.device and argument.dtype == _POINTERS[kind], path
                pointer = argument.data_ptr()
            assert type(pointer) is int and pointer % (16 if multiple_of_16 else 1) == 0, path
            return functools.partial(numbers_at, pointer, _POINTERS[kind])
        assert type(argument) is _NUMBERS[kind], path
        assert kind != "i32" or -(2**31) <= argument < 2**31, path
        assert not multiple_of_16 or argument % 16 == 0, path
        return argument


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """The active driver of triton and of PyTorch's current device, in place of the machine's."""
    driver = FakeDriver({})
    for module in (triton.runtime, triton.runtime.jit, triton.compiler.compiler):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(triton.compiler, "compile", driver.compile)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.device)
    yield driver


def compiled_function(function: Callable[..., None]) -> JITFunction:
    """`triton.jit` of a function, even where `triton.jit` would interpret it."""
    return JITFunction(function)
