"""Checks of the arguments of operators: of types, dtypes and shapes, which cost a few microseconds and no wait."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from ..sparse_tensor import CoordinateCache


def check_floating(**tensors: Tensor) -> None:
    """Check that arguments are dense tensors of a real floating point dtype.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if one has another dtype or layout.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be floating point, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"`{name}` must be a dense tensor, got one of layout {tensor.layout}")


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Check the shape of an argument.

    Args:
        name: of the argument.
        tensor: the argument.
        expected: the sizes; any size fits a letter, which is what the message calls it.

    Raises:
        ValueError: if the shape is another one.
    """
    shape = tensor.shape
    fits = len(shape) == len(expected)
    if not fits or any(size != found for size, found in zip(expected, shape) if not isinstance(size, str)):
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"`{name}` must have shape [{sizes}], got {list(shape)}")


def check_rows(name: str, tensor: Tensor, cache: CoordinateCache) -> None:
    """Check that an argument has a row for each voxel of a cache.

    Raises:
        TypeError: if `cache` is none.
        ValueError: if it has not.
    """
    check_is_cache(cache)
    if tensor.shape[0] != cache.coords.shape[0]:
        voxels = cache.coords.shape[0]
        raise ValueError(f"`{name}` must have a row for each of the {voxels} voxels of `cache`, got {tensor.shape[0]}")


def check_is_cache(cache: CoordinateCache) -> None:
    """Raise a TypeError unless `cache` is a `CoordinateCache`, which this module, below it, cannot name."""
    if not hasattr(cache, "batch_partition"):
        raise TypeError(f"`cache` must be a CoordinateCache, got {type(cache).__name__}")


def check_eps(eps: float) -> None:
    """Check what is added to a variance.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, NaN or infinite.
    """
    _check_is_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"`eps` must be a finite number of at least 0, got {eps}")


def check_scale(scale: float | None) -> None:
    """Check the factor of attention scores, which may be None.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is NaN or infinite.
    """
    if scale is None:
        return
    _check_is_number("scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"`scale` must be finite, got {scale}")


def _check_is_number(name: str, number: float) -> None:
    # Numbers may be symbols while an operator is traced.
    if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"`{name}` must be a number, got {number!r:.100}")


def check_at_least(least: int, **numbers: int) -> None:
    """Check that arguments are integers, and large enough.

    Raises:
        TypeError: if one is no integer.
        ValueError: if one is too small.
    """
    for name, number in numbers.items():
        # Sizes may be symbols while an operator is traced.
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"`{name}` must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"`{name}` must be at least {least}, got {number}")
