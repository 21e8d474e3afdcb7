"""Trainings that are compared at equal minutes of the same GPU, and the table and plot of what they reach."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from benchmarks.claims.comparison import compare_all, make_pool, means
from benchmarks.result_files import describe_run, earlier_rows, write_report
from diffusers_sparse3d.training.distributed import autocast
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.trainer import Trainer


# Shares of the minutes after which a training is measured.
SHARES = (0.25, 0.5, 1.0)
# Batches whose gradients are computed before the clock starts.
WARM_UP_STEPS = 3
# A measure of a training: fills a row by the model as it is.
Measure = Callable[["TimedTrainer"], dict[str, Any]]


class TimedTrainer(Trainer):
    """
    A trainer that is measured at shares of its minutes, with its averaged weights; its clock stands still meanwhile.

    Attributes:
        measure: what is measured.
        points: what was measured so far, with "share", "minutes", "step" and the validation losses.
    """

    measure: Measure | None = None
    points: list[dict[str, Any]]

    def train(self) -> None:
        """Trains and measures. Kernels are compiled before the clock starts."""
        self.points = []
        self._warm_up()
        super().train()

    def _warm_up(self) -> None:
        """Computes gradients of the first batches, and forgets them."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for step in range(WARM_UP_STEPS):
                keys = self.schedule.step(step)[0][0]
                batch = send_to_device(self.collate_fn([self.dataset[key] for key in keys]), self.accelerator.device)
                with autocast(self.accelerator):
                    losses = self.model(batch)
                sum(losses[name].mean for name in self.task.loss_weights).backward()
        self.optimizer.zero_grad()

    def synchronize_clock(self) -> None:
        """Sets the clock, and measures where a share of the minutes has passed."""
        super().synchronize_clock()
        assert self.config.max_train_minutes is not None
        share = self.clock.seconds / (60 * self.config.max_train_minutes)
        if len(self.points) < len(SHARES) - 1 and SHARES[len(self.points)] <= share < 1:
            self._measure(share)
            self.clock.start()

    def validate(self) -> None:
        """Measures at the end; there are no other validations."""
        self._measure(1.0)

    def save_checkpoint(self) -> None:
        """Keeps nothing: the table is what a run leaves, a row at a time."""

    @torch.no_grad()
    def _measure(self, share: float) -> None:
        assert self.validation is not None and self.measure is not None
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with self.averaged_weights(), torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            losses = self.validation.losses(self.task, self.step)
            point = {"share": share, "minutes": self.clock.seconds / 60, "step": self.step, "losses": losses}
            self.points.append({**point, **self.measure(self)})


