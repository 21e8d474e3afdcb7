"""Uninitialised memory that is never right by chance: `torch.empty` and its like return NaN and extreme integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _get_current_dispatch_mode


def _poison_of(dtype: torch.dtype) -> float | int | bool:
    """NaN, or the largest integer: as an index or a size it is far out of range."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def allocate(*arguments: Any, **settings: Any) -> Tensor:
        tensor = function(*arguments, **settings)
        # Dispatch modes and `torch.compile` see all operations: what they record or trace would fill memory as well.
        if _get_current_dispatch_mode() is None and not torch.compiler.is_compiling():
            with torch.no_grad():
                tensor.fill_(_poison_of(tensor.dtype))
        return tensor

    return allocate


def poison_empty_memory() -> None:
    """Replace the functions that allocate uninitialised memory by ones that fill it."""
    # It lists the functions to which `with torch.device(...)` applies: the present ones.
    _device_constructors()
    torch.empty = _poisoned(torch.empty)
    torch.empty_like = _poisoned(torch.empty_like)
    torch.empty_strided = _poisoned(torch.empty_strided)
    Tensor.new_empty = _poisoned(Tensor.new_empty)  # type: ignore[method-assign]
