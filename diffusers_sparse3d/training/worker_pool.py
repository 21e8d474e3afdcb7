"""A pool of processes for tasks that may crash, hang or run out of memory: such a task costs nothing but itself.

The pools of the standard library can neither stop one task nor go on after a crash.
"""

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


# Linux ends the process with the highest score first when memory runs out: a worker, never the one that leads.
OOM_SCORE = "800"


@dataclass(frozen=True)
class Failure:
    """Why a task failed.

    Attributes:
        cause: One word, by which failures are counted: the attribute `cause` of the error that was raised, or the name
            of its class; "memory", "timeout", "killed" or "crash" for what happened to the process.
        reason: One sentence.
        retry: Whether the task may succeed when it runs alone.
    """

    cause: str
    reason: str
    retry: bool = False


def attempt(function: Callable[..., None], task: tuple) -> Failure | None:
    """Calls `function(*task)` and returns what went wrong, None if nothing did."""
    try:
        function(*task)
    except Exception as error:  # input of any origin may raise any error, which is reported rather than raised
        cause = getattr(error, "cause", None)
        reason = str(error) if cause else f"{type(error).__name__}: {error}"
        # PyTorch's error on a GPU is no MemoryError, and may be the cause of another one.
        errors = [error, error.__cause__]
        if any(isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError" for each in errors):
            return Failure("memory", reason, retry=True)
        return Failure(cause or type(error).__name__, reason)
    return None


def work(
    function: Callable[..., None],
    setup: Callable[[int], None] | None,
    modules: Sequence[str],
    index: int,
    connection: Connection,
) -> None:
    """The loop of a worker process: receives tasks until None, and sends the start and the outcome of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that leads ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(OOM_SCORE)
    for name in modules:  # before any task, whose time this is not; a forked process has them already
        importlib.import_module(name)
    if setup is not None:
        setup(index)
    with contextlib.suppress(EOFError, OSError):
        while (task := connection.recv()) is not None:
            connection.send((False, None))
            connection.send((True, attempt(function, task)))


def _end_with_parent() -> None:
    """Waits for the end of the process that leads and then ends this one, in the middle of its task."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _start_server(preload: list[str]) -> None:
    """Starts the server that imports modules once and forks a process in milliseconds, unless it runs.

    What it imports must be found where this process finds it, so it gets the path of modules.
    """
    from multiprocessing import forkserver  # not on Windows

    multiprocessing.set_forkserver_preload(preload)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


@dataclass
class Worker:
    """A worker process, its number, the task that it works on, and the time when that task is given up."""

    process: BaseProcess
    connection: Connection
    index: int
    task: tuple | None = None
    deadline: float = math.inf  # a task's time starts when the process is up
    second_attempt: bool = False

    def send(self, task: tuple | None) -> None:
        """Sends a task; a process that is dead already shows when its answer is awaited."""
        with contextlib.suppress(OSError):
            self.connection.send(task)


class WorkerPool:
    """Runs `function(*task)` for many tasks.

    A task whose process dies, or that runs out of memory, is tried once more when all others are done, alone.

    Args:
        function: A function of an importable module; its result is ignored.
        num_workers: Number of processes; 0 runs the tasks in this process, without protection.
        timeout: Seconds after which a task is given up.
        setup: A function of an importable module that each process calls first, with its number from 0 on.
        preload: Names of modules that the tasks need. They are imported once, by a server that forks the processes, or
            by each process before its first task.
        uses_gpu: Whether tasks use a GPU. Each process is then a new interpreter, which takes seconds to start: CUDA
            refuses to work in a process that is forked from one that has asked for GPUs, as many packages do when
            they are imported.

    Raises:
        RuntimeError: from `run`, if processes end before they start, one after the other.
    """

    def __init__(
        self,
        function: Callable[..., None],
        num_workers: int,
        timeout: float,
        setup: Callable[[int], None] | None = None,
        preload: Sequence[str] = (),
        uses_gpu: bool = False,
    ):
        self._forks = sys.platform == "linux" and not uses_gpu
        self.preload = [function.__module__, *preload]
        self.function, self.num_workers, self.timeout, self.setup = function, num_workers, timeout, setup
        self.workers: list[Worker] = []
        self._first: deque[tuple] = deque()
        self._last: deque[tuple] = deque()
        self._failed_starts = 0

    def add_first(self, task: tuple) -> None:
        """Adds a task while `run` is at work, before all that have not begun."""
        self._first.append(task)

    def run(self, tasks: Iterable[tuple]) -> Generator[tuple[tuple, Failure | None], None, None]:
        """Yields every task with what went wrong, None if nothing did, in the order in which the tasks finish.

        Tasks are drawn from `tasks` one at a time, as processes are free.
        """
        source = iter(tasks)
        if self.num_workers == 0:
            while (task := self._next(source)) is not None:
                yield task, attempt(self.function, task)
            return
        try:
            while True:
                self._hand_out(source)
                busy = [worker for worker in self.workers if worker.task is not None]
                if not busy:
                    return
                deadline = min(worker.deadline for worker in busy)
                patience = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                ready = wait([worker.connection for worker in busy], patience)
                for worker in busy:
                    if worker.connection not in ready and time.monotonic() < worker.deadline:
                        continue
                    task, second_attempt = worker.task, worker.second_attempt
                    finished, failure = self._outcome(worker, worker.connection in ready)
                    if not finished:
                        worker.deadline = time.monotonic() + self.timeout
                        continue
                    worker.task = None
                    assert task is not None
                    if failure is not None and failure.retry and not second_attempt:
                        self._last.append(task)
                    else:
                        yield task, failure
        finally:
            self._stop()

    def _next(self, source: Iterator[tuple]) -> tuple | None:
        return self._first.popleft() if self._first else next(source, None)

    def _hand_out(self, source: Iterator[tuple]) -> None:
        """Gives a task to each process that has none, and starts processes as long as there are tasks for them."""
        free = [worker for worker in self.workers if worker.task is None]
        while free or len(self.workers) < self.num_workers:
            task, second_attempt = self._next(source), False
            if task is None:
                if not self._last or any(worker.task is not None for worker in self.workers):
                    return
                task, second_attempt = self._last.popleft(), True
            worker = free.pop() if free else self._start()
            worker.task, worker.deadline, worker.second_attempt = task, math.inf, second_attempt
            worker.send(task)

    def _start(self) -> Worker:
        index = min(set(range(self.num_workers)) - {worker.index for worker in self.workers})
        context: Any = multiprocessing.get_context("forkserver" if self._forks else "spawn")
        if self._forks:
            _start_server(self.preload)
        connection, other_end = context.Pipe()
        arguments = (self.function, self.setup, self.preload, index, other_end)
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        other_end.close()
        self.workers.append(Worker(process, connection, index))
        return self.workers[-1]

    def _outcome(self, worker: Worker, ready: bool) -> tuple[bool, Failure | None]:
        """Returns whether a worker's task is finished, and how; a dead or late process is removed."""
        failure = Failure("timeout", f"took longer than {self.timeout:g} s")
        if ready:
            try:
                message: tuple[bool, Failure | None] = worker.connection.recv()
                self._failed_starts = 0
                return message
            except (EOFError, OSError):  # a process that is killed may reset its connection
                worker.process.join()
                code = worker.process.exitcode
                killed = code == -signal.SIGKILL
                advice = ", as those are that use too much memory" if killed else ""
                reason = f"the process {'was killed' if killed else 'died'} with exit code {code}{advice}"
                failure = Failure("killed" if killed else "crash", reason, retry=True)
                self._failed_starts += worker.deadline == math.inf
                if self._failed_starts > 3 + self.num_workers:
                    raise RuntimeError(f"Worker processes end before they start, the last one: {reason}") from None
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        return True, failure

    def _stop(self) -> None:
        for worker in self.workers:
            if worker.task is None:
                worker.send(None)
            else:  # the caller has given up
                worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
