"""A pool of processes for tasks that may crash or hang: such a task is given up and its process is replaced.

The pools of the standard library can neither stop one task nor go on after a crash.
"""

import math
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess


def attempt(function: Callable[..., None], task: tuple) -> str | None:
    """Calls `function(*task)` and returns the message of the error that it raised, None if it raised none."""
    try:
        function(*task)
    except Exception as error:  # input of any origin may raise any error, which is reported rather than raised
        return f"{type(error).__name__}: {error}"
    return None


def work(function: Callable[..., None], connection: Connection) -> None:
    """The loop of a worker process: receives tasks until None, and sends the start and the outcome of each."""
    while (task := connection.recv()) is not None:
        connection.send((False, None))
        connection.send((True, attempt(function, task)))


@dataclass
class Worker:
    """A worker process, the task that it works on, and the time when that task is given up."""

    process: BaseProcess
    connection: Connection
    task: tuple | None = None
    deadline: float = math.inf  # a task's time starts when the process is up


@dataclass
class WorkerPool:
    """Runs `function(*task)` for many tasks.

    Args:
        function: A function of an importable module; its result is ignored.
        num_workers: Number of processes; 0 runs the tasks in this process, without protection.
        timeout: Seconds after which a task is given up.
    """

    function: Callable[..., None]
    num_workers: int
    timeout: float
    workers: list[Worker] = field(default_factory=list)

    def run(self, tasks: list[tuple]) -> Iterator[tuple[tuple, str | None]]:
        """Yields every task with its error message, None if it succeeded, in the order in which the tasks finish."""
        if self.num_workers == 0:
            for task in tasks:
                yield task, attempt(self.function, task)
            return
        pending = deque(tasks)
        self.workers = [self._start() for _ in range(min(self.num_workers, len(tasks)))]
        try:
            while True:
                for worker in self.workers:
                    if worker.task is None and pending:
                        worker.task, worker.deadline = pending.popleft(), math.inf
                        worker.connection.send(worker.task)
                busy = [worker for worker in self.workers if worker.task is not None]
                if not busy:
                    return
                deadline = min(worker.deadline for worker in busy)
                patience = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                ready = wait([worker.connection for worker in busy], patience)
                for worker in busy:
                    current = worker.task
                    if current is None or (worker.connection not in ready and time.monotonic() < worker.deadline):
                        continue
                    finished, reason = self._outcome(worker, worker.connection in ready)
                    if finished:
                        worker.task = None
                        yield current, reason
                    else:
                        worker.deadline = time.monotonic() + self.timeout
        finally:
            for worker in self.workers:
                if worker.task is None:
                    worker.connection.send(None)
                else:  # the caller has given up
                    worker.process.kill()
            for worker in self.workers:
                worker.process.join()

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        connection, other_end = context.Pipe()
        process = context.Process(target=work, args=(self.function, other_end), daemon=True)
        process.start()
        other_end.close()
        return Worker(process, connection)

    def _outcome(self, worker: Worker, ready: bool) -> tuple[bool, str | None]:
        """Returns whether a worker's task is finished, and its error message; a dead or late process is replaced."""
        reason = f"took longer than {self.timeout:g} s"
        if ready:
            try:
                return worker.connection.recv()
            except EOFError:
                worker.process.join()
                reason = f"the process died with exit code {worker.process.exitcode}"
        worker.process.kill()
        self.workers[self.workers.index(worker)] = self._start()
        return True, reason
