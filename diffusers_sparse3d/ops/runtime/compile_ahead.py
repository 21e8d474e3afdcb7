"""Kernels compiled before their first launch, many at a time.

A call that meets thirty new kernels waits for one compilation after the other. `compile_ahead` calls functions on
tensors without values, collects the kernels that they would launch, and compiles these in threads: triton's compiler
works outside of Python's lock. Needs the package triton.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .collection import Example, collecting
from .dispatch import dot_precision
from .launch import Kernel, StandIn, describe, launches_directly, specializes


_MOST_THREADS = 16
# The parameters of kernels that are counts of voxels and of the blocks that they choose.
_COUNTS = ("num_rows", "num_choices", "chunk_choices")
_NOTE = "diffusers_sparse3d_compiled"


class Compilation(NamedTuple):
    """What `compile_ahead` did.

    Attributes:
        num_kernels: compiled, or found in triton's cache.
        errors: of examples and of compilations. A call that needs such a kernel raises for itself, if it fails again.
    """

    num_kernels: int
    errors: list[Exception]


def num_threads() -> int:
    """How many kernels are compiled at a time: one for each processor of this process, at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)


def can_compile_ahead(device: torch.device) -> bool:
    """Whether compiling ahead saves time: on a GPU that kernels are launched on directly, with several processors."""
    return device.type == "cuda" and num_threads() > 1 and launches_directly()


class CompiledBefore:
    """A note in triton's cache that the kernels of a call are in it; it goes when the cache is cleared.

    What is there need not be looked for: to trace the examples takes longer than to load the kernels one by one.

    Args:
        description: tells calls with other kernels apart, the same in each process.
        device: the GPU.
    """

    def __init__(self, description: str, device: torch.device):
        gpu = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        identity = (description, gpu, triton.__version__, torch.__version__, dot_precision(torch.float32))
        key = hashlib.sha256(repr((*identity, _source_hash())).encode()).hexdigest()
        self._cache = triton.runtime.cache.get_cache_manager(key)

    def __bool__(self) -> bool:
        return self._cache.get_file(_NOTE) is not None

    def note(self) -> None:
        """Leave the note."""
        self._cache.put("compiled", _NOTE, binary=False)


@functools.cache
def _source_hash() -> str:
    """A hash of the sources that have kernels, and of those that launch them."""
    package = Path(__file__).parents[2]
    folders = ("ops/**/*.py", "geometry/kernels/*.py", "models/*.py")
    sources = sorted(source for folder in folders for source in package.glob(folder))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def compile_ahead(
    examples: Sequence[Example],
    device: torch.device,
    show_progress: Callable[[int], Any] | None = None,
) -> Compilation:
    """Compile the kernels that examples launch, and wait for them.

    Args:
        examples: each runs in a thread of its own, without gradients. What it returns is called on fake tensors, with
            what it closes over as it is: weights and plans.
        device: the GPU.
        show_progress: returns a progress bar for a number of kernels, as a context manager with `update`.

    Returns:
        What was compiled. No error of an example or of the compiler is raised.
    """
    with ThreadPoolExecutor(num_threads(), initializer=_use_device, initargs=(device,)) as pool:
        jobs = _Jobs(pool)
        try:
            traced = [jobs.submit(jobs.trace, example) for example in examples]
            errors = [error for future in traced if (error := future.result()) is not None]
            with _progress(show_progress, len(jobs.compilations)) as progress:
                for future in as_completed(jobs.compilations):
                    progress.update()
                    if (error := future.result()) is not None:
                        errors.append(error)
        except BaseException:
            # Somebody does not want to wait.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Compilation(len(jobs.compilations), errors)


class _Jobs:
    """The work of `compile_ahead`: traces of examples, and compilations that they ask for.

    Args:
        pool: does the work.

    Attributes:
        compilations: of each kernel for each kind of arguments one.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        self.compilations: list[Future[Exception | None]] = []
        self._pool = pool
        self._known: set[tuple[Any, ...]] = set()
        # Tracing is Python alone: two traces at once would only wait for each other.
        self._tracing = threading.Lock()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Exception | None]:
        """Call a function in a thread, with the settings of this one; its result is the error, if there is one."""
        return self._pool.submit(contextvars.copy_context().run, _error_of, function, *arguments)

    @torch.no_grad()
    def trace(self, example: Example) -> None:
        """Run an example, and ask for the kernels of what it returns."""
        call = example()
        if call is not None:
            with self._tracing, FakeTensorMode(allow_non_fake_inputs=True), collecting(self._collect):
                call()

    def _collect(self, kernel: Kernel, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Compile a kernel for any number of cells, unless it is known; a `collection.Collector`."""
        for alike in _for_other_counts(kernel, _without_values(arguments)):
            key: list[Any] = [kernel, *constants.items()]
            if describe(alike, key) and tuple(key) not in self._known:
                self._known.add(tuple(key))
                self.compilations.append(self.submit(kernel.compile, alike, constants))


def _for_other_counts(kernel: Kernel, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Arguments, and if triton compiles anew where 16 divides a count, the same for counts of the other kind.

    Other cells than those of the example are as many as they are.
    """
    yield arguments
    function = kernel.function
    others = list(arguments)
    for place, (name, argument) in enumerate(zip(function.arg_names, arguments)):
        if name in _COUNTS and specializes(function, name):
            others[place] = argument + 1 if argument % 16 == 0 else 16 * argument
    if others != list(arguments):
        yield tuple(others)


def _without_values(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a kernel with stand-ins for tensors without values; in aggregates too."""
    result = []
    for argument in arguments:
        if isinstance(argument, FakeTensor):
            argument = StandIn(argument.dtype, argument.storage_offset() * argument.itemsize % 16 == 0)
        elif isinstance(argument, tuple):
            argument = _without_values(argument)
        result.append(argument)
    return tuple(result) if type(arguments) is tuple else type(arguments)(*result)


def _error_of(function: Callable[..., Any], *arguments: Any) -> Exception | None:
    """Call a function; its exception."""
    try:
        function(*arguments)
    except Exception as error:
        return error
    return None


def _use_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


class _NoProgress:
    def __enter__(self) -> _NoProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass


def _progress(show_progress: Callable[[int], Any] | None, total: int) -> Any:
    return _NoProgress() if show_progress is None else show_progress(total)
