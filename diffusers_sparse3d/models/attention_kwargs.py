"""Arguments that go through a model to its attention processors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils import logging

from ..checks import check_number
from .compatibility import apply_lora_scale


logger = logging.get_logger(__name__)

NAME = "attention_kwargs"


def check_attention_kwargs(value: Any) -> None:
    """
    Check that `attention_kwargs` are a dictionary with names as keys, or None, and their `scale` is a number.

    Raises:
        TypeError: if they are something else.
        ValueError: if `scale` is no finite number.
    """
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{NAME}` must be a dictionary with names as keys, got {value!r:.100}")
    if "scale" in value:
        check_number(f"{NAME}['scale']", value["scale"])


def with_attention_kwargs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a model's `forward`: checks its `attention_kwargs`, and weights LoRA layers with their `scale`."""
    scaled = apply_lora_scale(NAME)(forward)
    names = list(inspect.signature(forward).parameters)
    position = names.index(NAME)

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position:  # diffusers looks for them by name alone
            args, kwargs = args[:position], {**kwargs, **dict(zip(names[position:], args[position:]))}
        check_attention_kwargs(kwargs.get(NAME))
        return scaled(*args, **kwargs)

    return wrapper


# Not at each of some hundred calls of a generation.
@functools.cache
def warn_of_unused(names: tuple[str, ...], processor: str) -> None:
    """Warn, once in a process, of arguments that a processor does not take."""
    logger.warning(f"attention_kwargs {list(names)} are not expected by {processor} and are ignored.")


def expected_by(processor: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The items of `kwargs` that the processor takes by name, as in diffusers; a warning names the others."""
    # A look at the signature takes as long as launching several kernels, and nearly always there are no arguments.
    if not kwargs:
        return kwargs
    parameters = inspect.signature(processor).parameters
    unused = [name for name in kwargs if name not in parameters]
    if unused:
        warn_of_unused(tuple(unused), type(processor).__name__)
    return {name: value for name, value in kwargs.items() if name in parameters}
