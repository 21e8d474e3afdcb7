"""
Times Spatial Sparse Attention beside dense attention, its stages, a SparseDiT block and the whole model.

    python benchmarks/ssa.py --mesh MESH ... --json ssa.json --plot ssa.png

Tokens are latent cells of the meshes at 128^3 latent resolution (1024^3 samples), in block order (blocks of 8^3). To
have exactly N of them, the grids of the meshes are put side by side along x, over and over again, and the first N
cells in block order are taken: whole shapes, and of the last one a part. Queries, keys and values are normally
distributed.

- attention: SSA between the projections (32 query heads, 2 key/value heads of 32 channels, blocks of 4 and 8, windows
  of 8 shifted by 4), `scaled_dot_product_attention` with FLASH_ATTENTION at 32 heads x 32 and with cuDNN at 16 x 64.
  The same in a row, call after call without waiting for the GPU, as models call it; and replayed as CUDA graphs. Of
  both, the backward pass is the difference of a whole step and the forward pass. With few tokens, launching takes
  longer than computing.
- stages: the kernels of each branch by themselves. That of the compressed keys chooses the blocks.
- block: one SparseDiT block, its coordinates planned, and the same replayed as CUDA graphs.
- `--tune`: times the tile shapes of the kernels first, and the parts with the best; the report has both times.
- model: 24 blocks, planned as all steps of a sampling loop after the first are; the forward pass again with
  `enable_cuda_graphs`; planning by itself. The backward pass with gradient checkpointing, so it computes the forward
  pass again.
- `--compile`: blocks compiled by `compile_repeated_blocks`, in a mode of `torch.compile`.

Times are medians in milliseconds after 0.1 s of warm-up, by CUDA events on a GPU. Memory is the allocator's peak less
the memory of inputs, weights and plan. Forward memory is without autograd; "with backward" is from the start of the
forward to the end of the backward pass, gradients included. Cases that do not fit or are not supported are left out.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmark_meshes import load_or_torus, mesh_name
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface
from diffusers_sparse3d.ops.spatial_sparse_attention import plan_spatial_sparse_attention, spatial_sparse_attention
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from result_files import describe_run, parse_arguments, write_report
from ssa_model import TINY_SIZES, Sizes, measure_model
from ssa_timer import Timer, make_leaves, pair


PARTS = ("attention", "stages", "block", "model")


def mesh_cells(path: str | None, resolution: int) -> Tensor:
    """`[M, 3]` int32 latent cells of a mesh, of a torus if None."""
    return cells_near_surface(load_or_torus(path), resolution)


def take_tokens(shapes: list[Tensor], count: int, resolution: int, block_size: int) -> Tensor:
    """Exactly `count` cells of shapes side by side, in block order.

    Args:
        shapes: `[M, 3]` int32 latent cells of each shape.
        count: of the result.
        resolution: samples per axis of a shape's grid.
        block_size: edge of a block in cells, a divisor of the grid.

    Returns:
        `[count, 4]` int32 (0, x, y, z).
    """
    taken, total = [], 0
    while total < count:
        cells = F.pad(shapes[len(taken) % len(shapes)], (1, 0))
        cells = cells[CoordinateCache(cells, 1).partition(block_size).order]
        cells[:, 1] += len(taken) * (resolution // 8)
        taken.append(cells)
        total += len(cells)
    return torch.cat(taken)[:count]


def ssa_leaves(cache: CoordinateCache, sizes: Sizes, args: argparse.Namespace) -> list[Tensor]:
    """Query, key, value, compressed key, compressed value and gate."""
    count, compressed = len(cache.coords), len(cache.downsample(sizes.settings[0])[0].coords)
    rows = [(count, sizes.heads), *[(count, sizes.kv_heads)] * 2, *[(compressed, sizes.kv_heads)] * 2]
    return make_leaves([*((*shape, sizes.dim) for shape in rows), (count, 3)], args)


# Figures of `all_times` besides those of single calls, and their names in tables.
OTHER_WAYS = {"in_a_row": "calls in a row", "replayed": "replayed as CUDA graphs"}


def all_times(function: Callable[[], Tensor], leaves: list[Tensor], timer: Timer) -> dict[str, Any]:
    """The times of an attention: single calls with their memory, and in the other ways."""
    return timer.both_ways(function, leaves) | {way: getattr(timer, way)(function, leaves) for way in OTHER_WAYS}


def measure_dense(count: int, heads: int, dim: int, backend: SDPBackend, timer: Timer, args: Any) -> dict[str, Any]:
    """The times of dense attention of `count` tokens; none if the backend does not support it here."""
    leaves = make_leaves([(1, heads, count, dim)] * 3, args)
    try:
        with sdpa_kernel(backend):

            def attend() -> Tensor:
                return F.scaled_dot_product_attention(*leaves)

            return all_times(attend, leaves, timer)
    except RuntimeError as error:
        print(f"{backend.name} at {count:,} tokens: {str(error).splitlines()[0]}")
        return {}


def measure_attention(
    tokens: dict[int, CoordinateCache], sizes: Sizes, timer: Timer, args: Any, keep: Callable[[list[dict]], None]
) -> None:
    """Hands `keep` a row for each case so far, with the times of SSA and of dense attention of the same tokens."""
    flash, wide = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    if args.device == "cpu":
        flash = wide = SDPBackend.MATH
    print(f"{'tokens':>8} {'k':>3}  {'SSA':>17}  {'flash':>17}  {'cuDNN, wide heads':>17}", end="  ")
    print(f"{'flash / SSA':>13}  {'GiB':>11}   forward / backward")
    rows: list[dict] = []
    dense: dict[int, dict] = {}
    for count, topk in sizes.cases:
        cache = tokens[count]
        if count not in dense:
            dense[count] = {
                "flash": measure_dense(count, sizes.heads, sizes.dim, flash, timer, args),
                "wide": measure_dense(
                    count, sizes.wide_heads, sizes.heads * sizes.dim // sizes.wide_heads, wide, timer, args
                ),
            }
        leaves = ssa_leaves(cache, sizes, args)
        small, large, window, shift = sizes.settings
        plan_spatial_sparse_attention(*leaves[:3], cache, *sizes.settings)

        def attend(leaves: list[Tensor] = leaves, cache: CoordinateCache = cache, topk: int = topk) -> Tensor:
            return spatial_sparse_attention(*leaves, cache, small, large, topk, window, shift)  # noqa: B023

        ssa = all_times(attend, leaves, timer)
        row = {"tokens": count, "topk": topk, "compressed_keys": len(leaves[3]), "ssa": ssa, **dense[count]}
        if row["flash"]:
            row["speedup"] = {way: row["flash"][way] / ssa[way] for way in ("forward", "backward")}
        rows.append(row)
        keep(rows)
        cells = [pair(row[name], "forward", "backward") for name in ("ssa", "flash", "wide")]
        speedup = pair(row.get("speedup", {}), "forward", "backward")
        memory = pair(ssa, "forward_gib", "with_backward_gib")
        print(
            f"{count:8,} {topk:3}  {'  '.join(f'{cell:>17}' for cell in cells)}  {speedup:>13}  {memory:>11}",
            flush=True,
        )
    for way, name in OTHER_WAYS.items():
        if not all(row["ssa"][way] for row in rows):
            continue
        print(f"{'tokens':>8} {'k':>3}  {'SSA':>17}  {'flash':>17}  {'flash / SSA':>13}   {name}")
        for row in rows:
            ssa, flash = (row[attention].get(way, {}) for attention in ("ssa", "flash"))
            speedup = {part: flash[part] / ssa[part] for part in flash}
            cells = [f"{pair(times, 'forward', 'backward'):>17}" for times in (ssa, flash)]
            print(
                f"{row['tokens']:8,} {row['topk']:3}  {'  '.join(cells)}  {pair(speedup, 'forward', 'backward'):>13}"
            )


def tune(tokens: dict[int, CoordinateCache], sizes: Sizes, args: Any) -> dict[str, Any]:
    """Tunes the tile shapes of the kernels for the case in the middle. Needs the package triton."""
    from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import tuning
    from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape

    count, topk = sizes.cases[len(sizes.cases) // 2]
    heads = HeadShape(sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.dim, sizes.dim)
    found = tuning.tune(tokens[count].coords, sizes.settings, topk, heads, getattr(torch, args.dtype), args.tune)
    print(found)
    shapes = {"default": found.default._asdict(), "chosen": found.chosen._asdict()}
    return asdict(found) | shapes | {"path": str(found.path)}


def measure_stages(tokens: dict[int, CoordinateCache], sizes: Sizes, timer: Timer, args: Any) -> list[dict]:
    """A row for each case, with the times of the kernels of each branch alone. Needs the package triton."""
    from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape
    from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tuning import branch_passes
    from diffusers_sparse3d.ops.spatial_sparse_attention.plan import whole_plan

    dtype = getattr(torch, args.dtype)
    heads = HeadShape(sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.dim, sizes.dim)
    print(f"{'tokens':>8} {'k':>3}  {'compressed, top-k':>17} {'selection':>17} {'window':>17}   forward / backward")
    rows = []
    for count, topk in sizes.cases:
        cache = tokens[count]
        plan = whole_plan(cache, sizes.settings, heads, dtype)
        num_compressed = len(cache.downsample(sizes.settings[0])[0].coords)
        passes = branch_passes(plan, heads, num_compressed, topk, dtype)
        times = {
            name: {way: timer.milliseconds(lambda: run(plan)) for way, run in zip(("forward", "backward"), ways)}  # noqa: B023
            for name, ways in passes.items()
        }
        rows.append({"tokens": count, "topk": topk, **times})
        cells = " ".join(f"{pair(row, 'forward', 'backward'):>17}" for row in times.values())
        print(f"{count:8,} {topk:3}  {cells}", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Times, speed-up and memory against tokens, for the smallest top-k. Needs the package matplotlib."""
    from matplotlib.figure import Figure

    topk = min(row["topk"] for row in rows)
    rows = [row for row in rows if row["topk"] == topk]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    time_axes, speedup_axes, memory_axes = figure.subplots(1, 3)
    names = {"ssa": f"SSA, top-{topk}", "flash": "FlashAttention", "wide": "cuDNN, wide heads"}

    def draw(axes: Any, points: list[tuple[int, float]], style: str, label: str) -> None:
        if points:
            axes.plot(*zip(*points), style, marker=".", label=label)

    for color, (key, name) in enumerate(names.items()):
        for way, line in (("forward", "-"), ("backward", "--")):
            points = [(row["tokens"], row[key][way]) for row in rows if way in row[key]]
            draw(time_axes, points, f"C{color}{line}", f"{name}, {way}")
        for way, line, label in (("forward_gib", "-", "forward"), ("with_backward_gib", "--", "with backward")):
            points = [(row["tokens"], row[key][way]) for row in rows if row[key].get(way) is not None]
            draw(memory_axes, points, f"C{color}{line}", f"{name}, {label}")
    for way, line in (("forward", "-"), ("backward", "--")):
        points = [(row["tokens"], row["speedup"][way]) for row in rows if "speedup" in row]
        draw(speedup_axes, points, f"C0{line}", way)
        replayed = [(row["tokens"], *(row[name].get("replayed", {}) for name in ("flash", "ssa"))) for row in rows]
        points = [(count, flash[way] / ssa[way]) for count, flash, ssa in replayed if flash and ssa]
        draw(speedup_axes, points, f"C3{line}", f"{way}, replayed as CUDA graphs")
    time_axes.set(ylabel="milliseconds", xscale="log", yscale="log")
    speedup_axes.set(ylabel="times as fast as FlashAttention", xscale="log", ylim=(0, None))
    memory_axes.set(ylabel="extra peak memory, GiB", xscale="log")
    for axes in (time_axes, speedup_axes, memory_axes):
        axes.set(xlabel="tokens")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", default=[None], help="files; a torus if none is given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", nargs="+", type=int, help="of attention and stages, at top-k 8, instead of all")
    parser.add_argument("--model_tokens", nargs="+", type=int, help="of block and model")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for the repeats of one figure")
    parser.add_argument("--tune", nargs="?", type=float, const=20.0, metavar="SECONDS", help="the tile shapes first")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="the blocks of block and model")
    parser.add_argument("--tiny", action="store_true", help="a few tokens and narrow heads, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="picture to draw, as PNG")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    sizes = TINY_SIZES if args.tiny else Sizes()
    if args.tokens:
        sizes = replace(sizes, cases=tuple((count, sizes.cases[0][1]) for count in args.tokens))
    if args.model_tokens:
        sizes = replace(sizes, model_tokens=tuple(args.model_tokens))
    shapes = [mesh_cells(path, sizes.resolution) for path in args.mesh]
    names = [mesh_name(path) for path in args.mesh]
    print(", ".join(f"{name}: {len(cells):,} cells" for name, cells in zip(names, shapes)))
    counts = {*sizes.model_tokens, *(count for count, _ in sizes.cases)}
    tokens = {
        count: CoordinateCache(take_tokens(shapes, count, sizes.resolution, sizes.settings[1]).to(args.device), 1)
        for count in counts
    }
    timer = Timer(args.device, args.repeats, args.budget)
    report = describe_run(args) | {"cells": dict(zip(names, map(len, shapes)))}
    if args.tune:
        report["tuning"] = tune(tokens, sizes, args)
    if "attention" in args.parts:

        def keep(rows: list[dict]) -> None:
            report["attention"] = rows
            write_report(args.json, report)

        measure_attention(tokens, sizes, timer, args, keep)
        if args.plot:
            plot(report["attention"], args.plot)
    if "stages" in args.parts:
        report["stages"] = measure_stages(tokens, sizes, timer, args)
    if {"block", "model"} & set(args.parts):
        report["model"] = measure_model(tokens, sizes, timer, args)
    write_report(args.json, report)
    return report


if __name__ == "__main__":
    main(parse_args())
