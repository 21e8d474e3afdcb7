"""The tuner of tile shapes: times neighbours of the shapes that ship and keeps those that are faster."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from tqdm.auto import tqdm
from triton.runtime.errors import TritonError

from ....sparse_tensor import CoordinateCache
from ..plan import BlockSizes, Plan, make_plan
from . import compressed_attention, segment_attention, selection_attention
from .arguments import AttentionShapes, HeadShape, TileShape
from .backward_inputs import BranchGate, prepare_backward
from .score_bounds import bounds_of_branches
from .tile_shapes import TileShapes, default_shapes, is_possible, save_shapes


# The share of the budget in which compilations start; the rest is for those under way then, and for the timing.
_COMPILATION = 0.6
# A candidate must be faster by more than repeated times of one shape differ.
_MARGIN = 0.03


@dataclass(frozen=True)
class TuningReport:
    """The result of `tune_spatial_sparse_attention`.

    Attributes:
        default: the tile shapes that ship.
        chosen: the tile shapes that are used from now on.
        milliseconds: for each kernel, times with the default and with the chosen shape, of a forward or a backward
            pass of the branch that the kernel belongs to.
        num_timed, num_candidates: candidates that were timed, and all candidates.
        seconds: the duration of the tuning.
        path: the file with the chosen shapes.
    """

    default: TileShapes
    chosen: TileShapes
    milliseconds: dict[str, tuple[float, float]]
    num_timed: int
    num_candidates: int
    seconds: float
    path: Path

    def __str__(self) -> str:
        """A table with a row for each kernel."""
        lines = [f"{'kernel':26}{'default, ms':>12}{'chosen, ms':>12}  rows, keys, warps, stages"]
        for kernel, (default, chosen) in self.milliseconds.items():
            old, new = (tuple(getattr(shapes, kernel)) for shapes in (self.default, self.chosen))
            lines.append(f"{kernel:26}{default:12.3f}{chosen:12.3f}  {old}" + (f" -> {new}" if new != old else ""))
        lines.append(f"{self.num_timed} of {self.num_candidates} candidates in {self.seconds:.1f} s: {self.path}")
        return "\n".join(lines)


def candidates(default: TileShape, heads: HeadShape) -> list[TileShape]:
    """Other shapes for a kernel: one number halved or doubled, or rows and warps doubled together."""
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


def branch_passes(
    plan: Plan, heads: HeadShape, num_compressed: int, topk: int, dtype: torch.dtype
) -> dict[str, tuple[Callable[[Plan], object], Callable[[Plan], object]]]:
    """The forward and the backward pass of "compressed", "selection" and "window" attention, for timing.

    Args:
        plan: of the coordinates.
        heads: the sizes that the plan was made for.
        num_compressed: compressed keys of all samples.
        topk: blocks per query and key/value head.
        dtype: of random queries, keys and values.

    Returns:
        For each branch, two functions of a plan of the same coordinates with any tile shapes. The forward pass of
        compressed attention includes the choice of the blocks.
    """
    device, num_tokens, scale = plan.order.device, len(plan.order), heads.dim**-0.5
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def keys_and_values(count: int) -> tuple[Tensor, Tensor]:
        return random(count, heads.num_kv_heads, heads.dim), random(count, heads.num_kv_heads, heads.value_dim)

    query = random(num_tokens, heads.num_kv_heads * heads.group_size, heads.dim)
    grad_output = random(num_tokens, heads.num_kv_heads * heads.group_size, heads.value_dim)
    grad_query, gate = torch.zeros_like(query), torch.ones(num_tokens, 3, device=device)
    compressed, tokens = keys_and_values(num_compressed), keys_and_values(num_tokens)
    bounds, selected_bounds = bounds_of_branches(query, tokens[0], compressed[0], plan.most_keys)

    def compress(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        return compressed_attention.attend_and_select(query, *compressed, plan.compression, topk, scale, bounds)

    *attended, blocks = compress(plan)

    def select(plan: Plan) -> tuple[Tensor | None, ...]:
        return selection_attention.attend(query, *tokens, blocks, plan.selection, scale, selected_bounds)

    def window(plan: Plan) -> tuple[Tensor, ...]:
        return segment_attention.attend(query, *tokens, plan.window, scale)

    def backward_of(
        branch: str,
        module: ModuleType,
        operands: tuple[Tensor, ...],
        results: Sequence[Tensor],
        added_to: Tensor | None,
    ) -> Callable[[Plan], object]:
        output, log_sum, *kept = results

        def backward(plan: Plan) -> object:
            gates = BranchGate(gate, torch.empty_like(gate), 0)
            prepared = prepare_backward(output, log_sum, grad_output, scale, gates)
            return module.attend_backward(query, *operands, *kept, prepared, getattr(plan, branch), scale, added_to)

        return backward

    selected = [tensor for tensor in select(plan) if tensor is not None]
    return {
        "compressed": (compress, backward_of("compressed", segment_attention, compressed, attended, None)),
        "selection": (
            select,
            backward_of("selection", selection_attention, (*tokens, blocks), selected, grad_query),
        ),
        "window": (window, backward_of("window", segment_attention, tokens, window(plan), grad_query)),
    }


def _milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """The median time of up to `repeats` calls, fewer once they have taken 0.05 s, after one that is not counted."""
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
    """Times candidates for each kernel, and saves the fastest shapes.

    Args:
        coords: `[N, 4]` int32, distinct.
        settings: edges of compression blocks, selection blocks and windows, and the shift of the windows.
        topk: selection blocks per query and key/value head.
        heads: the sizes that the shapes are for.
        dtype: of queries, keys and values.
        budget: seconds.
    """
    begin, device = time.perf_counter(), coords.device
    default, cache = default_shapes(heads, dtype), CoordinateCache(coords)

    def plan_of(shapes: TileShapes) -> Plan:
        # `cache` keeps the parts of plans that shapes have in common.
        return make_plan(cache, BlockSizes(*settings), heads, shapes, dtype)

    passes = branch_passes(plan_of(default), heads, len(cache.downsample(settings[0])[0].coords), topk, dtype)
    runs = {
        f"{branch}_{kernel}": pair[kernel != "forward"]
        for branch, pair in passes.items()
        for kernel in AttentionShapes._fields
    }
    tried = {kernel: candidates(getattr(default, kernel), heads) for kernel in TileShapes._fields}
    # The first candidate of every kernel comes before the second of any: a short budget is shared by all kernels.
    rounds = zip_longest(*([(kernel, shape) for shape in shapes] for kernel, shapes in tried.items()))
    jobs = [job for jobs_of_round in rounds for job in jobs_of_round if job is not None]

    def runs_in_time(kernel: str, shape: TileShape) -> bool:
        if time.perf_counter() - begin > _COMPILATION * budget:
            return False
        try:
            runs[kernel](plan_of(default._replace(**{kernel: shape})))
        except (TritonError, RuntimeError):
            # The GPU has no room for the shape, or the compiler rejects it.
            return False
        return True

    # Triton's compiler releases Python's lock, so threads compile in parallel. Without a GPU nothing is compiled.
    num_threads = min(16, os.cpu_count() or 1) if device.type == "cuda" else 1
    with (
        tqdm(total=len(jobs), desc="Tile shapes: compiling", leave=False) as progress,
        ThreadPoolExecutor(num_threads) as threads,
    ):
        # Defaults first: else each thread would compile the default of the branch's other gradient too.
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
            # The default is timed again, because clocks may have changed.
            times[shipped] = min(times[shipped], time_of(chosen, kernel))
        best = min(times, key=times.__getitem__)
        if times[best] >= (1 - _MARGIN) * times[shipped]:
            best = shipped
        chosen = chosen._replace(**{kernel: best})
        milliseconds[kernel] = (times[shipped], times[best])
    path = save_shapes(chosen, heads, dtype, device)
    return TuningReport(default, chosen, milliseconds, num_timed, len(jobs), time.perf_counter() - begin, path)
