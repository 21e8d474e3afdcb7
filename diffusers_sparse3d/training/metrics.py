"""Entries of `metrics.jsonl`, and the loss curve drawn from them."""

import json
from pathlib import Path


def read_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """Returns the entries of the `metrics.jsonl` in the output folder of a training, in the order of their steps."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def plot_losses(output_dir: Path) -> None:
    """Draws the loss curves of a training into OUTPUT_DIR/loss.png."""
    from matplotlib.figure import Figure

    entries = read_metrics(output_dir)
    names = sorted({name for entry in entries for name in entry if name.startswith("validation/")})
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in ["loss", *names]:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output_dir / "loss.png", dpi=120)
