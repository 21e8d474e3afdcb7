"""A fixture that tells the kernels which are compiled ahead from those which are launched. On a CPU, where none is."""

import threading
from collections.abc import Iterator

import pytest

from diffusers_sparse3d.models import kernel_examples
from diffusers_sparse3d.ops.packed_attention import api as packed_attention
from diffusers_sparse3d.ops.runtime import compile_ahead
from diffusers_sparse3d.ops.runtime.collection import current_collector
from diffusers_sparse3d.ops.runtime.launch import Kernel

from .kernel_testing import run_kernels_on_the_cpu


class Watched:
    """Names of kernels: what other threads launched or this one collected, and what this one launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ahead: set[str] = set()
        self.launched: set[str] = set()
        original, own = Kernel._launch, threading.get_ident()

        def launch(kernel, grid, *arguments, **constants):
            is_ahead = current_collector() is not None or threading.get_ident() != own
            function = kernel.function.fn
            (self.ahead if is_ahead else self.launched).add(f"{function.__module__}.{function.__name__}")
            return original(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(Kernel, "_launch", launch)


@pytest.fixture
def watched(monkeypatch) -> Iterator[Watched]:
    """Kernels run in the interpreter, which is not for several threads, and compiling them does nothing."""
    run_kernels_on_the_cpu(monkeypatch)
    monkeypatch.setattr(compile_ahead, "num_threads", lambda: 1)
    monkeypatch.setattr(Kernel, "compile", lambda *_: None)
    monkeypatch.setattr(kernel_examples, "_DECODER_CELLS", 3)
    monkeypatch.setattr(kernel_examples, "_ENCODER_VOXELS", 16)
    # Looks at boundaries on a CPU alone, which have no values in a trace.
    monkeypatch.setattr(packed_attention, "_check_boundaries", lambda *_: None)
    return Watched(monkeypatch)
