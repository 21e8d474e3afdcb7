"""
Long runs of everything small: is memory flat, and is no file left behind?

    python benchmarks/soak.py --json soak.json [--calls 500] [--steps 200] [--meshes 2000] [--dataset 10000]

- Calls of a pipeline of tiny random models, of all output types; of ten, one with the dense stage, whose grid is full
  of noise, one interrupted and one failing.
- Training of a tiny VAE, killed half-way through and resumed, in processes of its own.
- Random meshes through the geometry at 32^3: SDF, marching cubes, clean-up, a file written and read.
- A dataset at 32^3 by two processes, of which the younger is killed now and then; of a hundred meshes, one is damaged.

For calls and meshes, the memory of the process is taken after a tenth of them and at the end, without garbage and what
the C library holds; for the dataset, with that of the older of the two processes. The script fails if more than
`--allowance` MiB were added, or a file or a thread was left.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh

from result_files import describe_run, parse_arguments, write_report


# The tiny pipeline is that of the tests.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from diffusers_sparse3d.geometry.clean_up import MeshCleanUp  # noqa: E402
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh  # noqa: E402
from diffusers_sparse3d.geometry.mesh import export_mesh, load_mesh  # noqa: E402
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf  # noqa: E402
from diffusers_sparse3d.training.dataset import SparseSDFDataset  # noqa: E402
from tests.pipelines.tiny import tiny_coords, tiny_image, tiny_pipeline  # noqa: E402


OUTPUT_TYPES = ("mesh", "sdf", "latent", "pt")


def resident_mib() -> float:
    """Memory of this process in MiB, without garbage, and without what the C library keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def repeat(count: int, run: Callable[[int], None]) -> dict[str, Any]:
    """Seconds, and memory after a tenth and at the end, of `run(0)` to `run(count - 1)`."""
    start, early = time.perf_counter(), 0.0
    for index in range(count):
        run(index)
        if index == count // 10:
            early = resident_mib()
    return {"count": count, "seconds": time.perf_counter() - start, "early_mib": early, "late_mib": resident_mib()}


def soak_pipeline(count: int) -> dict[str, Any]:
    """Calls of the tiny pipeline."""
    pipe, image = tiny_pipeline(), tiny_image()
    pipe.set_progress_bar_config(disable=True)
    cells = tiny_coords((20,))

    def interrupt(pipe: Any, *_: Any) -> None:
        pipe._interrupt = True

    def fail(*_: Any) -> None:
        raise KeyError("on purpose")

    def call(index: int) -> None:
        callback = {3: interrupt, 7: fail}.get(index % 10)
        # Numbers of cells that come again: oneDNN keeps what it compiled for each of the last 1024 shapes.
        generator = torch.Generator().manual_seed(index % 20)
        options = {"output_type": OUTPUT_TYPES[index % 4], "callback_on_step_end": callback, "generator": generator}
        try:
            pipe(image, coords=cells if index % 10 else None, num_inference_steps=2, **options)
        except KeyError:
            assert callback is fail

    return repeat(count, call)


def soak_meshes(count: int, folder: Path) -> dict[str, Any]:
    """Random balls and boxes through preparation at 32^3."""
    clean_up = MeshCleanUp(remove_inner_parts=True, remove_floaters=True, num_faces=500)
    path = folder / "mesh.ply"

    def prepare(index: int) -> None:
        generator = np.random.default_rng(index)
        mesh = (
            trimesh.creation.icosphere(subdivisions=2)
            if index % 2
            else trimesh.creation.box(generator.random(3) + 0.1)
        )
        mesh.vertices += 0.1 * generator.normal(size=mesh.vertices.shape)
        if index % 3 == 0:
            mesh = trimesh.Trimesh(mesh.vertices, mesh.faces[generator.random(len(mesh.faces)) < 0.9], process=False)
        sdf = mesh_to_sparse_sdf(export_mesh(mesh, path), 32, progress=False)
        export_mesh(clean_up(sparse_sdf_to_mesh(sdf.feats, sdf.coords, 32)), path)
        load_mesh(path)
        path.unlink()

    return repeat(count, prepare)


