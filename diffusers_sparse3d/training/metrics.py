"""Entries of `metrics.jsonl`, and the loss curve drawn from them."""

import json
from pathlib import Path

from .files import write_text


METRICS = "metrics.jsonl"


def read_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """Returns the entries of the `metrics.jsonl` in the output folder of a training, in the order of their steps.

    A line that was cut off, as when a run is killed while it writes, is left out.
    """
    entries = []
    for line in (Path(output_dir) / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries


def append_metrics(output_dir: Path, entry: dict[str, float]) -> None:
    """Adds an entry to `metrics.jsonl`."""
    with (output_dir / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def drop_metrics_after(output_dir: Path, step: int) -> None:
    """Leaves only whole entries of the first `step` steps in `metrics.jsonl`."""
    path = output_dir / METRICS
    kept = [entry for entry in read_metrics(output_dir) if entry["step"] <= step] if path.exists() else []
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def plot_losses(output_dir: Path) -> None:
    """Draws the loss curves of a training into OUTPUT_DIR/loss.png."""
    from matplotlib.figure import Figure

    entries = read_metrics(output_dir)
    found = {name for entry in entries for name in entry if name.startswith("validation/")}
    # Losses at single noise levels are left to TensorBoard.
    names = sorted(name for name in found if not name.startswith("validation/sigma/"))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in ["loss", *names]:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(output_dir / "loss.png", dpi=120)
