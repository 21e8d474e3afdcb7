"""Where the time of a training step goes: a trace of some steps, and a page that sums it up."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..files import write_text, written_beside


# Steps before the profiled ones: kernels are compiled, memory is taken, batches that were ready are used up.
EARLIER_STEPS = 20
# Parts of a step, which the training loop marks.
PARTS = ("data", "forward", "backward", "optimizer", "averages")
# Rows of the table of kernels.
MOST_ROWS = 25


def part(name: str) -> record_function:
    """Marks a part of a step, one of `PARTS`, for the profiler: a context."""
    return record_function(f"step: {name}")


class StepProfiler:
    """Profiles some steps of a training; the first step after `EARLIER_STEPS` is the first of them.

    What lies between two of them, such as a validation, counts too. When they are done, FOLDER/profile.txt has their
    time by parts and kernels, and FOLDER/profile.json is a trace for chrome://tracing or ui.perfetto.dev.

    Args:
        folder: where to write.
        steps: how many to profile.
        device: device of the training.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device):
        self.folder, self.steps, self.device = folder, steps, device
        self._done = 0
        self._start = 0.0
        self._profile: profile | None = None

    def step(self) -> None:
        """Is called after each step."""
        self._done += 1
        if self._done == EARLIER_STEPS:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=activities)
            self._synchronize()
            self._profile.start()
            self._start = time.perf_counter()
        elif self._done == EARLIER_STEPS + self.steps:
            self.close()

    def close(self) -> None:
        """Writes the files, unless that is done, for the steps so far; nothing without a profiled step."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        self._synchronize()
        seconds = time.perf_counter() - self._start
        found.stop()
        if steps := self._done - EARLIER_STEPS:
            page = describe(found, seconds, steps, self.device.type == "cuda")
            write_text(self.folder / "profile.txt", page)
            with written_beside(self.folder / "profile.json") as path:
                found.export_chrome_trace(str(path))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def describe(found: profile, seconds: float, steps: int, on_gpu: bool) -> str:
    """
    The page of a profile.

    Args:
        found: a profile that has stopped.
        seconds: of all its steps.
        steps: their number.
        on_gpu: whether to list what the GPU ran, rather than operators of the processor.
    """
    averages: list[Any] = list(found.key_averages())
    host = [row for row in averages if row.device_type == DeviceType.CPU]
    marked = {row.key.removeprefix("step: "): row for row in host if row.key.startswith("step: ")}
    if on_gpu:
        work = [row for row in averages if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
        times = {row.key: row.self_device_time_total for row in work}
    else:
        work = [row for row in host if not row.key.startswith("step: ")]
        times = {row.key: row.self_cpu_time_total for row in work}
    work.sort(key=lambda row: -times[row.key])
    milliseconds, total = 1e3 * seconds / steps, sum(times.values())
    lines = [f"{steps} steps of {milliseconds:.1f} ms. Times of a step, in ms; the profiler itself takes some.", ""]
    if on_gpu:
        calls = sum(row.count for row in work) / steps
        lines += [
            f"The GPU is busy for {total / 1e6 / seconds:.0%} of the time, with {calls:,.0f} kernels and copies."
        ]
        lines += ["Where it is not, it waits for the host, or for data.", ""]
    lines += ["part            host"]
    for name in PARTS:
        if name in marked:
            lines.append(f"{name:12} {marked[name].cpu_time_total / 1e3 / steps:7.1f}")
    lines += ["", f"{'time':>8} {'share':>6} {'calls':>7}  {'kernel' if on_gpu else 'operator'}"]
    for row in work[:MOST_ROWS]:
        own = times[row.key]
        lines.append(f"{own / 1e3 / steps:8.2f} {own / max(total, 1):6.1%} {row.count / steps:7.1f}  {row.key[:90]}")
    return "\n".join(lines) + "\n"
