"""When operators run Triton kernels, and what the kernels need to know about the device. Imports without triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# A constant, as `torch.compile` cannot trace the search for a package.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Channels of queries, keys and values that attention kernels take; beyond it, tiles no longer fit in shared memory.
WIDEST_HEAD = 128


def runs_kernels(tensor: Tensor) -> bool:
    """Whether kernels work on a tensor: float16, bfloat16, float32 and int32 on a GPU, if triton is installed."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.int32)
    return HAS_TRITON and tensor.is_cuda and tensor.dtype in dtypes


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of matrix products in kernels: float32 is exact unless torch's switch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


# As in triton, whose versions, which kernels can call as well, take 10 microseconds on the host.
def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def is_on_current_device(tensor: Tensor) -> bool:
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


def on_device_of_first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first argument, a tensor, the current one: Triton launches kernels on the current one."""

    @functools.wraps(function)
    def guarded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Nearly always there is nothing to do, and the context takes 4 microseconds.
        if is_on_current_device(tensor):
            return function(tensor, *args, **kwargs)
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return guarded
