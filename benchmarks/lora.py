"""
Fine-tunes the small pipeline by LoRA on shapes of one family that it has never seen, and measures what that gives.

    python benchmarks/lora.py --work outputs/lora --json lora.json --picture docs/lora.png

The family are twisted columns: prisms of three to six sides whose cross-section turns and tapers on the way up,
between two plates. `--shapes` of them are trained on through `training/train_lora.py`, and `--held-back` others are
generated from one picture each, by the pipeline as it is and with the LoRA, with the same noise. Losses are those of
the held-back shapes, with the same noise levels for both; F1 and distances are means after `metrics.align_meshes`.
Weights that `--work` has already are not trained again: so a model whose other parts have changed is measured.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image

from diffusers_sparse3d.training import lora
from diffusers_sparse3d.training.evaluation import command as evaluation
from diffusers_sparse3d.training.metrics import read_metrics
from result_files import describe_run, parse_arguments, write_report


METRICS = ("f1_0.05", "f1_0.02", "chamfer_l1", "normal_consistency")
ROOT = Path(__file__).parents[1]


def twisted_column(generator: np.random.Generator) -> trimesh.Trimesh:
    """A prism whose cross-section turns and tapers on the way up, between two plates."""
    sides, height = int(generator.integers(3, 7)), generator.uniform(1.6, 2.4)
    twist, top = generator.uniform(1.5, 4.5) * generator.choice([-1, 1]), generator.uniform(0.5, 1.0)
    radius, steps = generator.uniform(0.35, 0.5), 48
    share = np.linspace(0, 1, steps + 1)[:, None]
    angles = 2 * np.pi * np.arange(sides) / sides + twist * share
    radii = radius * (1 + (top - 1) * share) * np.ones(sides)
    rings = np.stack([radii * np.cos(angles), height * share * np.ones(sides), radii * np.sin(angles)], axis=-1)
    index = np.arange((steps + 1) * sides).reshape(steps + 1, sides)
    low, high = index[:-1], index[1:]
    next_low, next_high = np.roll(low, -1, axis=1), np.roll(high, -1, axis=1)
    walls = np.concatenate([np.stack([low, high, next_high], -1), np.stack([low, next_high, next_low], -1)])
    caps = [[index[0, 0], index[0, i], index[0, i + 1]] for i in range(1, sides - 1)]
    caps += [[index[-1, 0], index[-1, i + 1], index[-1, i]] for i in range(1, sides - 1)]
    column = trimesh.Trimesh(rings.reshape(-1, 3), np.concatenate([walls.reshape(-1, 3), caps]), process=False)
    plates = []
    for level, scale in ((0.0, 1.0), (height, top)):
        edge = 2 * radius * scale * generator.uniform(1.1, 1.4)
        plate = trimesh.creation.box((edge, generator.uniform(0.1, 0.25), edge))
        plates.append(plate.apply_translation((0, level, 0)))
    mesh = trimesh.util.concatenate([column, *plates])
    color = (*generator.integers(60, 230, 3).tolist(), 255)
    mesh.visual = trimesh.visual.TextureVisuals(material=trimesh.visual.material.PBRMaterial(baseColorFactor=color))
    return mesh


def write_shapes(folder: Path, count: int, held_back: int, seed: int) -> None:
    """Writes the shapes and an index that holds some of them back."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with (folder / "index.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "mesh", "category", "split"])
        for number in range(count + held_back):
            twisted_column(generator).export(folder / f"column-{number:02d}.glb")
            split = "train" if number < count else "val"
            writer.writerow([f"column-{number:02d}", f"column-{number:02d}.glb", "column", split])


