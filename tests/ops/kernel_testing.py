"""What the tests of Triton kernels share: the device they run on, marks, and checks of compiling and capturing.

Kernels run on the GPU if there is one, and in Triton's interpreter on the CPU otherwise: `tests/conftest.py` switches
the interpreter on, and collects files of such tests only if triton is installed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from diffusers_sparse3d.ops.runtime import dispatch as triton_dispatch
from diffusers_sparse3d.ops.runtime.dispatch import HAS_TRITON


NATIVE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if NATIVE else "cpu"
# The interpreter's matrix products are wrong in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * NATIVE

needs_gpu = pytest.mark.skipif(not (NATIVE and HAS_TRITON), reason="needs a GPU and triton")
without_gpu = pytest.mark.skipif(NATIVE or not HAS_TRITON, reason="needs triton, and no GPU")


def run_kernels_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, dtypes: Sequence[torch.dtype] = (torch.float32, torch.int32)
) -> None:
    """Let all operators run their kernels on tensors of some dtypes on the CPU, in Triton's interpreter."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers_sparse3d.ops.") and hasattr(module, "runs_kernels"):
            monkeypatch.setattr(module, "runs_kernels", lambda tensor: tensor.dtype in dtypes)


def compiled_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that triton compiles or finds in its cache on disk from now on, a list that grows."""
    import triton

    names: list[str] = []
    original = triton.runtime.JITFunction._do_compile

    def compile_and_note(function: Any, *arguments: Any, **options: Any) -> Any:
        names.append(function.fn.__name__)
        return original(function, *arguments, **options)

    monkeypatch.setattr(triton.runtime.JITFunction, "_do_compile", compile_and_note)
    return names


def spied_launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that all tensors are on another device than the current one, and count launches of kernels.

    Returns:
        A list that gets an entry for each launch from now on: how many `torch.cuda.device_of` are entered then.
    """
    from diffusers_sparse3d.ops.runtime.launch import Kernel

    entered: list[bool] = []
    launches: list[int] = []

    class Guard(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: Any) -> None:
            entered.pop()

    original = Kernel._launch

    def spied(*args: Any, **kwargs: Any) -> None:
        launches.append(len(entered))
        return original(*args, **kwargs)

    monkeypatch.setattr(triton_dispatch, "is_on_current_device", lambda tensor: False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: Guard())
    monkeypatch.setattr(Kernel, "_launch", spied)
    return launches


def check_compiled(
    function: Callable[..., Tensor],
    make_arguments: Callable[[str], tuple[Sequence[Tensor], Sequence[Any]]],
    names: Iterable[str],
) -> None:
    """Check that `torch.compile` makes one graph for all cases, with the output and the gradients of the function.

    `fullgraph=True` fails if anything in the function cannot be traced.

    Args:
        function: takes leaves, which need gradients, and further arguments.
        make_arguments: returns the leaves and the further arguments of a case. What is planned from coordinates is
            planned there, and so not traced.
        names: the cases.
    """
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for name in names:
        leaves, others = make_arguments(name)
        results = []
        for called in (compiled, function):
            output = called(*leaves, *others)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


def check_captured(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    """Check that a CUDA graph can hold the forward and the backward pass of a function, without transfers.

    Args:
        function: takes the leaves.
        leaves: tensors that need gradients. They are overwritten, and the graph is replayed with the new values.
    """

    def step() -> tuple[Tensor, ...]:
        output = function(*leaves)
        return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, value in zip(results, expected):
        assert torch.equal(found, value)
