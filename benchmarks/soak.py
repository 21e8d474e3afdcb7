"""
Long runs of everything small: is memory flat, and is no file left behind?

    python benchmarks/soak.py --json soak.json [--calls 500] [--steps 200] [--meshes 2000]

- Calls of a pipeline of tiny random models, of all output types; of ten, one with the dense stage, whose grid is full
  of noise, one interrupted and one failing.
- Training of a tiny VAE, killed half-way through and resumed, in processes of its own.
- Random meshes through preparation at 32^3: SDF, marching cubes, clean-up, a file written and read.

For calls and meshes, the memory of the process is taken after a tenth of them and at the end, without garbage and what
the C library holds. The script fails if more than `--allowance` MiB were added, or a file or a thread was left.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
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
from tests.pipelines.tiny import tiny_coords, tiny_image, tiny_pipeline  # noqa: E402


OUTPUT_TYPES = ("mesh", "sdf", "latent", "pt")


def resident_mib() -> float:
    """Memory of this process in MiB, without garbage, and without what the C library keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def repeat(count: int, run: Callable[[int], None]) -> dict[str, float]:
    """Seconds, and memory after a tenth and at the end, of `run(0)` to `run(count - 1)`."""
    start, early = time.perf_counter(), 0.0
    for index in range(count):
        run(index)
        if index == count // 10:
            early = resident_mib()
    return {"count": count, "seconds": time.perf_counter() - start, "early_mib": early, "late_mib": resident_mib()}


def soak_pipeline(count: int) -> dict[str, float]:
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


def soak_meshes(count: int, folder: Path) -> dict[str, float]:
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
    parser.add_argument("--allowance", type=float, default=20, help="MiB that may be added; default: %(default)s")
    args = parse_arguments(parser, __file__)
    torch.set_num_threads(1)
    report, threads = {**describe_run(args), "rows": []}, threading.enumerate()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, run in (
            ("calls of a pipeline", lambda: soak_pipeline(args.calls)),
            ("meshes prepared", lambda: soak_meshes(args.meshes, folder)),
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
