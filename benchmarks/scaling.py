"""
Training steps at the published sizes on several GPUs of one host, under DDP and FSDP2.

    python benchmarks/scaling.py --gpus 1 2 4 8 --json scaling.json --plot scaling.png

Models, batches and precision are those of `training/configs/published/`: SparseDiT at 1024^3 with two samples a GPU,
and SparseVAE at 1024^3 with one. The data are cells of a torus at 1024^3, some `--tokens` a sample, `--spread` wider
or narrower; tokens of images are cached in a training, and a transformer of one layer stands for them here. Each row
is one `accelerate launch`: seconds from a step to the next, data included (the median, and each), tokens a second,
peak memory of a GPU, the share of a step in which a GPU runs kernels that communicate (they may run beside others),
the seconds of all others, and the efficiency, tokens a second of a GPU over those of one GPU alone. A step that takes
much longer than its kernels waits for the processor, whose speed the figures then are of.

    python benchmarks/scaling.py --gpus 1 --models dit_24gb dit_16gb --steps 6 --json scaling_cards.json

takes steps of the recipes for one card, and no more memory than such a card has.

With `--repeats`, all rows of a model are taken several times in turn, and each has the medians: a step that waits for
the processor takes some tenths longer in one process than in the next.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from benchmark_meshes import signed_distance, torus_cells
from diffusers_sparse3d import SparseDiT, SparseVAE
from diffusers_sparse3d.data.records import pack_bits
from diffusers_sparse3d.training.balancing import make_schedule
from diffusers_sparse3d.training.batches import pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.distributed import make_accelerator
from diffusers_sparse3d.training.dit import DiTConfig, DiTTask, prepare_blocks
from diffusers_sparse3d.training.gradient_checkpointing import set_gradient_checkpointing
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.phases import read_phases
from diffusers_sparse3d.training.sampler import key_tensors
from diffusers_sparse3d.training.sparse_vae import SparseVAEConfig, SparseVAETask
from diffusers_sparse3d.training.trainer import Trainer
from published import CONFIGS, RECIPES, read_published
from result_files import describe_run, parse_arguments, write_report


LAYOUTS: dict[str, list[str]] = {
    "ddp": ["--multi_gpu"],
    "fsdp": [
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", "true"),
    ],
}
# Bytes of a card's memory that the process cannot have: those of CUDA itself and of the display.
RESERVED = 2**30
# Steps that are not timed: kernels are compiled, and memory is asked for.
WARMUP_STEPS = 3
TINY = {
    "dit": {
        "sample_size": 128,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_key_value_heads": 1,
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
        "sparse_conditioning": False,
    },
    "vae": {
        "sample_size": 128,
        "encoder_channels": 16,
        "encoder_layers": 1,
        "encoder_heads": 1,
        "decoder_channels": 16,
        "decoder_layers": 1,
        "decoder_heads": 1,
        "norm_num_groups": 1,
    },
}


class Torus(Dataset):
    """Samples of the cells of a torus at 1024^3, as the datasets of both models give them."""

    def __init__(self, model: str, tokens: int, spread: float, length: int, image_size: int, channels: int):
        self.model, self.channels = model, channels
        generator = torch.Generator().manual_seed(0)
        factors = torch.exp(spread * (2 * torch.rand(length, generator=generator) - 1))
        self.cells = torus_cells(int(tokens * float(factors.max())))
        self.counts = np.minimum((tokens * factors).long().numpy(), len(self.cells))
        self.image = torch.randint(256, (4, image_size, image_size), dtype=torch.uint8, generator=generator)
        if model == "vae":
            # Once: under DDP a process whose data are late would be waited for in the steps of the others.
            values = torus_distances(self.cells[: int(self.counts.max())])
            self.values, self.sharp = values.half(), pack_bits(values.abs() < 0.1)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        count = self.counts[key.row]
        coords = self.cells[:count]
        if self.model == "vae":
            content = {"values": self.values[:count], "sharp": self.sharp[:count]}
        else:
            mean = torch.randn(len(coords), self.channels, generator=torch.Generator().manual_seed(key.row))
            content = {"mean": mean.half(), "logvar": torch.full_like(mean, -4).half(), "image": self.image}
        return {"coords": coords.int(), "resolution": torch.tensor(1024), **content, **key_tensors(key)}

    def sizes(self, resolution: int) -> np.ndarray:
        """Cells of each sample."""
        return self.counts


def torus_distances(coords: Tensor) -> Tensor:
    """`[M, 512]` signed distances over the width of the narrow band of 8 voxels, in the voxels of cells `[M, 3]`."""
    places = torch.cartesian_prod(*[torch.arange(8)] * 3)
    return (signed_distance(8 * coords[:, None] + places) / 8).clamp(-1, 1)


class TimedTrainer(Trainer):
    """A trainer that times its steps and keeps no checkpoints; the last step is profiled.

    Attributes:
        times: seconds of each step.
        communication, kernels: seconds of the GPU's kernels in the last step, those that communicate and all others.
        ends: the time at which each step ended, of `time.perf_counter`.
    """

    def optimize(self, batches: list[dict[str, Any]]) -> None:
        """Takes one step, timed."""
        self.times: list[float] = getattr(self, "times", [])
        self.ends: list[float] = getattr(self, "ends", [])
        last = self.step == self.config.max_train_steps - 1
        activities = torch.profiler.ProfilerActivity
        activity = activities.CUDA if self.accelerator.device.type == "cuda" else activities.CPU
        profiler = torch.profiler.profile(activities=[activity]) if last else None
        synchronize(self.accelerator.device)
        start = time.perf_counter()
        if profiler is None:
            super().optimize(batches)
        else:
            with profiler:
                super().optimize(batches)
                synchronize(self.accelerator.device)
        synchronize(self.accelerator.device)
        self.ends.append(time.perf_counter())
        self.times.append(self.ends[-1] - start)
        if profiler is not None:
            sums = {True: 0.0, False: 0.0}
            # A range that somebody named is there beside the kernels in it.
            for event in (event for event in profiler.key_averages() if not event.is_user_annotation):
                sums["nccl" in event.key.lower()] += event.self_device_time_total / 1e6
            self.communication, self.kernels = sums[True], sums[False]

    def save_checkpoint(self) -> None:
        """Keeps nothing."""


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_trainer(args: argparse.Namespace) -> TimedTrainer:
    """The trainer of a published configuration on synthetic samples."""
    values = read_published(args.worker)
    for name in ("pretrained", "cache_dir"):
        values.pop(name, None)
    values |= {"data": "", "output_dir": args.output, "max_train_steps": args.steps, "num_workers": 2}
    values |= {"logging_steps": 1, "checkpointing_steps": args.steps + 1, "lr_warmup_steps": 0}
    values["checkpointing_keeps_attention"] = args.keep_attention
    if args.compile:
        values["compile"] = True
    if args.optimizer:
        values["optimizer"] = args.optimizer
    is_vae = args.worker == "vae"
    if args.tiny:
        values |= {"mixed_precision": "no", "cpu": True, "num_workers": 0, "model": TINY["vae" if is_vae else "dit"]}
        # Of bitsandbytes, on GPUs alone.
        values["optimizer"] = values.get("optimizer", "adamw").removesuffix("_8bit")
    config: Any
    if is_vae:
        config = build_config(SparseVAEConfig, values)
    else:
        width = values["model"].get("cross_attention_dim", 1024)
        encoder = Dinov2WithRegistersConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 16,
            image_size=28 if args.tiny else 518,
            patch_size=14,
        )
        config = build_config(DiTConfig, {**values, "image_encoder": "one layer", "vae": "stands in"})
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    channels = config.model.get("in_channels", 16)
    if is_vae:
        vae = SparseVAE(**config.model)
        set_gradient_checkpointing(vae, config)
        task: Any = SparseVAETask(vae, config)
    else:
        transformer = SparseDiT(**config.model)
        prepare_blocks(transformer, config)
        vae = SparseVAE(**TINY["vae"], latent_channels=channels)
        task = DiTTask(transformer, Dinov2WithRegistersModel(encoder).requires_grad_(False), vae, config)
    counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
    length = 4 * config.batch_size * math.prod(counts)
    data = Torus("vae" if is_vae else "dit", args.tokens, args.spread, length, 28 if args.tiny else 518, channels)
    names = [str(row) for row in range(length)]
    schedule = make_schedule(read_phases(config, [1024]), data.sizes, names, 0, *counts)
    return TimedTrainer(config, accelerator, task, data, pack, schedule)


def work(args: argparse.Namespace) -> None:
    """Train, and write what was measured, in the main process."""
    trainer = make_trainer(args)
    device, world = trainer.accelerator.device, trainer.accelerator.num_processes
    limit = RECIPES[args.worker] * 10**9 - RESERVED if args.worker in RECIPES else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    trainer.train()
    # From step to step, data included: a process that waits for its data is waited for in the steps of all others.
    times = [end - start for start, end in itertools.pairwise(trainer.ends[WARMUP_STEPS - 1 : -1])]
    seconds = statistics.median(times)
    tokens = args.tokens * trainer.config.batch_size * world * trainer.accelerator.gradient_accumulation_steps
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
    if trainer.accelerator.is_main_process:
        losses = [entry["loss"] for entry in read_metrics(trainer.output_dir) if "loss" in entry]
        row = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_gib": peak}
        row |= {"communication": trainer.communication / seconds, "kernel_seconds": trainer.kernels}
        row |= {"times": times, "losses": losses}
        row |= {} if limit is None else {"limit_gib": limit / 2**30}
        Path(args.output, "row.json").write_text(json.dumps(row), encoding="utf-8")


def launch(args: argparse.Namespace, model: str, layout: str, count: int) -> dict[str, Any]:
    """The row of one training; with "error" if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--steps", str(args.steps), "--tokens", str(args.tokens), "--spread", str(args.spread)]
        settings += ["--optimizer", args.optimizer] * bool(args.optimizer) + ["--tiny"] * args.tiny
        settings += ["--keep_attention"] * args.keep_attention + ["--compile"] * args.compile
        launcher = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--cpu"] if args.tiny else ["--main_process_port", "0"] if count > 1 else []
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count), *launcher]
        command += LAYOUTS[layout] if count > 1 else []
        command += [str(Path(__file__).resolve()), "--worker", model, "--output", folder, *settings]
        row = {"model": model, "layout": layout if count > 1 else "one", "gpus": count}
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            return {**row, "error": f"not finished after {args.timeout:g} s"}
        file = Path(folder, "row.json")
        if result.returncode or not file.exists():
            print(result.stderr[-3000:], file=sys.stderr)
            # The last error is that of the launcher.
            lines = [line for line in result.stderr.splitlines() if "Error: " in line and "CalledProcess" not in line]
            return {**row, "error": (lines or ["no row"])[-1][:200]}
        return {**row, **json.loads(file.read_text(encoding="utf-8"))}


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the tokens a second of a GPU over those of one GPU alone where that was measured."""
    alone = {row["model"]: row["tokens_per_second"] for row in rows if row["gpus"] == 1 and "seconds" in row}
    return [
        {**row, "efficiency": row["tokens_per_second"] / row["gpus"] / alone[row["model"]]}
        if "seconds" in row and row["model"] in alone
        else row
        for row in rows
    ]


def middle_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose step takes the median time, the slower one of two; with "runs", the seconds of all, if several.

    Communication and kernels are medians of their own: in a step that is profiled, a process may wait for the other's
    profiler to start.
    """
    failed = [run for run in runs if "error" in run]
    if failed or len(runs) == 1:
        return (failed or runs)[0]
    ranked = sorted(runs, key=lambda run: run["seconds"])
    profiled = {name: statistics.median(run[name] for run in runs) for name in ("communication", "kernel_seconds")}
    return {**ranked[len(runs) // 2], **profiled, "runs": [run["seconds"] for run in runs]}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens a second over GPUs, a line for each model and layout, beside the ideal."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for model, layout in sorted({(row["model"], row["layout"]) for row in rows if row["gpus"] > 1}):
        line = [row for row in rows if row["model"] == model and row["layout"] in ("one", layout) and "seconds" in row]
        gpus = [row["gpus"] for row in line]
        axes.plot(gpus, [row["tokens_per_second"] / 1000 for row in line], "o-", label=f"{model}, {layout}")
        axes.plot(gpus, [line[0]["tokens_per_second"] / 1000 * n / gpus[0] for n in gpus], ":", color="gray")
    axes.set(xlabel="GPUs", ylabel="thousand tokens a second", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--models", nargs="+", choices=(*CONFIGS, *RECIPES), default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, default=46_000, help="cells of a sample, their mean with --spread")
    parser.add_argument("--spread", type=float, default=0.0, help="sizes of samples differ by a factor up to e^spread")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--optimizer", help="in place of that of the configuration: adamw or muon")
    parser.add_argument("--keep_attention", action="store_true", help="checkpoints keep the results of attention")
    parser.add_argument("--compile", action="store_true", help="blocks of SparseDiT by torch.compile")
    parser.add_argument("--repeats", type=int, default=1, help="trainings of each row")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one training at most")
    parser.add_argument("--plot", type=Path, help="picture of tokens a second over GPUs")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try the script")
    parser.add_argument("--worker", choices=(*CONFIGS, *RECIPES), help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parse_arguments(parser, __file__, arguments)
    if args.steps < WARMUP_STEPS + 2:
        parser.error(f"--steps must be at least {WARMUP_STEPS + 2}, got {args.steps}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    args.device = "cpu" if args.tiny else "cuda"
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    report = {**describe_run(args), "rows": []}
    columns = ("comm.", 6), ("kernels", 8), ("eff.", 6)
    title = f"{'model':8} {'layout':6} {'GPUs':>4} {'s a step':>9} {'tokens/s':>9} {'GiB':>6}"
    print(title, *(f"{name:>{width}}" for name, width in columns))
    for model in args.models:
        trainings = [(args.layouts[0], 1)] * (1 in args.gpus)
        trainings += itertools.product(args.layouts, [count for count in args.gpus if count > 1])
        runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        done = report["rows"]
        for _, (layout, count) in itertools.product(range(args.repeats), trainings):
            runs.setdefault((layout, count), []).append(launch(args, model, layout, count))
            rows = with_efficiency([middle_of(of_row) for of_row in runs.values()])
            report["rows"] = done + rows
            write_report(args.json, report)
            print(describe(rows[[*runs].index((layout, count))]), flush=True)
    if args.plot and len(args.gpus) > 1:
        plot(report["rows"], args.plot)
    return report


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{row['model']:8} {row['layout']:6} {row['gpus']:4}"
    if "error" in row:
        return f"{name} {row['error']}"
    return (
        f"{name} {row['seconds']:9.3f} {row['tokens_per_second']:9.0f} {row['peak_gib']:6.1f}"
        f" {row['communication']:6.1%} {row['kernel_seconds']:8.3f} {row.get('efficiency', math.nan):6.1%}"
    )


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.worker:
        work(arguments)
    else:
        main(arguments)
