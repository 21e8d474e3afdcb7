"""The switch that collects kernels instead of launching them; works without triton."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


# What kernels are compiled for: runs for real, which plans for example need, and returns what is called on tensors
# without values, if there is anything left to call.
Example = Callable[[], Callable[[], Any] | None]
# What takes the place of launches: a function of the kernel, its arguments and its compile-time parameters.
Collector = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_collector: ContextVar[Collector | None] = ContextVar("diffusers_sparse3d_collector", default=None)


def current_collector() -> Collector | None:
    """The collector of the innermost `collecting` in this context; None where kernels are launched."""
    return _collector.get()


@contextlib.contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    """Hand the kernels that operators would launch in this thread to `collector` inside the `with` block.

    Operators allocate their results, and leave them without values. They compute nothing, so tensors of the block are
    to be ones without values too, as of `FakeTensorMode`: no index must be read from them.
    """
    token = _collector.set(collector)
    try:
        yield
    finally:
        _collector.reset(token)