def run_row(
    make: Callable[[str], TimedTrainer],
    measure: Measure,
    args: argparse.Namespace,
    name: str,
    seed: int,
    pool: Executor | None,
) -> dict[str, Any]:
    """
    The row of one training.

    Args:
        make: makes the trainer, for an output folder.
        measure: returns "comparisons" for `evaluate_points`, and whatever else a point should have.
        args: options of the command, with `device`.
        name: what is trained.
        seed: its seed.
        pool: processes that compare shapes.

    Returns:
        "model", "seed", "parameters", "points", "steps", "milliseconds" of a step, "peak_gib", and of the second half
        of the training the "roughness" of its loss: the deviation of the difference of neighbouring entries of the
        logarithm, each a mean over some steps.
    """
    cuda = torch.device(args.device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        trainer.measure = measure
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        entries = [entry for entry in read_metrics(folder) if "learning_rate" in entry]
        trainer.accelerator.end_training()
    trained = [parameter for parameter in trainer.task.parameters() if parameter.requires_grad]
    row = {"model": name, "seed": seed, "parameters": sum(parameter.numel() for parameter in trained)}
    row |= {"steps": trainer.step, "milliseconds": 1e3 * trainer.clock.seconds / max(1, trainer.step)}
    row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}
    row |= {"roughness": roughness([entry["loss"] for entry in entries[len(entries) // 2 :]])}
    row["curve"] = [[entry["minutes"], entry["loss"]] for entry in entries]
    row["points"] = evaluate_points(trainer.points, pool)
    return row


def roughness(losses: Sequence[float]) -> float | None:
    """The deviation of the differences between neighbouring logarithms of losses; None for fewer than three."""
    logarithms = torch.tensor(losses, dtype=torch.float64).clamp(min=1e-12).log()
    return float(logarithms.diff().std()) if len(losses) > 2 else None


def evaluate_points(points: Sequence[dict[str, Any]], pool: Executor | None) -> list[dict[str, Any]]:
    """
    Points with the means of their comparisons.

    Args:
        points: of a `TimedTrainer`; each has "comparisons", a list of `Comparison`.
        pool: processes that compare shapes.

    Returns:
        The points with what `means` gives in place of "comparisons".
    """
    results = iter(compare_all([one for point in points for one in point["comparisons"]], pool))
    evaluated = []
    for point in points:
        rest = {name: value for name, value in point.items() if name != "comparisons"}
        evaluated.append({**rest, **means(list(itertools.islice(results, len(point["comparisons"]))))})
    return evaluated


def compare_trainings(
    args: argparse.Namespace,
    make_trainer: Callable[[argparse.Namespace, str, int, str], TimedTrainer],
    measure: Callable[[argparse.Namespace, TimedTrainer], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    panels: dict[str, str],
) -> dict[str, Any]:
    """
    Train all models with all seeds, and write and plot the report; a row that the file of `--json` has is kept.

    So a table may be filled in several runs, for example one for each seed.

    Args:
        args: of a command with `add_options`.
        make_trainer: makes the trainer of a model and a seed, for an output folder.
        measure: what is measured at a point, see `run_row`.
        describe: returns the line of a row.
        panels: what is plotted, see `plot`.

    Raises:
        ValueError: if the file has rows of other settings.
    """
    report = {**describe_run(args), "rows": earlier_rows(args, but=("plot", "seeds", "models", "num_workers"))}
    done = {(row["model"], row["seed"]) for row in report["rows"]}
    with make_pool(args.num_workers) as pool:
        for seed, name in itertools.product(args.seeds, args.models):
            if (name, seed) not in done:
                make = functools.partial(make_trainer, args, name, seed)
                report["rows"].append(run_row(make, functools.partial(measure, args), args, name, seed, pool))
                print(describe(report["rows"][-1]), flush=True)
                report["summary"] = summarize(report["rows"])
                write_report(args.json, report)
    # Rows of several runs may have been joined in the file.
    report["summary"] = summarize(report["rows"])
    write_report(args.json, report)
    if args.plot:
        plot(report["rows"], panels, args.plot)
    return report


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each model means over its seeds at the end, and the deviation of the validation loss between them."""
    summary: dict[str, dict[str, Any]] = {}
    for row in rows:
        summary.setdefault(row["model"], {"rows": []})["rows"].append(row)
    for name, entry in summary.items():
        own = entry["rows"]
        last = [row["points"][-1] for row in own]
        losses = [point["losses"]["loss"] for point in last]
        names = ("f1_0.01", "f1_0.05", "chamfer_l1", "normal_error")
        summary[name] = {
            "seeds": len(own),
            "validation_loss": statistics.mean(losses),
            "loss_spread": statistics.stdev(losses) / statistics.mean(losses) if len(losses) > 1 else None,
            "roughness": mean_of(row["roughness"] for row in own),
            "milliseconds": statistics.mean(row["milliseconds"] for row in own),
            **{key: mean_of(point.get(key) for point in last) for key in names},
        }
    return summary


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that there are; None if there are none."""
    present = [value for value in values if value is not None]
    return statistics.mean(present) if present else None


def plot(rows: Sequence[dict[str, Any]], panels: dict[str, str], path: Path) -> None:
    """
    Draw measures over minutes: the mean of the seeds as a line, all of them as a band.

    Args:
        rows: of a report.
        panels: label of each measure of a point, by its name; "loss" is the validation loss.
        path: picture to write, as PNG. Needs the package matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for color, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
            own = [row["points"] for row in rows if row["model"] == name]
            values = [[p["losses"]["loss"] if measure == "loss" else p.get(measure) for p in points] for points in own]
            minutes = [statistics.mean(point["minutes"] for point in points) for points in zip(*own)]
            columns = [[value for value in column if value is not None] for column in zip(*values)]
            if not all(columns):
                continue
            axes.plot(minutes, [statistics.mean(column) for column in columns], f"C{color}.-", label=name)
            axes.fill_between(minutes, *zip(*((min(c), max(c)) for c in columns)), color=f"C{color}", alpha=0.2)
        axes.set(xlabel="minutes of training", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def add_options(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    """Add the options that comparisons of trainings share; `models` are the names to choose from."""
    parser.add_argument("--data", required=True, help="dataset of prepare_data.py, with a validation split")
    parser.add_argument("--minutes", type=float, default=0.4, help="of each training; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--resolution", type=int, default=256, help="samples per axis; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--val_shapes", type=int, default=24, help="meshes of the validation split that are compared")
    parser.add_argument("--num_samples", type=int, default=30_000, help="points on each surface of a comparison")
    parser.add_argument("--num_workers", type=int, default=8, help="processes that load data, and that compare meshes")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="picture to draw, as PNG")


def training_options(args: argparse.Namespace, seed: int, folder: str) -> dict[str, Any]:
    """The settings that all trainings of a comparison share, for a configuration of the package."""
    cuda = torch.device(args.device).type == "cuda"
    return {
        "data": args.data,
        "output_dir": folder,
        "seed": seed,
        "batch_size": args.batch_size,
        "max_train_minutes": args.minutes,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3 if args.tiny else 50,
        "lr_min_ratio": 0.02,
        "ema_decay": 0.9 if args.tiny else 0.99,
        "logging_steps": 1 if args.tiny else 5,
        "num_validation_samples": 2 if args.tiny else 64,
        "num_workers": args.num_workers,
        "mixed_precision": "bf16" if cuda else "no",
        "cpu": not cuda,
    }
