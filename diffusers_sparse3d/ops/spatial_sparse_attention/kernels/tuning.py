"""Times the neighbours of the tile shapes that ship and keeps what is faster."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from triton.runtime.errors import TritonError

from ....sparse_tensor import CoordinateCache
from . import Plan, block_selection, make_plan, segment_attention, selection_attention
from .backward_inputs import prepare_backward
from .common import HeadShape, TileShape
from .score_bounds import NO_BOUNDS, bounds_of_branches
from .tile_shapes import TileShapes, default_shapes, is_possible, save_shapes


# Share of the budget in which candidates are compiled; the rest is for those under way then, and for the timing.
_COMPILATION = 0.6
# A candidate has to be faster by more than the times of one and the same shape differ.
_MARGIN = 0.03


@dataclass(frozen=True)
class TuningReport:
    """What `tune_spatial_sparse_attention` found.

    Attributes:
        default: the tile shapes that ship.
        chosen: those that are used from now on.
        milliseconds: for each kernel, of the default and of the chosen shape, a forward or a backward pass of the
            branch of the attention that the kernel is part of.
        num_timed, num_candidates: how many candidates there was time for, and how many there are.
        seconds: that it took.
        path: the file with the choice.
    """

    default: TileShapes
    chosen: TileShapes
    milliseconds: dict[str, tuple[float, float]]
    num_timed: int
    num_candidates: int
    seconds: float
    path: Path

    def __str__(self) -> str:
        """A table."""
        lines = [f"{'kernel':26}{'default, ms':>12}{'chosen, ms':>12}  rows, keys, warps, stages"]
        for kernel, (default, chosen) in self.milliseconds.items():
            old, new = (tuple(getattr(shapes, kernel)) for shapes in (self.default, self.chosen))
            lines.append(f"{kernel:26}{default:12.3f}{chosen:12.3f}  {old}" + (f" -> {new}" if new != old else ""))
        lines.append(f"{self.num_timed} of {self.num_candidates} candidates in {self.seconds:.1f} s: {self.path}")
        return "\n".join(lines)


def candidates(default: TileShape, heads: HeadShape) -> list[TileShape]:
    """Other shapes for a kernel: one step away from the default, or as much per thread."""
    rows, keys, warps, stages = default
    steps = [
        TileShape(rows, keys, warps, stages + 1),
        TileShape(rows, keys // 2, warps, stages),
        TileShape(rows, keys * 2, warps, stages),
        TileShape(rows * 2, keys, warps * 2, stages),
        TileShape(rows, keys, warps * 2, stages),
        TileShape(rows * 2, keys, warps, stages),
        TileShape(rows // 2, keys, warps, stages),
        TileShape(rows, keys, warps // 2, stages),
        TileShape(rows, keys, warps, stages - 1),
    ]
    return [shape for shape in steps if is_possible(shape, heads) and shape.num_warps <= 8]


def synthetic_coords(device: torch.device) -> Tensor:
    """`[46k, 4]` int32: the cells of a sphere at 128^3, as many as a detailed shape has."""
    cells = torch.cartesian_prod(*[torch.arange(128, dtype=torch.int32, device=device)] * 3)
    shell = ((cells - 63.5).norm(dim=1) - 50).abs() < 0.75
    return torch.nn.functional.pad(cells[shell], (1, 0)).contiguous()


def _runs(
    plan: Plan, heads: HeadShape, num_compressed: int, topk: int, dtype: torch.dtype
) -> dict[str, Callable[[Plan], object]]:
    """For each kernel what it is timed in: the forward or backward pass of a branch, with a plan of any shapes."""
    device, num_tokens, scale = plan.order.device, len(plan.order), heads.dim**-0.5
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def keys_and_values(count: int) -> tuple[Tensor, Tensor]:
        return random(count, heads.num_kv_heads, heads.dim), random(count, heads.num_kv_heads, heads.value_dim)

    query = random(num_tokens, heads.num_kv_heads * heads.group_size, heads.dim)
    grad_output = random(num_tokens, heads.num_kv_heads * heads.group_size, heads.value_dim)
    grad_query = torch.zeros_like(query)
    compressed, tokens = keys_and_values(num_compressed), keys_and_values(num_tokens)
    bounds, selected_bounds = bounds_of_branches(query, tokens[0], compressed[0], plan.most_keys, scale)
    compressed_sum = segment_attention.attend(query, *compressed, plan.compressed, scale, bounds)[1]

    def select(plan: Plan) -> Tensor:
        return block_selection.select(query, compressed[0], compressed_sum, plan.blocks, topk, scale)

    runs: dict[str, Callable[[Plan], object]] = {"scores": select}
    for branch, module, operands, known, added_to in (
        ("compressed", segment_attention, compressed, bounds, None),
        ("selection", selection_attention, (*tokens, select(plan)), selected_bounds, grad_query),
        ("window", segment_attention, tokens, NO_BOUNDS, grad_query),
    ):
        inputs = (query, *operands)
        output, log_sum, *kept = module.attend(*inputs, getattr(plan, branch), scale, known)
        prepared, _ = prepare_backward(output, log_sum, grad_output, scale)

        def forward(plan: Plan, branch=branch, module=module, inputs=inputs, known=known) -> object:
            return module.attend(*inputs, getattr(plan, branch), scale, known)

        def backward(
            plan: Plan, branch=branch, module=module, tensors=(*inputs, *kept, prepared), added_to=added_to
        ) -> object:
            return module.attend_backward(*tensors, getattr(plan, branch), scale, added_to)

        runs |= {f"{branch}_forward": forward}
        runs |= {f"{branch}_query_gradient": backward, f"{branch}_key_gradient": backward}
    return runs


def _milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median of some calls after one that is not counted; no more of them once they have taken 0.05 s together."""
    times: list[float] = []
    while len(times) <= repeats and sum(times[1:]) < 50:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def tune(
    coords: Tensor, settings: tuple[int, int, int, int], topk: int, heads: HeadShape, dtype: torch.dtype, budget: float
) -> TuningReport:
    """
    Args:
        coords: `[N, 4]` int32, distinct.
        settings: blocks of compression and of selection, window and its shift.
        topk: selection blocks per query.
        heads: what the shapes are for.
        dtype: of queries, keys and values.
        budget: seconds.
    """
    begin, device = time.perf_counter(), coords.device
    default, cache = default_shapes(heads, dtype), CoordinateCache(coords)

    def plan_of(shapes: TileShapes) -> Plan:
        # `cache` keeps its parts.
        return make_plan(cache, *settings, heads, shapes)

    runs = _runs(plan_of(default), heads, len(cache.downsample(settings[0])[0].coords), topk, dtype)
    tried = {kernel: candidates(getattr(default, kernel), heads) for kernel in TileShapes._fields}
    # First the first candidate of every kernel, then the second: if the time does not suffice, each had its chance.
    rounds = zip_longest(*([(kernel, shape) for shape in shapes] for kernel, shapes in tried.items()))
    jobs = [job for jobs_of_round in rounds for job in jobs_of_round if job is not None]

    def runs_in_time(kernel: str, shape: TileShape) -> bool:
        if time.perf_counter() - begin > _COMPILATION * budget:
            return False
        try:
            runs[kernel](plan_of(default._replace(**{kernel: shape})))
        except (TritonError, RuntimeError):
            # The GPU has no room for it, or the compiler cannot do it.
            return False
        return True

    # Triton's compiler releases the lock of the interpreter. Without a GPU nothing is compiled.
    num_threads = min(16, os.cpu_count() or 1) if device.type == "cuda" else 1
    with (
        tqdm(total=len(jobs), desc="Tile shapes: compiling", leave=False) as progress,
        ThreadPoolExecutor(num_threads) as threads,
    ):
        # Else each thread with a gradient would compile the other gradient of the branch too.
        list(threads.map(lambda run: run(plan_of(default)), set(runs.values())))
        futures = {threads.submit(runs_in_time, *job): job for job in jobs}
        for _ in as_completed(futures):
            progress.update()
        compiled = {job for future, job in futures.items() if future.result()}

    def time_of(shapes: TileShapes, kernel: str) -> float:
        plan = plan_of(shapes)
        return _milliseconds(lambda: runs[kernel](plan), device)

    chosen, milliseconds, num_timed = default, {}, 0
    for kernel in tqdm(TileShapes._fields, desc="Tile shapes: timing", leave=False):
        times = {getattr(default, kernel): time_of(chosen, kernel)}
        for shape in tried[kernel]:
            if (kernel, shape) in compiled and time.perf_counter() - begin < budget:
                times[shape] = time_of(chosen._replace(**{kernel: shape}), kernel)
        num_timed += len(times) - 1
        shipped, *others = times
        if others:
            # Timed again: clocks may have changed since the first time.
            times[shipped] = min(times[shipped], time_of(chosen, kernel))
        best = min(times, key=times.__getitem__)
        if times[best] >= (1 - _MARGIN) * times[shipped]:
            best = shipped
        chosen = chosen._replace(**{kernel: best})
        milliseconds[kernel] = (times[shipped], times[best])
    path = save_shapes(chosen, heads, dtype, device)
    return TuningReport(default, chosen, milliseconds, num_timed, len(jobs), time.perf_counter() - begin, path)
