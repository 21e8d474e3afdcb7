"""Measures a VAE's reconstructions, or the meshes that a pipeline generates from images, on a split of a dataset.

    python training/evaluate.py reconstruction --model outputs/small/vae_sparse/vae --data data/small --output eval
    python training/evaluate.py generation --model outputs/small/pipeline --data data/small --output eval

Sampling wants a GPU, the metrics many cores, and the two can be done on two machines: `sample` writes the latents to
OUTPUT/samples.safetensors, and `generation --samples` takes them from there.

References are the surfaces of the dataset's SDFs or, if `--meshes` (what `prepare_data.py` had as `--input`) is given,
the original meshes, deformed as in the dataset if it was made with `--augment`; their outer surface counts. Generated
meshes are compared after `metrics.align_meshes`, and so is the baseline: the mean over some training shapes of the
same category (of the same source, where the category has no training shape), drawn at random with a seed.

Writes NAME.json (the summary and all single values) and NAME.png, a sheet with pictures of some samples.
"""

import argparse
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ... import Direct3DS2Pipeline, SDFRefiner, SparseVAE
from ...command_parser import CommandParser
from ...models.compatibility import dtype_argument
from ..dataset import SparseSDFDataset
from ..preparation.augmentation import deformation_of
from ..preparation.index import parse_up_axis, read_index
from ..preparation.settings import recorded_settings
from ..preparation.shapes import find_shape
from .comparison import THRESHOLDS, draw_baseline, run_parallel, summarize, summarize_baseline
from .models import decode, read_samples, reconstruct, sample, save_samples
from .shapes import Shape, dataset_mesh, file_mesh


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


def evaluate(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the evaluation of the command line and returns the contents of NAME.json, None after `sample`."""
    generation = args.mode != "reconstruction"
    dtype = getattr(torch, args.dtype)
    if generation:
        pipeline = Direct3DS2Pipeline.from_pretrained(args.model, **dtype_argument(dtype)).to(args.device)
        pipeline.set_progress_bar_config(disable=True)
        if args.lora is not None:
            pipeline.load_lora_weights(args.lora)
        resolution = pipeline.resolution
    else:
        vae = SparseVAE.from_pretrained(args.model, **dtype_argument(dtype)).to(args.device).eval()
        refiner = None
        if args.refiner is not None:
            refiner = SDFRefiner.from_pretrained(args.refiner, **dtype_argument(dtype)).to(args.device).eval()
        resolution = args.resolution or vae.config.sample_size * vae.spatial_compression_ratio
    data = SparseSDFDataset(args.data, args.split, resolution, columns=COLUMNS)
    data = data.select(range(len(data))[:: args.every][: args.limit])
    counts = data.num_images.tolist() if generation else []
    images = [data.picture(index, args.view % count) for index, count in enumerate(counts)]
    rows = [data.row(index) for index in range(len(data))]
    ids = [row["id"] for row in rows]
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.mode == "sample":
        samples = sample(args, pipeline, images)
        save_samples(output / "samples.safetensors", ids, tqdm(samples, total=len(data), desc="Sampling", unit="mesh"))
        return None
    references = make_references(args, data, resolution)
    stride = max(1, len(data) // max(1, args.num_pictures))
    pictured = list(range(0, len(data), stride))[: args.num_pictures]
    outer_resolution = None if args.meshes is None else resolution
    common = {"align": generation, "outer_resolution": outer_resolution, "thresholds": args.thresholds}

    def tasks() -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
        if generation:
            samples = read_samples(args.samples, ids) if args.samples else sample(args, pipeline, images)
            shapes = decode(args, pipeline, samples)
        else:
            shapes = reconstruct(args, vae, refiner, data, resolution)
        for index, shape in enumerate(tqdm(shapes, total=len(data), desc=args.mode.capitalize(), unit="mesh")):
            size = args.picture_size if index in pictured else None
            yield (
                ("result", index),
                {**common, "prediction": shape, "reference": references[index], "picture_size": size},
            )
        if generation and args.num_baseline > 0:
            train = SparseSDFDataset(args.data, "train", resolution, columns=COLUMNS)
            train_rows = [train.row(index) for index in range(len(train))]
            for index, row in enumerate(rows):
                for other in draw_baseline(train_rows, row, args.num_baseline, args.seed):
                    name = train_rows[other]["id"]
                    shape = functools.partial(dataset_mesh, args.data, "train", name, resolution)
                    baseline_shapes = {"prediction": shape, "reference": references[index]}
                    yield ("baseline", index), {**common, **baseline_shapes, "picture_size": None}

    results: list[dict[str, Any]] = [{} for _ in rows]
    baseline: list[list[dict[str, Any]]] = [[] for _ in rows]
    for (kind, index), result in tqdm(run_parallel(tasks(), args.num_workers), desc="Metrics", unit="mesh"):
        if kind == "result":
            results[index] = result
        else:
            baseline[index].append(result)

    cells = []
    for index in pictured:
        f1 = results[index][f"f1_{args.thresholds[-1 if generation else 0]:g}"]
        caption = f"{rows[index]['name'] or rows[index]['id']}  F1 {f1:.2f}"
        cells.append((caption, [*([images[index]] if generation else []), *results[index].pop("pictures", [])]))
    if cells:
        draw_sheet(cells, args.picture_size, args.columns).save(output / f"{args.name or args.mode}.png")
    report = {
        "command": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "summary": summarize(results),
        "baseline": summarize([summarize_baseline(values) for values in baseline if values]) if generation else None,
        "samples": [
            {"id": row["id"], "source": row["source"], "category": row["category"], **result}
            | ({"baseline": summarize_baseline(values)} if values else {})
            for row, result, values in zip(rows, results, baseline)
        ],
    }
    (output / f"{args.name or args.mode}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"summary": report["summary"], "baseline": report["baseline"]}, indent=1))
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
    parser.add_argument("--num_pictures", type=int, default=24, help="samples on the sheet, evenly from the split")
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


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `evaluate`."""
    evaluate(parse_arguments(arguments, prog))
