"""What the tests of Triton kernels share: the device they run on, marks, and checks of compiling and capturing.

Kernels run on the GPU if there is one, and in Triton's interpreter on the CPU otherwise: `tests/conftest.py` switches
the interpreter on, and collects files of such tests only if triton is installed.
"""

import contextlib
import os
import sys

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from diffusers_sparse3d.ops.runtime import dispatch as triton_dispatch
from diffusers_sparse3d.ops.runtime.dispatch import HAS_TRITON


NATIVE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if NATIVE else "cpu"
# The interpreter's matrix products are wrong in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * NATIVE

needs_kernels = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
needs_gpu = pytest.mark.skipif(not (NATIVE and HAS_TRITON), reason="needs a GPU and triton")
without_gpu = pytest.mark.skipif(NATIVE or not HAS_TRITON, reason="needs triton, and no GPU")


def run_kernels_on_the_cpu(monkeypatch):
    """Let all operators run their kernels on float32 and int32 tensors on the CPU: in Triton's interpreter."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers_sparse3d.ops.") and hasattr(module, "runs_kernels"):
            monkeypatch.setattr(module, "runs_kernels", lambda tensor: tensor.dtype in (torch.float32, torch.int32))


def spied_launches(monkeypatch):
    """
    A list that gets, for every launch of a kernel from now on, how many `torch.cuda.device_of` are entered; tensors
    count as those of another device.
    """
    from diffusers_sparse3d.ops.runtime.launch import Kernel

    entered, launches = [], []

    class Guard(contextlib.nullcontext):
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *_):
            entered.pop()

    original = Kernel._launch

    def spied(*args, **kwargs):
        launches.append(len(entered))
        return original(*args, **kwargs)

    monkeypatch.setattr(triton_dispatch, "is_on_current_device", lambda tensor: False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: Guard())
    monkeypatch.setattr(Kernel, "_launch", spied)
    return launches


def check_compiled(function, make_arguments, names):
    """One graph for all cases, which does what the function does: output and gradients.

    `make_arguments(name)` returns leaves, which the function takes first, and further arguments. What is planned from
    coordinates is planned there: `fullgraph=True` fails if anything cannot be traced.
    """
    graphs = []

    def backend(graph, inputs):
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


def check_captured(function, leaves):
    """What is captured in a CUDA graph, forward and backward, is computed from new values; nothing is transferred."""

    def step():
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
