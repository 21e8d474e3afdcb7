"""
Times the conversions between meshes and sparse signed distance fields, and the memory that they take.

    python benchmarks/geometry.py --mesh MESH ... --json geometry.json

On the CPU each figure comes from a process of its own, on `--cores` cores, so that peaks are those of one step: mesh
to sparse SDF, sparse SDF to a `trimesh.Trimesh`, sparse marching cubes alone, and scikit-image's on the dense volume
of the same field. These two give float32 vertices and int32 faces, and are what is compared; sparse marching cubes
gets int32 `coords [N, 3]`, the mesh `[N, 4]`. With a GPU, the first two there too. Times are the best of `--repeats`
calls after a tiny one. Memory on the CPU is that of the first call: what the process holds at its highest, less what
it held after its imports and the tiny call, input and result included. What the C library keeps of freed memory goes
back to the system before both readings, so that no room is left over from reading the input (Linux with glibc). On the
GPU it is the allocator's peak.

One more call there tells the seconds of each stage, with waits for the device before and after it; a stage that is
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

from diffusers_sparse3d.geometry import distance
from diffusers_sparse3d.geometry.marching_cubes import (
    extraction,
    sparse_marching_cubes,
    sparse_samples,
    sparse_sdf_to_mesh,
)
from diffusers_sparse3d.geometry.mesh import load_mesh, normalize_mesh
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
# Where the time of a call may go.
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
    (narrow_band, "_distance_to_points"),
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


def load(path: str | None) -> trimesh.Trimesh:
    """A mesh in model space; by default a torus that has about as many latent cells as the paper's mean shape."""
    if path is None:
        return normalize_mesh(trimesh.creation.torus(0.7, 0.2, major_sections=256, minor_sections=128))[0]
    return normalize_mesh(load_mesh(path))[0]


def memory(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the highest) of this process, MiB; unlike getrusage's, not that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def settle() -> None:
    """Gives freed memory back to the system, and starts `VmHWM` anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def band_on(blocks: SDFBlocks, device: str) -> tuple[Tensor, Tensor]:
    coords, feats, _ = blocks.band()
    return feats.to(device), F.pad(coords, (1, 0)).to(device)


def dense_volume(blocks: SDFBlocks) -> np.ndarray:
    """`[R, R, R]` float32; a block without samples has the side of the sample before it along z."""
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


def measure_on_cpu(step: str, path: str | None, blocks_file: Path, cores: int, repeats: int) -> dict[str, Any]:
    """One row of the table; runs in a process of its own. The first step writes `blocks_file`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    tiny = mesh_to_sdf_blocks(load(None), TINY_RESOLUTION, progress=False)
    sparse_sdf_to_mesh(*band_on(tiny, "cpu"), TINY_RESOLUTION)
    settle()
    before = memory("VmRSS")
    loaded = None if step == "mesh to SDF" else torch.load(blocks_file, weights_only=True)
    if step == "mesh to SDF":
        mesh, resolution = load(path), int(blocks_file.stem)

        def function() -> SDFBlocks:
            return mesh_to_sdf_blocks(mesh, resolution, normalize=False, progress=False)

    elif step == "SDF to mesh":
        resolution = loaded["resolution"]

        def function() -> trimesh.Trimesh:
            return sparse_sdf_to_mesh(loaded["feats"], loaded["coords"], resolution)

    elif step == "sparse marching cubes":
        resolution, feats = loaded["resolution"], loaded["feats"]
        coords = loaded["coords"][:, 1:].contiguous()
        del loaded

        def function() -> tuple[Tensor, ...]:
            return sparse_marching_cubes(feats, coords, resolution)

    else:
        from skimage.measure import marching_cubes

        volume = np.load(blocks_file.with_suffix(".npy"))

        def function() -> tuple[np.ndarray, ...]:
            return marching_cubes(volume, 0.0)

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
        torch.save({"feats": feats, "coords": coords, "resolution": resolution}, blocks_file)
        np.save(blocks_file.with_suffix(".npy"), dense_volume(result) if resolution <= 512 else np.empty(0))
        size = {"samples": len(feats), "blocks": len(result.coords)}
    else:
        size = {"faces": len(result.faces if step == "SDF to mesh" else result[1])}
    return {"step": step, "seconds": min(times), "mib": peak - before, "process_mib": peak, **size}


def seconds_of_stages(function: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """The seconds of one call in each of `STAGES` that it passes through."""
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
    """The rows of a mesh on a GPU; the same calls run on `device="cpu"`, to try the function."""
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
    # The caller's rows stay on the device, as after a decoder.
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
    rows = []
    print(f"{'mesh':24} {'R':>5} {'step':24} {'seconds':>9} {'MiB':>8}   size")

    def add(path: str | None, resolution: int, row: dict[str, Any]) -> None:
        row = {"mesh": "torus" if path is None else Path(path).stem, "resolution": resolution, **row}
        rows.append(row)
        mib = "-" if row["mib"] is None else f"{row['mib']:.0f}"
        size = ", ".join(f"{row[name]:,} {name}" for name in ("samples", "blocks", "faces") if name in row)
        line = f"{row['mesh']:24.24} {resolution:5} {row['step']:24} {row['seconds']:9.3f} {mib:>8}   {size}"
        print(line, flush=True)
        for name, seconds in row.get("stages", {}).items():
            print(f"{'':30} {name:24} {seconds:9.3f}", flush=True)

    # libigl's own variable for its number of threads; the processes inherit it.
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
                for row in measure_on_gpu(load(path), resolution, args.repeats, args.device):
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
