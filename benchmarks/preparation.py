"""
Meshes a second that `prepare` makes records of, by processes on the GPU and by processes on the CPU.

    python benchmarks/preparation.py --workers 16 --gpu_workers 4 8 16 --json preparation.json [--meshes DIR]

Each row is a preparation with the package's own pool of processes, which take seconds to start, not all the same: its
clock starts when every process has done a mesh, and stops `--seconds` later. The meshes are those of a folder, each
several times under other names, or bumpy spheres of 20,480 faces; they come in random order, since a row may end
before all are done. `--views` renders pictures of them too.

With both devices, the records of a few meshes are compared: whether they have the same blocks, and the share of
distances in the narrow band that differ. `benchmarks/geometry.py` has the seconds of each stage.
Processes on the CPU are forked from a server that the first row waits for, and the other rows find.
"""

import argparse
import csv
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark_meshes import write_bumpy_spheres
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks
from diffusers_sparse3d.training.preparation.command import make_settings
from diffusers_sparse3d.training.preparation.command import parse_arguments as parse_preparation
from diffusers_sparse3d.training.preparation.groups import Group, Part, iterate_groups
from diffusers_sparse3d.training.preparation.index import MeshIndex, Selection
from diffusers_sparse3d.training.preparation.jobs import Job, Options, PackJob
from diffusers_sparse3d.training.preparation.run import Preparation
from diffusers_sparse3d.training.worker_pool import Failure
from report_data import TOLERANCE, comparison_sentence
from result_files import describe_run, parse_arguments, write_report


# Meshes whose records are compared.
COMPARED = 6


@dataclass
class TimedPreparation(Preparation):
    """A preparation in random order that ends when it was timed for long enough.

    Args:
        seconds: from when every process has done a mesh.
        limit: seconds of all, after which no mesh is begun.

    Attributes:
        begin: the time when it was made.
        started: the time when every process had done a mesh; None until then.
        done: the time when each mesh was done, in order, without those that failed.
        ran_out: whether all meshes were begun before the end.
    """

    seconds: float = 10.0
    limit: float = 60.0
    begin: float = field(default_factory=time.perf_counter)
    started: float | None = None
    done: list[float] = field(default_factory=list)
    ran_out: bool = False
    _ready: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether no further mesh is begun."""
        now = time.perf_counter()
        return now > self.begin + self.limit or (self.started is not None and now > self.started + self.seconds)

    def _jobs(self, groups: Iterable[Group]) -> Iterator[Job]:
        jobs = list(super()._jobs(groups))
        random.Random(0).shuffle(jobs)
        for job in jobs:
            if self.is_over:
                return
            yield job
        self.ran_out = True

    def _take(self, job: Job, failure: Failure | None) -> None:
        super()._take(job, failure)
        if failure is not None or isinstance(job, PackJob):
            return
        self.done.append(time.perf_counter())
        # Only processes that have just done a job have none.
        self._ready |= {worker.index for worker in self._pool.workers if worker.task is None}
        if self.started is None and len(self._ready) == self.options.num_workers:
            self.started = self.done[-1]

    def rate(self) -> float | None:
        """Meshes a second while the clock ran; None if it never started, or ran on when no mesh was left to begin."""
        if self.started is None or self.ran_out:
            return None
        timed = [moment for moment in self.done if self.started < moment <= self.started + self.seconds]
        return len(timed) / (timed[-1] - self.started) if timed else None


def write_index(meshes: Path, index: Path, count: int) -> int:
    """Writes an index of at least `count` rows, the meshes of a folder again and again, and returns their number.

    Raises:
        ValueError: if the folder holds no mesh.
    """
    entries = list(MeshIndex(meshes, {}, [], 0.0))
    copies = -(-count // len(entries))
    with index.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "mesh"])
        for copy in range(copies):
            writer.writerows([f"{copy}-{number}", entry.mesh.resolve()] for number, entry in enumerate(entries))
    return copies * len(entries)


def measure(args: argparse.Namespace, index: Path, device: str, workers: int, resolution: int) -> dict[str, Any]:
    """The row of one preparation; with "error" if it could not be timed.

    Raises:
        ValueError: if `workers` is not positive.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}")
    with tempfile.TemporaryDirectory(dir=args.work) as output:
        options = ["--input", str(index), "--output", output, "--resolutions", str(resolution)]
        settings = make_settings(parse_preparation([*options, "--num_views", str(args.views)]))
        groups = iterate_groups(MeshIndex(index, {}, [], 0.0), Selection(), settings, Part())
        preparation = TimedPreparation(
            Options(Path(output), settings, device=device, num_workers=workers, timeout=args.limit),
            lambda count, failure: None,
            seconds=args.seconds,
            limit=args.limit,
        )
        preparation.run(groups)
    row: dict[str, Any] = {"kind": "rate", "device": device, "resolution": resolution, "workers": workers}
    causes = Counter(failure.cause for _, failure in preparation.failures)
    row |= {"meshes": len(preparation.done), "failures": dict(causes)}
    rate = preparation.rate()
    if rate is None or preparation.started is None:
        reason = "too few --rows for" if preparation.ran_out else "not every process had done a mesh soon enough in"
        return {**row, "error": f"{reason} {args.seconds:g} s of {args.limit:g}"}
    return {**row, "start_seconds": preparation.started - preparation.begin, "meshes_per_second": rate}


