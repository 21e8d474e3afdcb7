"""Kernels collected instead of launched, and compiled many at a time; works without triton, where it does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.utils import logging

from .dispatch import HAS_TRITON
from .settings import current_settings


logger = logging.get_logger(__name__)

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


def compile_examples(
    description: str,
    examples: Callable[[], Iterable[Example]],
    device: torch.device,
    show_progress: Callable[[int], Any] | None = None,
) -> bool:
    """Compile the kernels of examples, unless they are in triton's cache on disk, and wait for them.

    Args:
        description: tells examples with other kernels apart, the same in each process.
        examples: makes the examples, see `compile_ahead`.
        device: where the kernels will run. Nothing is done on a CPU, with one processor, or if the settings say so.
        show_progress: see `compile_ahead`.

    Returns:
        Whether the kernels are compiled, but for those that could not be.
    """
    settings = current_settings()
    if not (HAS_TRITON and device.type == "cuda" and settings.kernels and settings.compile_ahead):
        return False
    from .compile_ahead import CompiledBefore, can_compile_ahead, compile_ahead

    if not can_compile_ahead(device):
        return False
    before = CompiledBefore(description, device)
    if not before:
        for error in compile_ahead([*examples()], device, show_progress).errors:
            logger.info(f"Kernels that were not compiled ahead will be when they are needed: {error!r}")
        # With an error too: it would be the same again, and take as long.
        before.note()
    return True
