"""Checks of the arguments of operators: of types, dtypes and shapes, which cost a few microseconds and no wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from ..sparse_tensor import CoordinateCache


def check_floating(**tensors: Tensor | None) -> None:
    """Check that arguments are tensors of a real floating point dtype, or None.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if one has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be floating point, got {tensor.dtype}")


def check_given(**tensors: Tensor) -> None:
    """Check that required arguments are tensors of a real floating point dtype; unlike `check_floating`, not None.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if one has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"`{name}` must be a tensor, got None")
    check_floating(**tensors)


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
        ValueError: if it has not.
    """
    if tensor.shape[0] != cache.coords.shape[0]:
        voxels = cache.coords.shape[0]
        raise ValueError(f"`{name}` must have a row for each of the {voxels} voxels of `cache`, got {tensor.shape[0]}")


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