def compare(meshes: Path, resolution: int, device: str) -> dict[str, Any]:
    """How far records that are computed on a device are from those of the CPU."""
    same, differing, samples = 0, 0, 0
    entries = list(MeshIndex(meshes, {}, [], 0.0))[:COMPARED]
    for entry in entries:
        one, other = (
            mesh_to_sdf_blocks(str(entry.mesh), resolution, progress=False, device=each) for each in ("cpu", device)
        )
        if one.coords.shape == other.coords.shape and bool((one.coords == other.coords).all()):
            same += 1
            differing += int(((one.values - other.values).abs() > TOLERANCE).sum())
            samples += int((one.values.abs() < 1).sum())
    return {
        "kind": "comparison",
        "device": device,
        "resolution": resolution,
        "meshes": len(entries),
        "same_blocks": same,
        "differing_share": differing / max(1, samples),
    }


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--devices", choices=("cuda", "cpu"), nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--workers", type=int, nargs="+", default=[cores], help="processes on the CPU")
    parser.add_argument("--gpu_workers", type=int, nargs="+", default=[cores], help="processes on the GPU")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--views", type=int, default=0, help="renders of a mesh")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a row is timed for")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a row at most, with its start")
    parser.add_argument("--meshes", type=Path, help="folder; spheres if not given")
    parser.add_argument("--rows", type=int, default=10_000, help="of the index, more than are done")
    parser.add_argument("--work", type=Path, help="folder for what is written; one for temporary files if not given")
    parser.add_argument("--tiny", action="store_true", help="small spheres on the CPU, to try the script")
    args = parse_arguments(parser, __file__, arguments)
    if min(*args.workers, *args.gpu_workers, args.rows) < 1 or not 0 < args.seconds <= args.limit:
        parser.error("--workers, --gpu_workers and --rows must be at least 1, --seconds positive and up to --limit")
    if args.tiny:
        args.devices, args.resolutions = ["cpu"], [32]
    args.device = "cuda" if "cuda" in args.devices else "cpu"
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {**describe_run(args), "rows": []}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        meshes = args.meshes
        if meshes is None:
            meshes = Path(folder, "spheres")
            write_bumpy_spheres(meshes, 2 if args.tiny else 20, 2 if args.tiny else 5)
        index = Path(folder, "index.csv")
        write_index(meshes, index, args.rows)
        for resolution in args.resolutions:
            rows = [
                (device, workers)
                for device in args.devices
                for workers in (args.gpu_workers if device == "cuda" else args.workers)
            ]
            for device, workers in rows:
                report["rows"].append(measure(args, index, device, workers, resolution))
                write_report(args.json, report)
                print(describe(report["rows"][-1]), flush=True)
            if "cuda" in args.devices:
                report["rows"].append(compare(meshes, resolution, "cuda"))
                write_report(args.json, report)
                print(describe(report["rows"][-1]), flush=True)
    return report


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{row['device']:5} {row['resolution']:5}^3"
    if row["kind"] == "comparison":
        return f"{name} {comparison_sentence(row)}"
    name += f" {row['workers']:4} processes {sum(row['failures'].values()):4} failed"
    if "error" in row:
        return f"{name} {row['error']}"
    return f"{name} {row['meshes_per_second']:8.2f} meshes/s, {row['start_seconds']:.1f} s to start"


if __name__ == "__main__":
    main(parse_args())
