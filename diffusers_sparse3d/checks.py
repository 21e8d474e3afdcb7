"""
Checks before any work: of single values, and of optional packages.

Those of values (integers, numbers, devices and choices) name the argument and say what is right.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

# What `pip install` takes for an optional module that an extra brings; others are installed by their own names.
INSTALLED_BY = {
    "embreex": "'diffusers_sparse3d[render]'",
    "gradio": "'diffusers_sparse3d[app]'",
    "igl": "'diffusers_sparse3d[mesh]'",
    "matplotlib": "'diffusers_sparse3d[train]'",
    "ray": "'diffusers_sparse3d[ray]'",
    "tensorboard": "'diffusers_sparse3d[train]'",
}
# What is imported of optional modules that take no time, to see whether they work; others take long.
TRIED = {"embreex": "embreex.mesh_construction", "igl": "igl"}


def check_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """
    The value as an `int`, checked. Integers of NumPy and of tensors with one element are integers, too.

    Args:
        name: what to call the argument in errors.
        value: the argument.
        least, most: the range; no bound if None.

    Raises:
        ValueError: if it is no integer, or out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"`{name}` must be an integer{_range(least, most)}, got {value!r:.100}")
    return number


def check_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """
    The value as a `float`, checked: a real number that is neither NaN nor infinite.

    Args:
        name: what to call the argument in errors.
        value: the argument.
        least, most: the range; no bound if None.

    Raises:
        ValueError: if it is no finite number, or out of range.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan
    if not math.isfinite(number) or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"`{name}` must be a finite number{_range(least, most)}, got {value!r:.100}")
    return number


def check_positive(name: str, value: Any) -> float:
    """The value as a `float`, checked like `check_number`, and above 0.

    Raises:
        ValueError: if it is no finite number above 0.
    """
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r:.100}")
    return number


def check_device(name: str, device: Any) -> torch.device:
    """
    The device, checked: one that PyTorch can compute on here.

    Args:
        name: what to call the argument in errors.
        device: the argument, a name or a `torch.device`.

    Raises:
        ValueError: if PyTorch does not know it or cannot use it.
    """
    import torch

    try:
        # What has no values, as the device "meta", cannot give one back.
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        message = f"`{name}` must be a device that PyTorch can use here, got {device!r:.100}: {reason}"
        raise ValueError(message) from None


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a ValueError that names the argument unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {value!r:.100}")


def check_packages(purpose: str, *modules: str) -> None:
    """
    Raise an ImportError that says what to install unless all modules are there, or that one of `TRIED` is broken.

    What takes long asks for all that it will need when it starts, not when it comes to need it. Only the modules of
    `TRIED` are imported.

    Args:
        purpose: what needs them, in the singular, to begin the message with.
        modules: names of optional modules.
    """
    missing = [name for name in modules if sys.modules.get(name) is None and find_spec(name) is None]
    if missing:
        packages = " ".join(dict.fromkeys(INSTALLED_BY.get(name, name) for name in missing))
        raise ImportError(f"{purpose} needs {' and '.join(missing)}: `pip install {packages}`")
    for name in modules:
        try:
            if name in TRIED:
                import_module(TRIED[name])
        except Exception as error:  # a compiled module may raise any
            raise ImportError(
                f"{purpose} needs {name}, which is installed but cannot be imported: {type(error).__name__}: {error}"
            ) from error


def _range(least: float | None, most: float | None) -> str:
    """The range in words, after a space."""
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" of at least {least}"
    return "" if most is None else f" of at most {most}"
