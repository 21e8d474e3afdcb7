"""Measures a VAE's reconstructions, or the meshes that a pipeline generates from images, on a split of a dataset.

    python training/evaluate.py reconstruction --model outputs/small/vae_sparse/vae --data data/small --output eval
    python training/evaluate.py generation --model outputs/small/pipeline --data data/small --output eval

Sampling wants a GPU, the metrics many cores, and the two can be done on two machines: `sample` writes the latents to
OUTPUT/samples.safetensors, and `generation --samples` takes them from there.

References are the surfaces of the dataset's SDFs or, if `--meshes` (what `prepare_data.py` had as `--input`) is given,
the original meshes, deformed as in the dataset if it was made with `--augment`; their outer surface counts. Generated
meshes are compared after `metrics.align_meshes`, and so is the baseline: the mean over some training shapes of the
same category (of the same source, where the category has no training shape), drawn at random with a seed.

Writes NAME.json (the summary and all single values) and NAME.png, a sheet with pictures of some samples. A mesh that
cannot be generated, reconstructed, compared or drawn costs no other: it is named in NAME.json, or in the file of
`sample`, and the exit status is 1. An error before a first mesh is made, or of its batch, ends the evaluation, as it
may be of the settings; so do processes of `--num_workers` that cannot start or die one after the other.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ... import Direct3DS2Pipeline, SDFRefiner, SparseVAE
from ...checks import check_packages
from ...command_parser import CommandParser
from ...models.compatibility import dtype_argument
from ..dataset import SparseSDFDataset
from ..files import write_text
from ..preparation.augmentation import deformation_of
from ..preparation.index import parse_up_axis, read_index
from ..preparation.settings import recorded_settings
from ..preparation.shapes import find_shape
from .comparison import THRESHOLDS, Task, draw_baseline, run_parallel, summarize, summarize_baseline
from .models import decode, read_samples, reconstruct, sample, save_samples
from .shapes import Missing, Shape, dataset_mesh, file_mesh


# Columns of the index that reports and captions have.
COLUMNS = ("source", "category", "name")


def make_references(args: argparse.Namespace, data: SparseSDFDataset, resolution: int) -> list[Shape]:
    """Returns the reference of each mesh of the split: its SDF, or the original mesh if there is `--meshes`.

    Of a dataset that was made with `--augment`, it is the shape that the dataset has of the original mesh.

    Raises:
        ValueError: if `--meshes` lacks one of the meshes.
    """
    if args.meshes is None:
        return [functools.partial(dataset_mesh, args.data, args.split, name, resolution) for name in data.ids]
    entries = {entry.id: entry for entry in read_index(args.meshes, dict(args.up_axis), [], 0.0)}
    settings = recorded_settings(data.folder)
    found = {name: find_shape(name, entries, settings) for name in data.ids}
    if missing := [name for name, entry in found.items() if entry is None]:
        raise ValueError(
            f"`meshes` must hold the meshes of the dataset, {args.meshes} lacks {len(missing)} of {len(found)}, such"
            f" as {missing[0]!r}"
        )
    return [
        functools.partial(
            file_mesh, entry.mesh, entry.up_axis, None if settings is None else deformation_of(entry, settings)
        )
        for entry in found.values()
        if entry is not None
    ]


def draw_sheet(cells: list[tuple[str, list[Image.Image]]], size: int, columns: int) -> Image.Image:
    """Draws cells, each a caption above a row of pictures, in several columns."""
    width, height = size * max(len(pictures) for _, pictures in cells) + 12, size + 16
    sheet = Image.new("RGB", (width * columns, height * -(-len(cells) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, pictures) in enumerate(cells):
        left, top = number % columns * width, number // columns * height
        draw.text((left + 4, top + 2), caption, fill="black")
        for position, picture in enumerate(pictures):
            picture = picture.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + position * size, top + 16), picture)
    return sheet


def check_support(args: argparse.Namespace) -> None:
    """Raises an ImportError that says what to install if a package is missing that an evaluation needs, even late."""
    if args.lora is not None:
        check_packages("`--lora`", "peft")
    if args.mode != "sample":
        check_packages("the distance to a mesh", "igl")
        if args.num_pictures > 0:
            check_packages("`--num_pictures` above 0", "embreex")


def load_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline of the command line, on its device."""
    pipeline: Any = Direct3DS2Pipeline.from_pretrained(args.model, **dtype_argument(getattr(torch, args.dtype)))
    pipeline = pipeline.to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    return pipeline


