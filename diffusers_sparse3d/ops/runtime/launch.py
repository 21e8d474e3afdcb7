"""Launches of Triton kernels that take the host less time.

Triton's own launch (`JITFunction.run`) binds all arguments, describes each as text, and reads the environment: 20 to
40 microseconds of the host, of which the CUDA driver takes 3. A forward pass that launches dozens of kernels for a few
thousand tokens waits for that. `Kernel` lets triton compile at the first launch, keeps the compiled kernel under a key
that is quick to make, and hands later launches to the compiled kernel directly.

README.md of this folder says when a launch goes which way.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.language import constexpr

from .collection import current_collector
from .settings import current_settings


# What is called at each launch: with the compiled kernel for the grid, or None if the launch went through triton, and
# with all arguments that it takes.
Listener = Callable[[Callable[..., None] | None, tuple[Any, ...]], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)

# Versions of triton whose sources were read for what direct launches rely on:
# - `JITFunction.run` returns the compiled kernel (None if a hook stopped it), and specializes on nothing else than
#   `describe` describes and the keyword arguments;
# - `compiled[grid](*arguments, stream=stream)` launches it, takes the compile-time arguments too, in order, and leaves
#   them out; pointers may be integers; aggregates may be plain tuples.
_KNOWN_VERSIONS = ("3.3", "3.4", "3.5", "3.6", "3.7", "3.8", "3.9")

# Numbers that kernels take as they come, by the names of their parameters: `@triton.jit(do_not_specialize=NUMBERS)`.
# They bound masks and loops, or divide, and depend on the coordinates: compiled for multiples of 16 and for one too,
# kernels would be the same code again, which the first call with other coordinates would wait for. Some numbers of
# group norms depend on the layer: 13 variants serve both refiners, and not 33.
NUMBERS = (
    *("branch", "channel_vectors", "chunk", "first_choice", "first_query", "group_size", "num_blocks"),
    *("num_columns", "num_compressed", "num_groups", "num_keys", "num_lines", "num_lists", "num_parents"),
    *("num_parts", "num_pieces", "num_rows", "num_segments", "num_steps", "num_tiles", "num_tokens"),
    *("piece_size", "rows_per_sample"),
)


class _RunnerProbe:
    """Stands in for a compiled kernel and keeps what triton's runner hands to the driver."""

    function, packed_metadata = "function", "metadata"
    received: tuple[Any, ...] = ()

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        pass

    def run(self, *received: Any) -> None:
        self.received = received


def _runner_fits() -> bool:
    """Whether `CompiledKernel.__getitem__` hands grid, stream, kernel and all arguments to the driver as expected."""
    probe, arguments = _RunnerProbe(), (11, (None, 0.5))
    try:
        CompiledKernel.__getitem__(probe, (2, 3, 5))(*arguments, stream=7)
    except (AttributeError, TypeError, ValueError):
        return False
    return probe.received[:6] == (2, 3, 5, 7, "function", "metadata") and probe.received[-2:] == arguments


