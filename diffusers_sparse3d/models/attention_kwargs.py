"""Arguments that go through a model to its attention processors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.utils import logging


logger = logging.get_logger(__name__)


def expected_by(processor: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The items of `kwargs` that the processor takes by name, as in diffusers; a warning names the others."""
    # A look at the signature takes as long as launching several kernels, and nearly always there are no arguments.
    if not kwargs:
        return kwargs
    parameters = inspect.signature(processor).parameters
    unused = [name for name in kwargs if name not in parameters]
    if unused:
        logger.warning(
            f"attention_kwargs {unused} are not expected by {processor.__class__.__name__} and are ignored."
        )
    return {name: value for name, value in kwargs.items() if name in parameters}