def process_mib(pid: int) -> float:
    """Memory of a process in MiB."""
    fields = Path("/proc", str(pid), "statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak_dataset(count: int, folder: Path) -> dict[str, Any]:
    """A dataset of random balls and boxes at 32^3; the younger of its two processes is killed five times."""
    from diffusers_sparse3d.training.preparation import command
    from diffusers_sparse3d.training.preparation.report import read_rows
    from diffusers_sparse3d.training.preparation.run import Preparation

    meshes, output = folder / "meshes", folder / "data"
    meshes.mkdir()
    damaged = set(range(3, count, 100))
    for index in range(count):
        generator = np.random.default_rng(index)
        mesh = trimesh.creation.icosphere(1) if index % 2 else trimesh.creation.box(generator.random(3) + 0.1)
        mesh.vertices += 0.1 * generator.normal(size=mesh.vertices.shape)
        data = mesh.export(file_type="ply")
        (meshes / f"{index:06d}.ply").write_bytes(data[:200] if index in damaged else data)
    finish, done, memory, killed = Preparation._finish, [], {}, []

    def watch(preparation: Preparation, *outcome: Any) -> None:
        finish(preparation, *outcome)
        done.append(None)
        workers = sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)
        if len(done) in (count // 10, count - 1):
            memory[len(done)] = resident_mib() + process_mib(workers[0].pid or 0)
        # Not at the end, where second attempts are, and a mesh would be killed twice.
        elif len(done) % (count // 10) == count // 20 and len(done) < count // 2 and len(workers) > 1:
            workers[-1].kill()
            killed.append(workers[-1].pid)

    options = ["--resolutions", "32", "--num_views", "1", "--image_size", "32", "--meshes_per_shard", "256"]
    start = time.perf_counter()
    with unittest.mock.patch.object(Preparation, "_finish", watch):
        command.main(["--input", str(meshes), "--output", str(output), *options, "--num_workers", "2"])
    seconds = time.perf_counter() - start
    failures = read_rows(output / "failures.csv")
    assert {int(row["id"]) for row in failures} == damaged and {row["cause"] for row in failures} <= {"reading"}
    shards = -(-count // 256)
    left = sorted(path.name for path in output.rglob("*") if path.is_file() and path.parent.name != "shards")
    files = [".lock", "README.md", "failures.csv", "index.parquet", "metadata.json", "preparation.json"]
    assert left == files and len(list((output / "shards").iterdir())) == 2 * shards, f"left behind: {left}"
    assert len(SparseSDFDataset(output)) == count - len(damaged)
    assert not multiprocessing.active_children(), "processes were left"
    shutil.rmtree(meshes)
    shutil.rmtree(output)
    early, late = memory.values()
    what = f"meshes of a dataset by two processes, {len(killed)} of them killed and replaced,"
    return {"what": what, "count": count, "seconds": seconds, "early_mib": early, "late_mib": late}


TRAIN = """
import json, sys
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training import dense_vae
dense_vae.train(build_config(dense_vae.DenseVAEConfig, json.loads(sys.argv[1])))
"""


def soak_training(steps: int, folder: Path) -> dict[str, float]:
    """Training of a tiny VAE on four primitives, killed half-way through, and resumed from its last checkpoint."""
    from diffusers_sparse3d.training.metrics import read_metrics
    from diffusers_sparse3d.training.preparation import command

    meshes = {
        "box": trimesh.creation.box(),
        "ball": trimesh.creation.icosphere(),
        "rod": trimesh.creation.cylinder(0.2, 1),
    }
    rows = ["id,mesh,source,category,split,license"]
    for name, mesh in meshes.items():
        mesh.export(folder / f"{name}.ply")
        rows.append(f"{name},{name}.ply,primitives,solids,train,CC0-1.0")
    (folder / "index.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = ["--resolutions", "32", "--num_views", "1", "--image_size", "64", "--num_workers", "0"]
    command.main(["--input", str(folder), "--output", str(folder / "data"), *options])
    config = {
        "data": str(folder / "data"),
        "output_dir": str(folder / "run"),
        "cpu": True,
        "batch_size": 2,
        "num_workers": 0,
        "max_train_steps": steps,
        "logging_steps": 1,
        "checkpointing_steps": max(1, steps // 10),
        "checkpoints_total_limit": 2,
        "model": {
            "latent_channels": 2,
            "sample_size": 4,
            "encoder_block_out_channels": [8, 16],
            "decoder_block_out_channels": [16, 8],
            "layers_per_block": 1,
            "mid_layers": 1,
        },
    }
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", TRAIN, json.dumps(config)], env=environment, cwd=folder)
    metrics = folder / "run" / "metrics.jsonl"
    while first.poll() is None and (not metrics.exists() or len(read_metrics(folder / "run")) < steps // 2):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    config["resume_from_checkpoint"] = "latest"
    subprocess.run([sys.executable, "-c", TRAIN, json.dumps(config)], env=environment, cwd=folder, check=True)
    logged = [entry["step"] for entry in read_metrics(folder / "run") if "loss" in entry]
    assert logged == list(range(1, steps + 1)), "every step is logged once"
    partial = [path.name for path in (folder / "run").rglob("*partial*")]
    assert not partial, f"left behind: {partial}"
    return {"count": steps, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500, help="of the pipeline; default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="of training; default: %(default)s")
    parser.add_argument("--meshes", type=int, default=2000, help="through preparation; default: %(default)s")
    parser.add_argument("--dataset", type=int, default=10000, help="meshes of a dataset; default: %(default)s")
    parser.add_argument("--allowance", type=float, default=20, help="MiB that may be added; default: %(default)s")
    args = parse_arguments(parser, __file__)
    torch.set_num_threads(1)
    report, threads = {**describe_run(args), "rows": []}, threading.enumerate()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, run in (
            ("calls of a pipeline", lambda: soak_pipeline(args.calls)),
            ("meshes prepared", lambda: soak_meshes(args.meshes, folder)),
            ("meshes of a dataset", lambda: soak_dataset(args.dataset, folder)),
        ):
            row = {"what": name, **run()}
            report["rows"].append(row)
            added = row["late_mib"] - row["early_mib"]
            print(f"{name:24}{row['count']:6}{row['seconds']:9.1f} s {row['early_mib']:8.0f} MiB, {added:+.1f} later")
            assert added <= args.allowance, f"{added:.0f} MiB were added by {name}"
            assert not list(folder.iterdir()), f"left behind: {list(folder.iterdir())}"
        # Progress bars have a daemon.
        left = [thread.name for thread in threading.enumerate() if not thread.daemon and thread not in threads]
        assert not left, f"threads were left: {left}"
        write_report(args.json, report)
        row = {"what": "steps of training, killed and resumed", **soak_training(args.steps, folder)}
        report["rows"].append(row)
        print(f"{row['what']:24}{row['count']:6}{row['seconds']:9.1f} s")
    write_report(args.json, report)


if __name__ == "__main__":
    main()