@functools.cache
def _knows_triton() -> bool:
    """Whether kernels can be launched directly with this build of PyTorch and triton; warns if triton is unknown."""
    if torch.version.hip is not None:
        # For AMD's GPUs triton specializes on more than `describe` describes.
        return False
    if ".".join(triton.__version__.split(".")[:2]) in _KNOWN_VERSIONS and _runner_fits():
        return True
    warnings.warn(
        f"diffusers_sparse3d does not know how triton {triton.__version__} launches compiled kernels (it knows "
        f"{_KNOWN_VERSIONS[0]} to {_KNOWN_VERSIONS[-1]}): all launches go through triton, which is slower for small "
        "inputs.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def launches_directly() -> bool:
    """Whether compiled kernels are launched without triton: it is a known version, and settings allow it."""
    return current_settings().direct_launch and _knows_triton()


def current_stream(tensor: Tensor) -> int:
    """The handle of the current CUDA stream of the device of a tensor."""
    return triton.runtime.driver.active.get_current_stream(tensor.get_device())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` at each launch in this thread, after it, inside the `with` block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor | None:
    """The first tensor among arguments and fields of aggregates, in order; None if there is none."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, tuple):
            tensor = _first_tensor(argument)
            if tensor is not None:
                return tensor
    return None


def _integer_class(number: int) -> int:
    """A number that is the same for integers for which triton compiles the same code.

    Triton tells apart the number one, multiples of 16, and integers of more than 32 and 64 bits.
    """
    if number == 1:
        return 1
    return 2 + (number % 16 == 0) + 2 * (number.bit_length() > 31) + 4 * (number.bit_length() > 63)


def describe(arguments: tuple[Any, ...], description: list[Any]) -> bool:
    """Append all that triton compiles different code for, of each argument and each field of aggregates.

    Returns:
        Whether arguments are of the types that `Kernel` lists. Otherwise the description is not complete.
    """
    add = description.append
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            add(_integer_class(argument))
        elif kind is constexpr:
            # With the type, because 1 equals True and 1.0.
            value = argument.value
            add((type(value), value))
        elif argument is None:
            add(None)
        elif isinstance(argument, Tensor):
            # A tuple is no dtype: pointers that are not aligned to 16 bytes are told apart.
            add((argument.dtype,) if argument.data_ptr() % 16 else argument.dtype)
        elif isinstance(argument, tuple):
            add(kind)
            add(len(argument))
            if not describe(argument, description):
                return False
        elif kind is float:
            add(float)
        elif kind is StandIn:
            add(argument.dtype if argument.aligned else (argument.dtype,))
        else:
            return False
    return True


def specializes(function: Any, name: str) -> bool:
    """Whether triton compiles a `triton.jit` function anew for values of an integer argument."""
    unspecialized = getattr(function, "do_not_specialize", None)
    if unspecialized is None:
        # The interpreter keeps what `triton.jit` was given.
        unspecialized = function.kwargs.get("do_not_specialize")
    return name not in (unspecialized or ())


class StandIn:
    """What triton needs to know of a tensor to compile for it.

    Args:
        dtype: of the elements.
        aligned: whether the first element lies at a multiple of 16 bytes.
    """

    shape = (1,)

    def __init__(self, dtype: torch.dtype, aligned: bool):
        self.dtype, self.aligned = dtype, aligned

    def data_ptr(self) -> int:
        """An address of that kind; there is nothing at it."""
        return 0 if self.aligned else self.dtype.itemsize

    @staticmethod
    def ptr_range() -> int:
        """Bytes that offsets reach; triton asks for AMD's GPUs alone."""
        return 0


class Kernel:
    """A Triton kernel, launched as `kernel[grid](*arguments, **constants)` like the `triton.jit` function it wraps.

    The first launch with arguments of a kind goes through triton, which compiles. The compiled kernel is kept under
    the device, the names and values of the constants, and what triton specializes on of the arguments (`describe`).
    Further launches of this kind go to the compiled kernel directly. On the CPU (in triton's interpreter), on GPUs of
    other makers than NVIDIA, with an unknown version of triton, and where `runtime_settings` say so, all launches go
    through triton.

    Arguments come in the order of the kernel's parameters: tensors on the current device, integers, floats, None,
    `tl.constexpr` values, and aggregates of these, that is tuples and named tuples, nested or not. Compile-time
    parameters, and options such as `num_warps`, follow by name. Multiplications and additions are fused, as triton up
    to 3.9 does by default.

    Args:
        function: the `triton.jit` function, kept as an attribute.
    """

    def __init__(self, function: Any):
        functools.update_wrapper(self, function.fn)  # type: ignore[arg-type]  # it wants a function, not an object
        self.function = function
        self._first_use = threading.Lock()
        # The compiled kernel, and the values of the compile-time parameters that its runner takes after the arguments.
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def compile(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Compile for arguments of this kind on the current device, without a launch.

        Args:
            arguments: as of a launch; `StandIn`s may take the place of tensors.
            constants: compile-time parameters and options by name.
        """
        with self._first_use:
            # Of two threads that use a function first, one would lose what it compiles: triton makes its cache twice.
            self.function.device_caches[triton.runtime.driver.active.get_current_device()]
        compiled = self.function.warmup(*arguments, grid=(1,), enable_fp_fusion=True, **constants)
        if compiled is not None:
            # Loads the kernel, before 3.7 after a C compiler has made its launcher.
            compiled._init_handles()

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        collector = current_collector()
        if collector is not None:
            collector(self, arguments, constants)
            return
        launch: Callable[..., None] | None = None
        compile_time: tuple[Any, ...] = ()
        tensor, description = _first_tensor(arguments), [*constants.items()]
        if tensor is None or not tensor.is_cuda or not launches_directly() or not describe(arguments, description):
            self._launch_by_triton(grid, arguments, constants)
        else:
            key = (tensor.get_device(), *description)
            if key in self._compiled:
                compiled, compile_time = self._compiled[key]
                launch = compiled[grid + (1, 1)]
                launch(*arguments, *compile_time)
            else:
                compiled = self._launch_by_triton(grid, arguments, constants)
                # None in the interpreter, and where a hook of triton's took the place of the compiler.
                if compiled is not None:
                    compile_time = tuple(constants[name] for name in self.function.arg_names[len(arguments) :])
                    self._compiled[key] = compiled, compile_time
                    launch = compiled[grid + (1, 1)]
        listener = _listener.get()
        if listener is not None:
            listener(launch, (*arguments, *compile_time))

    def _launch_by_triton(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """Launch through triton, which compiles if it has to; returns the compiled kernel, or None."""
        # Without the option, triton 3.9 warns that its default will change.
        return self.function[grid](*arguments, enable_fp_fusion=True, **constants)
