"""Medians of times and peaks of memory, for `benchmarks/ssa.py`."""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


# Seconds of calls before those that are timed.
_WARM_UP = 0.1
# Calls in a row that are timed together.
_IN_A_ROW = 5


class Timer:
    """Medians of times, and peaks of memory, on one device."""

    def __init__(self, device: str, repeats: int, budget: float):
        self.cuda, self.repeats, self.budget = torch.device(device).type == "cuda", repeats, budget

    def wait(self) -> None:
        """Waits until the GPU has nothing to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = lambda: ()) -> float:
        """The median time of `repeats` calls after a warm-up; of fewer, two at least, if they exceed the budget.

        A single one, as in a trial of the script, follows one other call.

        `prepare` returns the arguments of each call; its time is not counted.
        """
        # The first call compiles kernels; Python gets faster in the hundred calls after it.
        function(*prepare())
        self.wait()
        begin = time.perf_counter()
        while self.repeats > 1 and time.perf_counter() - begin < _WARM_UP:
            function(*prepare())
            self.wait()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < self.repeats and (len(times) < 2 or time.perf_counter() - begin < self.budget):
            arguments = prepare()
            self.wait()
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function(*arguments)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                start_time = time.perf_counter()
                function(*arguments)
                times.append(1e3 * (time.perf_counter() - start_time))
            # Freed before the next call: the results of two calls may not fit in memory.
            del arguments
        return sorted(times)[len(times) // 2]

    def extra_gib(self, function: Callable[[], Any]) -> float | None:
        """The GiB that a call adds to the allocated memory at its peak; None without a GPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def both_ways(self, function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float | None]:
        """Times and memory of a function forward and backward, with respect to `leaves`."""
        with torch.no_grad():
            forward = self.milliseconds(function)
            forward_gib = self.extra_gib(function)
            grad_output = torch.randn_like(function())

        def backward(output: Tensor) -> None:
            torch.autograd.grad(output, leaves, grad_output)

        return {
            "forward": forward,
            "backward": self.milliseconds(backward, lambda: (function(),)),
            "forward_gib": forward_gib,
            "with_backward_gib": self.extra_gib(lambda: backward(function())),
        }

    def in_a_row(self, function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
        """`both_ways` without memory, of `_IN_A_ROW` calls at a time."""
        times = []
        for run in self._forward_and_step(function, leaves):

            def calls(run: Callable[[], None] = run) -> None:
                for _ in range(_IN_A_ROW):
                    run()

            times.append(self.milliseconds(calls) / _IN_A_ROW)
        return {"forward": times[0], "backward": times[1] - times[0]}

    @staticmethod
    def _forward_and_step(function: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Callable[[], None], ...]:
        with torch.no_grad():
            grad_output = torch.randn_like(function())

        def forward() -> None:
            with torch.no_grad():
                function()

        def step() -> None:
            torch.autograd.grad(function(), leaves, grad_output)

        return forward, step

    def replayed(self, function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
        """`both_ways` without memory, captured as CUDA graphs; nothing without a GPU."""
        if not self.cuda:
            return {}
        times = []
        for run in self._forward_and_step(function, leaves):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            times.append(self.milliseconds(graph.replay))
            # A graph keeps its memory until it is deleted.
            del graph
        return {"forward": times[0], "backward": times[1] - times[0]}


def make_leaves(shapes: Iterable[tuple[int, ...]], args: argparse.Namespace) -> list[Tensor]:
    """Normally distributed tensors that want gradients."""
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = getattr(torch, args.dtype)
    return [torch.randn(shape, generator=generator, device=args.device).to(dtype).requires_grad_() for shape in shapes]


def pair(row: dict[str, Any], *names: str) -> str:
    """Two figures of a row as text, "-" for a missing one."""
    return " / ".join("-" if row.get(name) is None else f"{row[name]:.2f}" for name in names)