def load_autoencoder(args: argparse.Namespace) -> tuple[SparseVAE, SDFRefiner | None]:
    """The VAE of the command line and its refiner, if there is one, on their device."""
    dtype = dtype_argument(getattr(torch, args.dtype))
    vae = SparseVAE.from_pretrained(args.model, **dtype).to(args.device).eval()
    if args.refiner is None:
        return vae, None
    return vae, SDFRefiner.from_pretrained(args.refiner, **dtype).to(args.device).eval()


def open_data(args: argparse.Namespace, resolution: int) -> SparseSDFDataset:
    """The meshes of the split that are measured."""
    data = SparseSDFDataset(args.data, args.split, resolution, columns=COLUMNS)
    return data.select(range(len(data))[:: args.every][: args.limit])


def read_images(args: argparse.Namespace, data: SparseSDFDataset) -> list[Image.Image]:
    """The picture of each mesh that the pipeline is given."""
    return [data.picture(index, args.view % count) for index, count in enumerate(data.num_images.tolist())]


def read_train_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of the training shapes that baselines are drawn from; none if there are no baselines.

    Raises:
        ValueError: if the dataset has no such shapes.
    """
    if args.mode != "generation" or args.num_baseline == 0:
        return []
    data = SparseSDFDataset(args.data, columns=(*COLUMNS, "split"))
    rows = [row for index in range(len(data)) if (row := data.row(index))["split"] == "train"]
    if not rows:
        raise ValueError(
            f"`num_baseline` must be 0 without training shapes, got {args.num_baseline}: {args.data} has none"
        )
    return rows


def write_samples(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the latents that the pipeline samples of each picture to OUTPUT/samples.safetensors.

    Returns:
        "samples", the "id" of each mesh whose latents are there; "errors" as in `make_report`, of the others.
    """
    pipeline = load_pipeline(args)
    data = open_data(args, pipeline.resolution)
    samples = sample(args, pipeline, read_images(args, data))
    bar = tqdm(samples, total=len(data), desc="Sampling", unit="mesh")
    errors = save_samples(Path(args.output) / "samples.safetensors", list(data.ids), bar)
    return {
        "samples": [{"id": name} for name in data.ids if name not in errors],
        "errors": [{"id": name, "part": "latents", "error": reason} for name, reason in errors.items()],
    }


class Evaluation(NamedTuple):
    """What an evaluation has found.

    Attributes:
        report: The contents of NAME.json, see `make_report`.
        cells: Captions and pictures of the sheet.
    """

    report: dict[str, Any]
    cells: list[tuple[str, list[Image.Image]]]


