"""Switches of the runtime for bug reports and debugging: kernels, direct launches, recorded calls, early compilation.

`runtime_settings` switches in Python, the environment variable `DIFFUSERS_SPARSE3D_RUNTIME` for a whole process.
README.md of this folder says what each switch does.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


VARIABLE = "DIFFUSERS_SPARSE3D_RUNTIME"


class RuntimeSettings(NamedTuple):
    """What the runtime of the operators may do.

    Attributes:
        kernels: run Triton kernels on GPUs; otherwise plain PyTorch, which is much slower and takes more memory.
        direct_launch: launch kernels that triton has compiled directly; otherwise every launch goes through triton.
        recording: repeat recorded calls of functions that launch many kernels; otherwise each call runs in full.
            Recorded calls are launched directly, so nothing is recorded or repeated without `direct_launch`.
        compile_ahead: compile the kernels of a pipeline in threads before its first call, and those of a training
            before its first step; otherwise each is compiled when it is first launched. Nothing is compiled ahead
            without `direct_launch`.
    """

    kernels: bool = True
    direct_launch: bool = True
    recording: bool = True
    compile_ahead: bool = True


_ENTRIES = {"no-" + name.replace("_", "-"): name for name in RuntimeSettings._fields}
# The settings of the innermost `runtime_settings` in this context, None outside of all.
_chosen: ContextVar[RuntimeSettings | None] = ContextVar("diffusers_sparse3d_runtime", default=None)


@functools.cache
def _environment_settings() -> RuntimeSettings:
    """The settings that the environment variable asks for. It is read once, when settings are first needed."""
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    for entry in entries:
        if entry not in _ENTRIES:
            raise ValueError(f"`{VARIABLE}` must be a comma-separated list of {', '.join(_ENTRIES)}, got {entry!r}.")
    return RuntimeSettings()._replace(**{_ENTRIES[entry]: False for entry in entries})


def current_settings() -> RuntimeSettings:
    """The settings that hold here: those of `runtime_settings` in this context, or else of the environment variable.

    Raises:
        ValueError: if the environment variable has an entry that is not known.
    """
    return _chosen.get() or _environment_settings()


# `torch.compile` takes the answer as a constant: a compiled graph keeps the setting it was traced with.
@torch.compiler.assume_constant_result
def kernels_are_on() -> bool:
    """Whether operators may run Triton kernels, by `current_settings`."""
    return current_settings().kernels


@contextlib.contextmanager
def runtime_settings(
    *,
    kernels: bool | None = None,
    direct_launch: bool | None = None,
    recording: bool | None = None,
    compile_ahead: bool | None = None,
) -> Iterator[RuntimeSettings]:
    """Switch parts of the runtime of the operators on or off inside a `with` block.

    The settings hold for this thread (for this context, as `contextvars` has it), and for the backward pass of what
    the operators compute in the block, wherever and whenever that runs. Graphs of `torch.compile` keep `kernels` as it
    was when they were traced.

    Args:
        kernels, direct_launch, recording, compile_ahead: see `RuntimeSettings`; None leaves a setting as it is around
            the block.

    Yields:
        The settings in the block.
    """
    given = RuntimeSettings._fields, (kernels, direct_launch, recording, compile_ahead)
    settings = current_settings()._replace(**{name: value for name, value in zip(*given) if value is not None})
    token = _chosen.set(settings)
    try:
        yield settings
    finally:
        _chosen.reset(token)


def chosen_settings() -> RuntimeSettings | None:
    """The settings of the innermost `runtime_settings`, None outside of all: what `call_with` takes."""
    return _chosen.get()


def call_with(settings: RuntimeSettings | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` with the settings of another thread: autograd has threads of its own."""
    token = _chosen.set(settings)
    try:
        return function(*arguments)
    finally:
        _chosen.reset(token)
