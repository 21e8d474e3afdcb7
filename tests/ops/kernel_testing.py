"""What the tests of Triton kernels share: where they run, and how to have them interpreted where there is no GPU.

Whether Triton interprets is settled when it is imported, so without a GPU the tests of a file run in another process.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
HAS_TRITON = importlib.util.find_spec("triton") is not None
RUNS_KERNELS = HAS_TRITON and (INTERPRETED or NATIVE)
DEVICE = "cuda" if NATIVE else "cpu"
# The interpreter's matrix products are wrong in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * NATIVE

needs_kernels = pytest.mark.skipif(
    not RUNS_KERNELS,
    reason="needs triton" if not HAS_TRITON else "no GPU: runs in the interpreter, by test_in_the_interpreter",
)
without_gpu = pytest.mark.skipif(NATIVE or INTERPRETED or not HAS_TRITON, reason="needs triton, and no GPU")


def run_in_the_interpreter(path: str) -> None:
    """The tests of a file, in a process in which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", "-rf", path]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
