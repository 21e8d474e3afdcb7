"""The choice between kernels and plain PyTorch, and what kernels need to know of the device; works without triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from .settings import kernels_are_on


# A constant, as `torch.compile` cannot trace the search for a package.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# The most channels of a head of queries, keys or values in attention kernels: wider tiles do not fit in shared memory.
WIDEST_HEAD = 128
# The most heads of queries that share a head of keys and values there: they are rows of one tile, of 32 at least.
MOST_GROUPED_HEADS = 32

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def runs_kernels(tensor: Tensor) -> bool:
    """Whether operators on this tensor run Triton kernels rather than plain PyTorch.

    They do if the tensor is on a GPU, its dtype is float16, bfloat16, float32 or int32, triton is installed, and
    `runtime_settings` or the environment variable have not switched kernels off.
    """
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.int32)
    return HAS_TRITON and tensor.is_cuda and tensor.dtype in dtypes and kernels_are_on()


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` for inputs of `dtype`.

    "tf32" for float32 if PyTorch may round its own matrix products on a GPU to it, whichever of its settings says so
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul`), otherwise "ieee", which is exact float32.
    """
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Where there is the newer setting, to read the older one is an error once the newer one was written.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


# `triton.cdiv` and `triton.next_power_of_2` can be called in kernels too, and take 10 microseconds on the host.
def cdiv(number: int, divisor: int) -> int:
    """The quotient `number / divisor`, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def num_multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors of a GPU; 1 for the CPU, where programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def compute_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def is_on_current_device(tensor: Tensor) -> bool:
    """Whether a tensor is on the current CUDA device, or on no CUDA device at all."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


def on_device_of_first_argument(
    function: Callable[Concatenate[Tensor, _Parameters], _Result],
) -> Callable[Concatenate[Tensor, _Parameters], _Result]:
    """A decorator that makes the device of the first argument the current one, on which Triton launches kernels."""

    @functools.wraps(function)
    def guarded(tensor: Tensor, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        # Nearly always there is nothing to do, and entering the context takes 4 microseconds.
        if is_on_current_device(tensor):
            return function(tensor, *args, **kwargs)
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return guarded
