"""A fixture that tells the kernels which are compiled ahead from those which are launched. On a CPU, where none is."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from diffusers_sparse3d.models import kernel_examples
from diffusers_sparse3d.ops.packed_attention import api as packed_attention
from diffusers_sparse3d.ops.runtime import compile_ahead
from diffusers_sparse3d.ops.runtime.collection import current_collector
from diffusers_sparse3d.ops.runtime.launch import Kernel, describe, specializes

from .kernel_testing import run_kernels_on_the_cpu


class Watched:
    """What triton compiles for: by other threads, which compile ahead, and by launches of this one.

    Each is the name of a kernel, with all that triton compiles different code for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ahead: set[tuple[Any, ...]] = set()
        self.launched: set[tuple[Any, ...]] = set()
        original, own = Kernel._launch, threading.get_ident()

        def compile_nothing(kernel, arguments, constants):
            self.ahead.add(specialized(kernel, arguments, constants))

        def launch(kernel, grid, *arguments, **constants):
            if current_collector() is None:
                is_ahead = threading.get_ident() != own
                (self.ahead if is_ahead else self.launched).add(specialized(kernel, arguments, constants))
            return original(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(Kernel, "compile", compile_nothing)
        monkeypatch.setattr(Kernel, "_launch", launch)


def specialized(kernel: Kernel, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """The name of a kernel, and all that triton compiles different code for."""
    function = kernel.function
    kinds: list[Any] = [f"{function.fn.__module__}.{function.fn.__name__}", *constants.items()]
    for name, argument in zip(function.arg_names, arguments):
        kinds.append(name)
        is_number = type(argument) is int and not specializes(function, name)
        assert describe((0.5 if is_number else argument,), kinds)
    return tuple(kinds)


@pytest.fixture
def watched(monkeypatch) -> Iterator[Watched]:
    """Kernels run in the interpreter, which is not for several threads, and compiling them does nothing."""
    run_kernels_on_the_cpu(monkeypatch)
    monkeypatch.setattr(compile_ahead, "num_threads", lambda: 1)
    monkeypatch.setattr(kernel_examples, "_DECODER_CELLS", 3)
    monkeypatch.setattr(kernel_examples, "_ENCODER_VOXELS", 16)
    # Looks at boundaries on a CPU alone, which have no values in a trace.
    monkeypatch.setattr(packed_attention, "_check_boundaries", lambda *_: None)
    return Watched(monkeypatch)