def fine_tune(args: argparse.Namespace, name: str, data: Path, *options: str) -> dict[str, float]:
    """Fine-tunes into WORK/NAME, unless that is done; returns the last validation loss of each transformer."""
    arguments = ["--pretrained_model_name_or_path", args.model, "--instance_data_dir", data]
    arguments += ["--output_dir", args.work / name, "--components", *args.components, "--rank", args.rank]
    arguments += ["--train_batch_size", args.batch_size, "--num_views", args.views, "--seed", args.seed]
    arguments += ["--dataloader_num_workers", 0, "--preparation_workers", args.workers, "--face_camera"]
    arguments += ["--cpu"] if args.device == "cpu" else ["--mixed_precision", "bf16"]
    if not (args.work / name / "pytorch_lora_weights.safetensors").exists():
        lora.main([str(argument) for argument in (*arguments, *options)])
    losses = {}
    for component in args.components:
        entries = [entry for entry in read_metrics(args.work / name / component) if "validation/loss" in entry]
        losses[component] = entries[-1]["validation/loss"]
    return losses


def generate(args: argparse.Namespace, name: str, data: Path, *options: str) -> dict[str, Any]:
    """Generates the held-back shapes; returns the means of the metrics and the single F1."""
    arguments = ["generation", "--model", args.model, "--data", data, "--output", args.work / "evaluation"]
    arguments += ["--name", name, "--num_baseline", 0, "--device", args.device, "--num_workers", args.workers]
    arguments += ["--num_pictures", args.held_back, "--columns", 1, "--picture_size", 200, "--batch_size", 1]
    report = evaluation.evaluate(evaluation.parse_arguments([str(argument) for argument in (*arguments, *options)]))
    # Both pipelines must be measured on the same shapes; what was trained is kept for another attempt.
    if errors := [error for error in report["errors"] if error["part"] == "figures"]:
        raise RuntimeError(f"The shapes of {name!r} could not all be measured: {errors[0]}")
    means = {metric: report["summary"].get(metric, {}).get("mean") for metric in METRICS}
    return {**means, "each f1_0.05": [sample["f1_0.05"] for sample in report["samples"]]}


def join_sheets(folder: Path, names: list[str], path: Path) -> None:
    """Writes the sheets of the evaluations side by side: as it is, and with the LoRA."""
    sheets = [Image.open(folder / f"{name}.png") for name in names]
    joined = Image.new("RGB", (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)), "white")
    left = 0
    for sheet in sheets:
        joined.paste(sheet, (left, 0))
        left += sheet.width
    path.parent.mkdir(parents=True, exist_ok=True)
    joined.save(path, optimize=True)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the comparison, prints its table and returns the report."""
    write_shapes(args.work / "meshes", args.shapes, args.held_back, args.seed)
    # One step without a learning rate leaves the adapters at zero: the losses of the pipeline as it is.
    base_options = ("--learning_rate", "0", "--max_train_steps", "1", "--ema_decay", "0")
    base_losses = fine_tune(args, "base", args.work / "meshes", *base_options)
    data = args.work / "base" / "data"
    rate, steps = str(args.learning_rate), str(args.steps)
    losses = fine_tune(args, "style", data, "--learning_rate", rate, "--max_train_steps", steps)
    rows = [
        {"weights": "pipeline as it is", "losses": base_losses, **generate(args, "base", data)},
        {
            "weights": "with LoRA",
            "losses": losses,
            **generate(args, "style", data, "--lora", str(args.work / "style")),
        },
    ]
    report = {**describe_run(args), "rows": rows}
    write_report(args.json, report)
    if args.picture is not None:
        join_sheets(args.work / "evaluation", ["base", "style"], args.picture)
    print(json.dumps(rows, indent=1))
    return report


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for meshes, data, weights and sheets")
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "direct3d-s2-small"), help="pipeline")
    parser.add_argument("--components", nargs="+", default=["transformer", "dense_transformer"])
    parser.add_argument("--shapes", type=int, default=20)
    parser.add_argument("--held-back", type=int, default=5)
    parser.add_argument("--views", type=int, default=6, help="renders of each shape")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of each transformer")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes of preparation and metrics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", type=Path, help="picture to write: held-back shapes, without and with the LoRA")
    return parse_arguments(parser, __file__, arguments)


if __name__ == "__main__":
    main(parse_args())
