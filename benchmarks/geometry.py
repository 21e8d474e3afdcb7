"""
Times the conversions between meshes and sparse signed distance fields, and measures the memory that they take.

    python benchmarks/geometry.py --mesh MESH ... --json geometry.json

On the CPU every figure comes from a process of its own, on `--cores` cores, so that peaks are those of one step. The
steps are mesh to sparse SDF, sparse SDF to a `trimesh.Trimesh`, sparse marching cubes alone, and scikit-image's
marching cubes on the dense volume of the same field. The last two both return float32 vertices and int32 faces, and
are compared with each other; sparse marching cubes gets int32 `coords [N, 3]`, the step to a mesh `[N, 4]`. With a
GPU, the first two steps run there as well.

Times are the best of `--repeats` calls after a tiny one. Memory on the CPU is that of the first call: the peak of the
process minus what it held after its imports and the tiny call, so that input and result count. Memory that the C
library keeps after it is freed is returned to the system before both readings (Linux with glibc). Memory on the GPU is
the allocator's peak.

On a GPU one more call measures the seconds of each stage, with a synchronisation before and after it. A stage that is
part of another counts in both.
"""

import argparse
import ctypes
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from benchmark_meshes import load_or_torus, mesh_name
from diffusers_sparse3d.geometry import distance
from diffusers_sparse3d.geometry.marching_cubes import (
    extraction,
    sparse_marching_cubes,
    sparse_samples,
    sparse_sdf_to_mesh,
)
from diffusers_sparse3d.geometry.sdf import (
    SDFBlocks,
    mesh_to_sdf_blocks,
    mesh_to_sparse_sdf,
    narrow_band,
    outer_surface,
)
from diffusers_sparse3d.geometry.sdf.block_grid import BlockGrid
from result_files import describe_run, parse_arguments, write_report


TINY_RESOLUTION = 32
# The functions whose time is measured, with their owners.
STAGES: list[tuple[Any, str]] = [
    (narrow_band, "OuterSurface"),
    (outer_surface, "load_mesh"),
    (outer_surface, "_weld"),
    (distance.SurfaceDistance, "samples_within"),
    (BlockGrid, "flood_from_outside"),
    (outer_surface, "crossed_edges"),
    (outer_surface, "_release_barrier"),
    (outer_surface, "_thin_edges"),
    (narrow_band, "_sharp_segments"),
    (narrow_band, "_signed_distance"),
    (narrow_band, "point_distance"),
    (outer_surface.OuterSurface, "code_around"),
    (SDFBlocks, "band"),
    (sparse_samples.SparseSamples, "from_rows"),
    (extraction, "CrossedCells"),
    (extraction, "missing_corners"),
    (sparse_samples.SparseSamples, "add"),
    (extraction.CrossedCells, "update"),
    (extraction, "_write_vertices"),
    (extraction, "_write_faces"),
]


def memory(field: str) -> float:
    """
    The present (`VmRSS`) or highest (`VmHWM`) memory of this process in MiB.

    The peak that `getrusage` reports may be inherited from the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def settle() -> None:
    """Returns freed memory to the system, and resets `VmHWM`."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def band_on(blocks: SDFBlocks, device: str) -> tuple[Tensor, Tensor]:
    """The samples of a band on a device: feats `[N, 1]` and coords `[N, 4]`."""
    coords, feats, _ = blocks.band()
    return feats.to(device), F.pad(coords, (1, 0)).to(device)


def dense_volume(blocks: SDFBlocks) -> np.ndarray:
    """The dense field `[R, R, R]` float32; a block without samples gets the sign of the sample before it along z."""
    per_axis, size = blocks.resolution // blocks.values.shape[-1], blocks.values.shape[-1]
    volume = np.ones((blocks.resolution,) * 3, dtype=np.float32)
    active = np.zeros((per_axis,) * 3, dtype=bool)
    for block, values in zip(blocks.coords.tolist(), blocks.values.numpy()):
        active[tuple(block)] = True
        volume[tuple(slice(size * start, size * start + size) for start in block)] = values
    for layer in range(1, per_axis):
        for x, y in np.argwhere(~active[:, :, layer]):
            rows = volume[size * x : size * x + size, size * y : size * y + size]
            rows[:, :, size * layer : size * layer + size] = np.sign(rows[:, :, size * layer - 1 : size * layer])
    return volume


def prepare(step: str, path: str | None, blocks_file: Path) -> Callable[[], Any]:
    """The call that a step times, with its input loaded."""
    if step == "mesh to SDF":
        mesh = load_or_torus(path)
        return lambda: mesh_to_sdf_blocks(mesh, int(blocks_file.stem), normalize=False, progress=False)
    if step == "scikit-image, dense":
        from skimage.measure import marching_cubes

        volume = np.load(blocks_file.with_suffix(".npy"))
        return lambda: marching_cubes(volume, 0.0)
    band = torch.load(blocks_file, weights_only=True)
    feats, coords, resolution = band["feats"], band["coords"], band["resolution"]
    if step == "SDF to mesh":
        return lambda: sparse_sdf_to_mesh(feats, coords, resolution)
    positions = coords[:, 1:].contiguous()
    return lambda: sparse_marching_cubes(feats, positions, resolution)