def pictured_samples(args: argparse.Namespace, count: int) -> list[int]:
    """The indices of the meshes on the sheet, evenly from `count`."""
    return list(range(0, count, max(1, count // max(1, args.num_pictures))))[: args.num_pictures]


def make_tasks(
    args: argparse.Namespace,
    shapes: Iterable[Shape | Missing],
    references: list[Shape],
    rows: list[dict[str, str]],
    train_rows: list[dict[str, str]],
    resolution: int,
) -> Iterator[Task]:
    """Yields the comparisons of an evaluation: ("figures", index) of each mesh, and ("baseline", index) of others."""
    generation = args.mode == "generation"
    common = {
        "align": generation,
        "outer_resolution": None if args.meshes is None else resolution,
        "thresholds": args.thresholds,
    }
    pictured = pictured_samples(args, len(rows))
    bar = tqdm(shapes, total=len(rows), desc=args.mode.capitalize(), unit="mesh")
    for index, shape in enumerate(bar):
        size = args.picture_size if index in pictured else None
        yield ("figures", index), {**common, "prediction": shape, "reference": references[index], "picture_size": size}
    for index, row in enumerate(rows):
        for other in draw_baseline(train_rows, row, args.num_baseline, args.seed):
            shape = functools.partial(dataset_mesh, args.data, "train", train_rows[other]["id"], resolution)
            pair = {"prediction": shape, "reference": references[index]}
            yield ("baseline", index), {**common, **pair, "picture_size": None}


def measure(args: argparse.Namespace) -> Evaluation:
    """Measures reconstructions or generated meshes as the command line says, and writes nothing.

    What cannot be done of one mesh costs no other: the report says what, of which, and why. An error before a
    first mesh is made, or of its batch, is raised.

    Raises:
        BrokenProcessPool: if processes cannot start or die one after the other, see `run_parallel`.
        ValueError: if `--meshes` or `--samples` lacks a mesh, there is nothing to draw baselines from, or the pipeline
            refuses an option.
    """
    images: list[Image.Image] = []
    if args.mode == "generation":
        pipeline = load_pipeline(args)
        resolution = pipeline.resolution
        data = open_data(args, resolution)
        images = read_images(args, data)
        samples = read_samples(args.samples, list(data.ids)) if args.samples else sample(args, pipeline, images)
        shapes = decode(args, pipeline, samples)
    else:
        vae, refiner = load_autoencoder(args)
        resolution = args.resolution or vae.config.sample_size * vae.spatial_compression_ratio
        data = open_data(args, resolution)
        shapes = reconstruct(args, vae, refiner, data, resolution)
    rows = [data.row(index) for index in range(len(data))]
    references, train_rows = make_references(args, data, resolution), read_train_rows(args)
    tasks = make_tasks(args, shapes, references, rows, train_rows, resolution)
    results: list[dict[str, Any]] = [{} for _ in rows]
    baseline: list[list[dict[str, Any]]] = [[] for _ in rows]
    errors: list[tuple[int, str, str]] = []
    for (part, index), result in tqdm(run_parallel(tasks, args.num_workers), desc="Metrics", unit="mesh"):
        for name, missing in (("error", part), ("picture_error", "pictures")):
            if name in result:
                errors.append((index, missing, result.pop(name)))
        if part == "figures":
            results[index] = result
        else:
            baseline[index].append(result)
    cells = []
    for index in pictured_samples(args, len(rows)):
        pictures = [*images[index : index + 1], *results[index].pop("pictures", [])]
        f1 = results[index].get(f"f1_{args.thresholds[-1 if images else 0]:g}")
        found = "failed" if f1 is None else f"F1 {f1:.2f}"
        cells.append((f"{rows[index]['name'] or rows[index]['id']}  {found}", pictures))
    return Evaluation(make_report(args, rows, results, baseline, errors), cells)


def make_report(
    args: argparse.Namespace,
    rows: list[dict[str, str]],
    results: list[dict[str, Any]],
    baseline: list[list[dict[str, Any]]],
    errors: list[tuple[int, str, str]],
) -> dict[str, Any]:
    """Returns the contents of NAME.json.

    Args:
        args: The options, which the report has as "command".
        rows: The rows of the index of all meshes.
        results: The figures of each mesh, none of those that could not be measured.
        baseline: The figures of the shapes of its baseline, likewise.
        errors: Index, part ("figures", "pictures" or "baseline") and reason of all that could not be done.

    Returns:
        "command"; "summary" and "baseline", means and medians; "samples", the figures of each mesh that was measured;
        "errors", the "id", "part" and "error" of what could not be done.
    """
    measured = [
        (row, result, summarize_baseline(values)) for row, result, values in zip(rows, results, baseline) if result
    ]
    return {
        "command": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "summary": summarize([result for _, result, _ in measured]),
        "baseline": summarize([means for *_, means in measured if means]) if args.mode == "generation" else None,
        "samples": [
            {**{name: row[name] for name in ("id", "source", "category")}, **result}
            | ({"baseline": means} if means else {})
            for row, result, means in measured
        ],
        "errors": [{"id": rows[index]["id"], "part": part, "error": error} for index, part, error in sorted(errors)],
    }


def tell_errors(report: dict[str, Any]) -> None:
    """Prints to stderr what the report of an evaluation lacks: a line each, and their number."""
    errors = report["errors"]
    for error in errors:
        # Others of the baseline may be there.
        part = "a shape of its baseline is left out" if error["part"] == "baseline" else f"no {error['part']}"
        print(f"{error['id']}: {part}: {error['error']}", file=sys.stderr)
    if errors:
        lacking = {error["id"] for error in errors}
        total = len(lacking | {sample["id"] for sample in report["samples"]})
        print(f"{len(lacking)} of {total} meshes lack something", file=sys.stderr)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation of the command line; returns the contents of NAME.json, or what `write_samples` does.

    Raises:
        ImportError: if a package is missing, before any work.
        ValueError: as `measure`.
    """
    check_support(args)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.mode == "sample":
        report = write_samples(args)
        tell_errors(report)
        return report
    report, cells = measure(args)
    name = args.name or args.mode
    write_text(output / f"{name}.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps({"summary": report["summary"], "baseline": report["baseline"]}, indent=1))
    tell_errors(report)
    if cells:
        draw_sheet(cells, args.picture_size, args.columns).save(output / f"{name}.png")
    return report


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("reconstruction", "sample", "generation"))
    parser.add_argument("--model", required=True, help="folder of the SparseVAE, or of the pipeline")
    parser.add_argument("--lora", help="LoRA weights for the pipeline: a file, a folder, or a hub id")
    parser.add_argument("--refiner", help="folder of an SDFRefiner for reconstructions")
    parser.add_argument("--data", required=True, help="dataset of prepare_data.py")
    parser.add_argument("--output", required=True, help="folder for the report and the sheet")
    parser.add_argument("--name", help="of the two files; the mode if not given")
    parser.add_argument("--split", default="val")
    parser.add_argument("--every", type=int, default=1, help="one in so many meshes of the split")
    parser.add_argument("--limit", type=int, help="at most this many meshes")
    parser.add_argument("--resolution", type=int, help="of the SDFs that are reconstructed; the VAE's if not given")
    parser.add_argument("--meshes", type=Path, help="original meshes to compare with: index.csv or a folder")
    parser.add_argument("--up_axis", type=parse_up_axis, nargs="+", default=[], metavar="[SOURCE=]AXIS")
    parser.add_argument("--samples", type=Path, help="latents from `sample`, instead of generating them")
    default = "the pipeline's default if not given"
    parser.add_argument("--level", type=float, help=f"iso-level of marching cubes; {default}, 0 for reconstructions")
    parser.add_argument("--max_opening", type=float, help=f"of generated cavities to fill; {default}")
    parser.add_argument("--view", type=int, default=0, help="which image of a mesh; -1: the last")
    parser.add_argument("--dense_steps", type=int, help=default)
    parser.add_argument("--steps", type=int, help=default)
    parser.add_argument("--dense_guidance_scale", type=float, help=default)
    parser.add_argument("--guidance_scale", type=float, help=default)
    parser.add_argument("--num_baseline", type=int, default=3, help="random training shapes per sample; 0 for none")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="distances of F1, ascending"
    )
    parser.add_argument(
        "--num_pictures", type=int, default=24, help="samples on the sheet, evenly from the split; 0: no sheet"
    )
    parser.add_argument("--picture_size", type=int, default=160, help="pixels")
    parser.add_argument("--columns", type=int, default=3, help="of the sheet")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes for metrics; 0: this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the generators and of the baseline's choice")
    args = parser.parse_args(arguments)
    if args.refiner is not None and args.mode != "reconstruction":
        parser.error("--refiner is for reconstructions: a pipeline has its own refiners")
    if sorted(args.thresholds) != args.thresholds or args.thresholds[0] <= 0:
        parser.error(f"--thresholds must be positive and ascending, got {args.thresholds}")
    return args


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line of `evaluate`; returns the exit status, 1 if something could not be done."""
    return int(bool(evaluate(parse_arguments(arguments, prog))["errors"]))
