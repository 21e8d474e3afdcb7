"""
The time that a training of SparseVAE from a dataset spends outside of its steps, for each number of loader workers.

    python benchmarks/loader_wait.py --workers 1 2 4 --json loader_wait.json [--storages disk s3] [--work DIR]

`benchmarks/data.py` lets the loader wait for a pause as long as a step; here the steps are those of a training on a
GPU: the model of the published size and its optimizer, one sample of `--tokens` cells at 1024^3 a step. The samples
are `--samples` records of the cells of a torus, in shards on the disk, none of them in memory before, or on a server
of S3 (moto's, which runs beside on the same machine and shares its cores).

A step is timed from the batch on the GPU to the last kernel. What lies between two steps is the wait for a batch, its
way to the GPU and the bookkeeping of the loop, and the share of it is an upper bound of the share of the wait. The
batches that the loader has ready at the beginning are used up before anything is timed.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import scaling
from data import forget, s3_server, write_metadata
from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.index import INDEX, merge_index
from diffusers_sparse3d.data.records import OCCUPANCY, Record, mesh_columns, mesh_section_names, sdf_section
from diffusers_sparse3d.data.sections import encode
from diffusers_sparse3d.data.writer import SHARD_BYTES, ShardWriter
from diffusers_sparse3d.training.balancing import make_schedule
from diffusers_sparse3d.training.batches import BlockDataset
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.phases import read_phases
from diffusers_sparse3d.training.sampler import SampleKey
from result_files import describe_run, parse_arguments, write_report


RESOLUTION = 1024
# Batches that a worker of the loader makes ahead (`make_loader`).
PREFETCHED = 4


def write_dataset(folder: Folder, tokens: int, samples: int) -> None:
    """Writes a dataset of `samples` records, all with the same `tokens` cells of a torus at 1024^3.

    Raises:
        ValueError: if there are no samples, or no cells in them.
    """
    if samples < 1 or tokens < 1:
        raise ValueError(f"`samples` and `tokens` must be at least 1, got {samples} and {tokens}")
    item = scaling.Torus("vae", tokens, 0.0, 1, 1, 0)[SampleKey(0, RESOLUTION, 0, 0.5)]
    blocks = {"coords": item["coords"].byte(), "values": item["values"], "sharp": item["sharp"]}
    sections = {
        OCCUPANCY: encode({OCCUPANCY: np.zeros(1, np.uint8)}),
        sdf_section(RESOLUTION): encode({name: tensor.numpy() for name, tensor in blocks.items()}),
    }
    columns = {"split": "train", "num_images": 0, "azimuths": [], f"tokens_{RESOLUTION}": len(item["coords"])}
    # The server of S3 copies a whole object for each request.
    size = SHARD_BYTES if folder.is_local else 1
    names = mesh_section_names([RESOLUTION])
    with ShardWriter(folder, names, mesh_columns([RESOLUTION]), shard_bytes=size) as writer:
        for number in range(samples):
            writer.add(Record(f"torus-{number:06d}", sections, columns))
    merge_index(folder)
    write_metadata(folder, RESOLUTION)


def share_outside(seconds: list[float], ends: list[float], first: int) -> float:
    """The share of the time outside of steps, over those from number `first` on.

    Args:
        seconds: of each step.
        ends: the time at which each step ended, in seconds.
        first: at least 1: the clock starts when the step before it ends.

    Raises:
        ValueError: if there is no such step, or none before it.
    """
    if not 1 <= first < len(ends):
        raise ValueError(f"`first` must be from 1 to {len(ends) - 1}, the number of the last step, got {first}")
    return 1 - sum(seconds[first:]) / (ends[-1] - ends[first - 1])


def measure(args: argparse.Namespace, folder: Folder, workers: int) -> dict[str, Any]:
    """The row of one training: seconds of a step, and the share of the time outside of steps."""
    first = max(scaling.WARMUP_STEPS, PREFETCHED * workers)
    # The last step is profiled.
    steps = first + args.steps + 1
    data = SparseSDFDataset(folder, "train", RESOLUTION, occupancy=False, image=False)
    with tempfile.TemporaryDirectory() as output:
        options = ["--worker", "vae", "--output", output, "--steps", str(steps), "--tokens", str(args.tokens)]
        trainer = scaling.make_trainer(scaling.parse_args(options + ["--tiny"] * args.tiny))
        trainer.dataset, trainer.config.num_workers = BlockDataset(data), workers
        trainer.schedule = make_schedule(read_phases(trainer.config, [RESOLUTION]), data.num_blocks, data.ids, 0)
        trainer.config.logging_steps = steps + 1
        forget(folder)
        trainer.train()
        trainer.accelerator.end_training()
    times = trainer.times[:-1]
    return {
        "step_seconds": sum(times[first:]) / args.steps,
        "outside": share_outside(times, trainer.ends[:-1], first),
    }


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--storages", choices=("disk", "s3"), nargs="+", default=["disk"])
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--tokens", type=int, default=46_000, help="cells of a sample")
    parser.add_argument("--samples", type=int, default=64, help="if fewer than batches, some are read from memory")
    parser.add_argument("--work", type=Path, help="folder for the data; a temporary one if not given")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    args = parse_arguments(parser, __file__, arguments)
    if args.steps < 1 or min(args.workers) < 0:
        parser.error(f"--steps must be at least 1 and --workers at least 0, got {args.steps} and {args.workers}")
    args.device = "cpu" if args.tiny else "cuda"
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {**describe_run(args), "rows": []}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(f"{'from':5} {'workers':>7} {'s a step':>9} {'outside':>8}")
        for storage in args.storages:
            root = Folder(work) if storage == "disk" else stack.enter_context(s3_server())
            folder = root / f"torus-{args.tokens}-{args.samples}"
            if not folder.exists(INDEX):
                write_dataset(folder, args.tokens, args.samples)
            for workers in args.workers:
                row = {"storage": storage, "workers": workers, **measure(args, folder, workers)}
                report["rows"].append(row)
                write_report(args.json, report)
                print(f"{storage:5} {workers:7} {row['step_seconds']:9.3f} {row['outside']:8.1%}", flush=True)
    return report


if __name__ == "__main__":
    main(parse_args())