def measure_on_cpu(step: str, path: str | None, blocks_file: Path, cores: int, repeats: int) -> dict[str, Any]:
    """One row of the table. It runs in a process of its own; that of the first step writes `blocks_file`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    tiny = mesh_to_sdf_blocks(load_or_torus(None), TINY_RESOLUTION, progress=False)
    sparse_sdf_to_mesh(*band_on(tiny, "cpu"), TINY_RESOLUTION)
    settle()
    before = memory("VmRSS")
    function = prepare(step, path, blocks_file)
    times = []
    settle()
    for index in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
        if index == 0:
            peak = memory("VmHWM")
    if step == "mesh to SDF":
        feats, coords = band_on(result, "cpu")
        torch.save({"feats": feats, "coords": coords, "resolution": result.resolution}, blocks_file)
        np.save(blocks_file.with_suffix(".npy"), dense_volume(result) if result.resolution <= 512 else np.empty(0))
        size = {"samples": len(feats), "blocks": len(result.coords)}
    else:
        size = {"faces": len(result.faces if step == "SDF to mesh" else result[1])}
    return {"step": step, "seconds": min(times), "mib": peak - before, "process_mib": peak, **size}


def seconds_of_stages(function: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """The seconds that one call spends in each of `STAGES`."""
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = stage(*args, **kwargs)
            if cuda:
                torch.cuda.synchronize()
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
            return result

        return run

    with ExitStack() as patches:
        for owner, name in STAGES:
            patches.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        function()
    return seconds


def measure_on_gpu(mesh: trimesh.Trimesh, resolution: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """The rows of the table for a mesh on a GPU. Tests call it with `device="cpu"`."""
    cuda = torch.device(device).type == "cuda"

    def best(step: str, function: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
        function()
        times = []
        for _ in range(repeats):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            result = function()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        mib = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
        stages = seconds_of_stages(function, cuda)
        return {"step": f"{step}, {device}", "seconds": min(times), "mib": mib, "stages": stages}, result

    row, result = best(
        "mesh to SDF",
        lambda: mesh_to_sparse_sdf(mesh, resolution, normalize=False, progress=False, device=device),
    )
    rows = [{**row, "samples": len(result.feats)}]
    # The input is on the device, as after a decoder.
    feats, coords = result.feats.to(device), result.coords.to(device)
    row, result = best("SDF to mesh", lambda: sparse_sdf_to_mesh(feats, coords, resolution))
    return [*rows, {**row, "faces": len(result.faces)}]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", default=[None], help="files; a torus if none is given")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dense_resolution", type=int, default=512, help="where to compare with scikit-image")
    parser.add_argument("--cores", type=int, default=2, help="for the figures of the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip_cpu", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="at 32^3 and on every device, to try the script")
    args = parse_arguments(parser, __file__, arguments)
    if args.tiny:
        args.resolutions, args.dense_resolution, args.repeats = [TINY_RESOLUTION], TINY_RESOLUTION, 1
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table, and returns and writes the report."""
    rows: list[dict[str, Any]] = []
    print(f"{'mesh':24} {'R':>5} {'step':24} {'seconds':>9} {'MiB':>8}   size")

    def add(path: str | None, resolution: int, row: dict[str, Any]) -> None:
        row = {"mesh": mesh_name(path), "resolution": resolution, **row}
        rows.append(row)
        mib = "-" if row["mib"] is None else f"{row['mib']:.0f}"
        size = ", ".join(f"{row[name]:,} {name}" for name in ("samples", "blocks", "faces") if name in row)
        line = f"{row['mesh']:24.24} {resolution:5} {row['step']:24} {row['seconds']:9.3f} {mib:>8}   {size}"
        print(line, flush=True)
        for name, seconds in row.get("stages", {}).items():
            print(f"{'':30} {name:24} {seconds:9.3f}", flush=True)

    # libigl reads its number of threads from this variable, which the processes inherit.
    os.environ["IGL_NUM_THREADS"] = str(args.cores)
    for path in args.mesh:
        for resolution in args.resolutions:
            steps = ["mesh to SDF", "SDF to mesh", "sparse marching cubes"]
            if resolution == args.dense_resolution:
                steps.append("scikit-image, dense")
            with tempfile.TemporaryDirectory() as folder:
                for step in [] if args.skip_cpu else steps:
                    arguments = (step, path, Path(folder) / f"{resolution}.pt", args.cores, args.repeats)
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                        add(path, resolution, process.submit(measure_on_cpu, *arguments).result())
            if args.tiny or args.device != "cpu":
                for row in measure_on_gpu(load_or_torus(path), resolution, args.repeats, args.device):
                    add(path, resolution, row)
    for row in rows:
        if row["step"] == "scikit-image, dense":
            sparse = next(
                other
                for other in rows
                if [other[key] for key in ("mesh", "resolution")] == [row[key] for key in ("mesh", "resolution")]
                and other["step"] == "sparse marching cubes"
            )
            row["times_slower"] = row["seconds"] / sparse["seconds"]
            row["times_larger"] = row["mib"] / sparse["mib"] if sparse["mib"] > 0 else None
            larger = "-" if row["times_larger"] is None else f"{row['times_larger']:.1f}"
            print(f"{row['mesh']}: dense {row['times_slower']:.1f} times the time, {larger} times the memory")
    report = describe_run(args) | {"rows": rows}
    write_report(args.json, report)
    return report


if __name__ == "__main__":
    main(parse_args())
