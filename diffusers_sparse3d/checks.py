"""Checks of single values: integers, numbers and choices. Each names the argument and says what is right."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any


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


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a ValueError that names the argument unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {value!r:.100}")


def _range(least: float | None, most: float | None) -> str:
    """The range in words, after a space."""
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" of at least {least}"
    return "" if most is None else f" of at most {most}"
