"""
Reading of datasets: samples a second from the disk and from S3, loader workers that a GPU needs, a large index.

    python benchmarks/data.py --json data.json [--work DIR] [--rows 1000000]

- Datasets of random blocks, as many a sample as a surface has at each resolution (`--tokens` at 1024^3), are read by
  the loader of the trainings: from the disk, of which nothing is in memory before, and from a server of S3 (moto's, a
  Python program), which runs beside on the same machine and shares its cores.
- The same loader beside a training step that takes as long as one of the SparseVAE of the published size on one H200
  (benchmarks/results/scaling_vae.json): the share of the time that it makes the step wait, for each number of workers.
- An index of `--rows` meshes, made up but for the place of their data, is opened in a process of its own: seconds to
  the first batch, and the memory that this adds.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.index import GROUP_ROWS, INDEX, SHARDS, index_schema, merge_index, read_shard_indices
from diffusers_sparse3d.data.records import OCCUPANCY, Record, mesh_columns, mesh_section_names, sdf_section
from diffusers_sparse3d.data.sections import content_hash, encode
from diffusers_sparse3d.data.writer import SHARD_BYTES, ShardWriter
from diffusers_sparse3d.training.balancing import make_schedule
from diffusers_sparse3d.training.batches import BlockDataset, pack
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.phases import Phase
from diffusers_sparse3d.training.sampler import BatchSchedule, StreamBatches, TrainingSampler, make_loader
from result_files import ROOT, describe_run, parse_arguments, write_report


# Different contents of records.
CONTENTS = 4
# Training steps, and seconds of them at least, that the wait is measured over.
STEPS, WAIT_SECONDS = 20, 5.0
# Seconds that reading is measured for, at most.
READ_SECONDS = 20.0
SERVER = """
import sys, logging
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def tokens_of(resolution: int, tokens: int) -> int:
    """Blocks of a sample at a resolution: those of a surface, of which there are `tokens` at 1024^3."""
    return min(max(1, round(tokens * (resolution / 1024) ** 2)), (resolution // 8) ** 3)


@functools.lru_cache(CONTENTS)
def random_sections(number: int, resolution: int, tokens: int) -> tuple[dict[str, bytes], int]:
    """The sections of random blocks at one resolution, and the number of blocks."""
    generator = np.random.default_rng((number, resolution))
    size = resolution // 8
    places = np.sort(generator.choice(size**3, tokens_of(resolution, tokens), replace=False))
    values = generator.integers(-(2**11), 2**11, (len(places), 512), dtype=np.int16).astype(np.float16) / 2**11
    sharp = generator.integers(256, size=(len(places), 64), dtype=np.uint8)
    coords = np.stack(np.unravel_index(places, (size,) * 3), axis=1).astype(np.uint8)
    occupancy = np.zeros(size**3, dtype=bool)
    occupancy[places] = True
    sections = {
        OCCUPANCY: encode({OCCUPANCY: np.packbits(occupancy)}),
        sdf_section(resolution): encode({"coords": coords, "values": values, "sharp": sharp}),
    }
    return sections, len(places)


def random_record(number: int, resolution: int, tokens: int) -> Record:
    """A record of random blocks; one in `CONTENTS` has the same."""
    sections, blocks = random_sections(number % CONTENTS, resolution, tokens)
    columns = {"split": "train", "num_images": 0, "azimuths": [], f"tokens_{resolution}": blocks}
    return Record(f"record-{number:06d}", sections, columns)


def write_dataset(folder: Folder, resolution: int, tokens: int, megabytes: int) -> None:
    """Writes a dataset of about so many megabytes.

    To the server of S3, it has a shard for each sample: that server copies a whole object for each request.
    """
    written, number = 0, 0
    columns, size = mesh_columns([resolution]), SHARD_BYTES if folder.is_local else 1
    with ShardWriter(folder, mesh_section_names([resolution]), columns, shard_bytes=size) as writer:
        while written < megabytes * 1e6 or number < 4:
            record = random_record(number, resolution, tokens)
            writer.add(record)
            written += len(record.sections[sdf_section(resolution)])
            number += 1
    merge_index(folder)
    write_metadata(folder, resolution)


def forget(folder: Folder) -> None:
    """Takes the files of a local folder out of the memory of the system."""
    if folder.is_local:
        for path in folder.local.rglob("*.bin"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def batches_of(folder: Folder, resolution: int, batch_size: int, workers: int) -> Iterator[dict[str, Any]]:
    """The batches of a training without end."""
    data = SparseSDFDataset(folder, "train", resolution, occupancy=False, image=False)
    stream = StreamBatches(len(data), batch_size, 0, resolutions=[resolution])
    sampler = TrainingSampler(BatchSchedule([(0, stream)]))
    return iter(make_loader(BlockDataset(data), sampler, pack, workers, pin_memory=False))


def nbytes(batch: dict[str, Any]) -> int:
    return sum(batch[name].nbytes for name in ("values", "sharp")) + 3 * len(batch["coords"])


def measure_reading(folder: Folder, resolution: int, batch_size: int, workers: int) -> dict[str, float]:
    """Samples and megabytes a second over one pass over the data, or `READ_SECONDS`, from the first batch on."""
    count = len(SparseSDFDataset(folder, "train", resolution))
    forget(folder)
    batches = batches_of(folder, resolution, batch_size, workers)
    first = len(next(batches)["resolution"])
    samples, size, start = 0, 0, time.perf_counter()
    while first + samples < count and time.perf_counter() - start < READ_SECONDS:
        batch = next(batches)
        samples += len(batch["resolution"])
        size += nbytes(batch)
    seconds = time.perf_counter() - start
    return {"samples_per_second": samples / seconds, "mb_per_second": size / seconds / 1e6}


def measure_wait(folder: Folder, resolution: int, batch_size: int, workers: int, step_seconds: float) -> float:
    """The share of the time that a training with steps of `step_seconds` waits for its batches, after the first."""
    batches = batches_of(folder, resolution, batch_size, workers)
    next(batches)
    waited, steps, start = 0.0, 0, time.perf_counter()
    while steps < STEPS or time.perf_counter() - start < WAIT_SECONDS:
        time.sleep(step_seconds)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        steps += 1
    return waited / (time.perf_counter() - start)


def write_large_index(source: Folder, target: Folder, resolution: int, rows: int) -> None:
    """Writes an index of many meshes, whose data are all those of one dataset."""
    places = read_shard_indices(source, None).to_pylist()
    schema = index_schema(mesh_section_names([resolution]), mesh_columns([resolution]))
    generator = np.random.default_rng(0)
    names = ("category", "license", "author", "source")
    with target.write(INDEX) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in tqdm(range(0, rows, GROUP_ROWS), desc="Index", unit="group", disable=None):
            group = []
            for number in range(start, min(start + GROUP_ROWS, rows)):
                row = dict(places[number % len(places)])
                row["id"] = content_hash([str(number)])
                row["hash"] = content_hash([row["id"]])
                row["name"] = f"A thing of some kind, number {number}"
                row |= {name: f"{name} {generator.integers(100)}" for name in names}
                row["split"] = "val" if number % 50 == 0 else "train"
                row["num_images"], row["azimuths"] = 6, generator.uniform(-90, 90, 6).tolist()
                group.append(row)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def share_shards(source: Folder, target: Folder, resolution: int) -> None:
    """Makes a folder with a large index a dataset: its shards are those of another one."""
    if not target.exists(SHARDS):
        (target.local / SHARDS).symlink_to(source.local / SHARDS)
    write_metadata(target, resolution)


def write_metadata(folder: Folder, resolution: int) -> None:
    folder.write_text("metadata.json", json.dumps({"resolutions": [resolution], "dense_resolution": resolution // 8}))


def measure_index(folder: str, resolution: int, batch_size: int) -> dict[str, float]:
    """Opens an index and reads the first balanced batch; memory is that of this process beyond its imports."""
    before, begin = resident_mb(), time.perf_counter()
    data = SparseSDFDataset(folder, "train", resolution)
    opened, open_seconds = resident_mb(), time.perf_counter() - begin
    phase = Phase(None, [resolution], [batch_size], [None], 1e-4)
    schedule = make_schedule([phase], data.num_blocks, data.ids, 0)
    loader = make_loader(BlockDataset(data), TrainingSampler(schedule), pack, 0, pin_memory=False)
    batch = next(iter(loader))
    seconds = time.perf_counter() - begin
    size = sum(tensor.nbytes for tensor in batch.values()) / 1e6
    return {
        "rows": len(data),
        "file_mb": os.path.getsize(Path(folder, INDEX)) / 1e6,
        "open_seconds": open_seconds,
        "first_batch_seconds": seconds,
        "index_mb": opened - before,
        "first_batch_mb": resident_mb() - before - size,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before,
    }


def resident_mb() -> float:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def s3_server() -> Iterator[Folder]:
    """A bucket of a server of S3 in a process of its own."""
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{int(server.stdout.readline())}"
        bucket = Folder("s3://bucket", {"endpoint_url": address, "key": "key", "secret": "secret"})
        bucket.filesystem.mkdir("bucket")
        yield bucket
    finally:
        server.kill()
        server.wait()


def published_speed() -> float:
    """The tokens a second of a training of the published SparseVAE on one GPU."""
    report = json.loads((ROOT / "benchmarks" / "results" / "scaling_vae.json").read_text(encoding="utf-8"))
    speeds = (row["tokens_per_second"] for row in report["rows"] if (row["model"], row["gpus"]) == ("vae", 1))
    return float(next(speeds))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the data; a temporary one if not given")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=46_000, help="blocks of a sample at 1024^3")
    parser.add_argument("--megabytes", type=int, default=1000, help="of each dataset; of those in S3 a fourth")
    parser.add_argument("--storages", choices=("disk", "s3"), nargs="+", default=["disk", "s3"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--tokens_per_second", type=float, help="of the training step; by default from scaling_vae.json"
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large index")
    parser.add_argument("--index", help=argparse.SUPPRESS)
    args = parse_arguments(parser, __file__, arguments)
    if args.tokens_per_second is None:
        args.tokens_per_second = published_speed()
    return args


def measure(args: argparse.Namespace, work: Folder, bucket: Folder, report: dict[str, Any]) -> None:
    """Takes all measurements, one row each."""

    def keep(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
        write_report(args.json, report)

    for resolution in args.resolutions:
        tokens = tokens_of(resolution, args.tokens)
        batch_size = max(1, round(args.tokens / tokens))
        seconds = batch_size * tokens / args.tokens_per_second
        for storage in args.storages:
            folder = {"disk": work, "s3": bucket}[storage] / f"data{resolution}"
            if not folder.exists(INDEX):
                write_dataset(folder, resolution, args.tokens, args.megabytes // (1 if folder.is_local else 4))
            for workers in args.workers:
                about = {"storage": storage, "resolution": resolution, "tokens": tokens, "batch_size": batch_size}
                about["workers"] = workers
                keep({"kind": "reading", **about, **measure_reading(folder, resolution, batch_size, workers)})
                if workers:
                    wait = measure_wait(folder, resolution, batch_size, workers, seconds)
                    keep({"kind": "wait", **about, "step_seconds": seconds, "wait": wait})
    resolution = args.resolutions[0]
    if not (work / f"data{resolution}").exists(INDEX):
        write_dataset(work / f"data{resolution}", resolution, args.tokens, 0)
    large = work / "index"
    write_large_index(work / f"data{resolution}", large, resolution, args.rows)
    share_shards(work / f"data{resolution}", large, resolution)
    command = [sys.executable, __file__, "--index", str(large.local), "--resolutions", str(resolution)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    keep({"kind": "index", "resolution": resolution, **json.loads(result.stdout.splitlines()[-1])})


def main(args: argparse.Namespace) -> None:
    if args.index:
        print(json.dumps(measure_index(args.index, args.resolutions[0], 16)))
        return
    report: dict[str, Any] = {**describe_run(args), "rows": []}
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 0.5 * cores:
        report["note"] = (
            f"The machine had other work (a load of {load:.0f} on {cores} cores before the run), so that speeds are"
            " lower bounds and waits upper ones; the server of S3, a Python program, shared the cores too."
        )
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        work = Folder(args.work or temporary)
        bucket = stack.enter_context(s3_server()) if "s3" in args.storages else work
        measure(args, work, bucket, report)


if __name__ == "__main__":
    main(parse_args())
