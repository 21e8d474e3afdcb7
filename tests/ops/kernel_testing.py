"""What the tests of Triton kernels share: where they run, and how to have them interpreted where there is no GPU.

Whether Triton interprets is settled when it is imported, so without a GPU the tests of a file run in another process.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from diffusers_sparse3d.ops.runtime import dispatch as triton_dispatch
from diffusers_sparse3d.ops.runtime.dispatch import HAS_TRITON


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
RUNS_KERNELS = HAS_TRITON and (INTERPRETED or NATIVE)
DEVICE = "cuda" if NATIVE else "cpu"
# The interpreter's matrix products are wrong in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * NATIVE

needs_kernels = pytest.mark.skipif(
    not RUNS_KERNELS,
    reason="needs triton" if not HAS_TRITON else "no GPU: runs in the interpreter, by test_in_the_interpreter",
)
needs_gpu = pytest.mark.skipif(not (NATIVE and HAS_TRITON), reason="needs a GPU and triton")
without_gpu = pytest.mark.skipif(NATIVE or INTERPRETED or not HAS_TRITON, reason="needs triton, and no GPU")

if RUNS_KERNELS:
    from diffusers_sparse3d.ops.runtime.launch import Kernel


def run_in_the_interpreter(path: str) -> None:
    """The tests of a file, in a process in which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", "-rf", path]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def spied_launches(monkeypatch):
    """
    A list that gets, for every launch of a kernel from now on, how many `torch.cuda.device_of` are entered; tensors
    count as those of another device.
    """
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
