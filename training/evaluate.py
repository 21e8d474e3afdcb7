#!/usr/bin/env python
"""Measures a VAE's reconstructions, or the meshes that a pipeline generates from images, on a split of a dataset.

    python training/evaluate.py reconstruction --model outputs/small/vae_sparse/vae --data data/small --output eval
    python training/evaluate.py generation --model checkpoints/small --data data/small --output eval

Sampling wants a GPU, the metrics many cores, and the two can be done on two machines: `sample` writes the latents to
OUTPUT/samples.safetensors, and `generation --samples` takes them from there.

References are the surfaces of the dataset's SDFs or, if `--meshes` (what `prepare_data.py` had as `--input`) is given,
the original meshes, of which the outer surface counts. Generated meshes are compared after `metrics.align_meshes`,
and so is the baseline: the mean over some training shapes of the same category (of the same source, where the category
has no training shape), drawn at random with a seed.

Writes NAME.json (the summary and all single values) and NAME.png, a sheet with pictures of some samples.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from dataset import SparseSDFDataset
from latents import BlockDataset, expand_blocks, pack
from PIL import Image, ImageDraw
from prepare_data import UP_ROTATIONS, key_value, read_index
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_sparse3d import Direct3DS2Pipeline, SparseVAE
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import load_mesh, normalize_mesh
from diffusers_sparse3d.geometry.metrics import align_meshes, compare_surfaces
from diffusers_sparse3d.geometry.render import render_mesh_views


# Makes a mesh, in the process that needs it.
Shape = Callable[[], trimesh.Trimesh]
# Latents [N, C] as the transformer gives them, and their coordinates [N, 3]; None if there is nothing.
Sample = tuple[Tensor, Tensor] | None
THRESHOLDS = (0.01, 0.02, 0.05)
# (azimuth, elevation, focal length) of the pictures of a sheet.
FRONT, BACK = (30.0, 20.0, 60.0), (210.0, 20.0, 60.0)


def sdf_mesh(feats: np.ndarray, coords: np.ndarray, resolution: int, level: float) -> trimesh.Trimesh:
    """The surface of a sparse SDF, `feats [N]` and `coords [N, 3]`."""
    return sparse_sdf_to_mesh(
        torch.from_numpy(feats).float(), torch.from_numpy(coords.astype(np.int32)), resolution, level
    )


@functools.lru_cache(maxsize=4)
def open_dataset(root: str, split: str, resolution: int) -> SparseSDFDataset:
    return SparseSDFDataset(root, split, resolution, occupancy=False, image=False)


def dataset_mesh(root: str, split: str, name: str, resolution: int) -> trimesh.Trimesh:
    """The surface of the SDF of the mesh with an id in a dataset."""
    data = open_dataset(root, split, resolution)
    index = next(index for index, row in enumerate(data.rows) if row["id"] == name)
    coords, feats, _ = data.blocks(index, resolution).band()
    return sparse_sdf_to_mesh(feats, coords, resolution)


def file_mesh(path: Path, up_axis: str) -> trimesh.Trimesh:
    """An original mesh in model space."""
    mesh = load_mesh(path)
    mesh.vertices = mesh.vertices @ UP_ROTATIONS[up_axis].T
    return normalize_mesh(mesh)[0]


def compare(
    prediction: Shape, reference: Shape, align: bool, outer_resolution: int | None, picture_size: int | None
) -> dict[str, Any]:
    """Metrics of one mesh against its reference.

    Returns:
        chamfer_l1, f1_<threshold> and normal_consistency; watertight; with `picture_size` also pictures: two of the
        prediction and one of the reference. A prediction without a surface has F1 and normal consistency 0.
    """
    predicted, target = prediction(), reference()
    if len(predicted.faces) == 0:
        return {**{f"f1_{threshold:g}": 0.0 for threshold in THRESHOLDS}, "normal_consistency": 0.0, "empty": True}
    result: dict[str, Any] = {"watertight": bool(predicted.is_watertight)}
    if picture_size is not None:
        result["pictures"] = [
            *render_mesh_views(predicted, [FRONT, BACK], picture_size),
            *render_mesh_views(target, [FRONT], picture_size),
        ]
    if align:
        predicted, target, result["yaw"] = align_meshes(predicted, target)
    comparison = compare_surfaces(predicted, target, outer_resolution=outer_resolution)
    result["chamfer_l1"] = comparison.chamfer_l1()
    result["normal_consistency"] = comparison.normal_consistency()
    for threshold in THRESHOLDS:
        result[f"f1_{threshold:g}"] = comparison.f1(threshold)
    return result


def start_worker() -> None:
    """One core for each process."""
    os.environ["IGL_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def run_parallel(
    tasks: Iterable[tuple[Any, dict[str, Any]]], num_workers: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields (key, `compare(**arguments)`) for all (key, arguments), in the order in which they finish; at most a few
    tasks per process are taken ahead."""
    if num_workers == 0:
        yield from ((key, compare(**arguments)) for key, arguments in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as executor:
        pending = {}
        for key, arguments in tasks:
            pending[executor.submit(compare, **arguments)] = key
            while len(pending) >= 4 * num_workers:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()


def make_references(args: argparse.Namespace, data: SparseSDFDataset, resolution: int) -> list[Shape]:
    """What to compare each mesh of the split with."""
    if args.meshes is None:
        return [functools.partial(dataset_mesh, args.data, args.split, row["id"], resolution) for row in data.rows]
    entries = {entry.id: entry for entry in read_index(args.meshes, dict(args.up_axis), [], 0.0)}
    return [functools.partial(file_mesh, entries[row["id"]].mesh, entries[row["id"]].up_axis) for row in data.rows]


def to_shape(feats: Tensor, coords: Tensor, resolution: int, level: float) -> Shape:
    """The mesh of an SDF on any device, `feats [N, 1]` and `coords [N, 4]`, to be computed elsewhere."""
    arrays = feats[:, 0].half().cpu().numpy(), coords[:, 1:].short().cpu().numpy()
    return functools.partial(sdf_mesh, *arrays, resolution, level)


@torch.no_grad()
def reconstruct(args: argparse.Namespace, vae: SparseVAE, data: SparseSDFDataset, resolution: int) -> Iterator[Shape]:
    """The meshes of a split, encoded and decoded."""
    blocks = BlockDataset(data)
    for start in range(0, len(data), args.batch_size):
        indices = range(start, min(start + args.batch_size, len(data)))
        batch = {name: t.to(args.device) for name, t in pack([blocks[index, resolution] for index in indices]).items()}
        coords, target, is_input, _ = expand_blocks(batch)
        output = vae.encode(target[is_input].to(vae.dtype), coords[is_input])
        decoded = vae.decode(output.latent_dist.mode().to(vae.dtype), output.coords)
        for sample in range(len(indices)):
            rows = decoded.coords[:, 0] == sample
            yield to_shape(decoded.sample[rows], decoded.coords[rows], resolution, args.level)


@torch.no_grad()
def sample(args: argparse.Namespace, pipeline: Direct3DS2Pipeline, images: list[Image.Image]) -> Iterator[Sample]:
    """Latents for each image."""
    options = {
        "dense_num_inference_steps": args.dense_steps,
        "num_inference_steps": args.steps,
        "dense_guidance_scale": args.dense_guidance_scale,
        "guidance_scale": args.guidance_scale,
        "output_type": "latent",
    }

    def run(indices: range) -> list[Sample]:
        generators = [torch.Generator(args.device).manual_seed(args.seed + index) for index in indices]
        try:
            output = pipeline([images[index] for index in indices], generator=generators, **options)
        except ValueError:  # the dense stage found nothing for one of them
            if len(indices) == 1:
                return [None]
            return [sample for index in indices for sample in run(range(index, index + 1))]
        rows = [output.coords[:, 0] == index for index in range(len(indices))]
        return [(output.latents[row].half(), output.coords[row, 1:].short()) for row in rows]

    for start in range(0, len(images), args.batch_size):
        yield from run(range(start, min(start + args.batch_size, len(images))))


def save_samples(path: Path, ids: list[str], samples: Iterable[Sample]) -> None:
    """Latents and coordinates, and nothing for those without."""
    tensors = {}
    for name, latents_and_coords in zip(ids, samples):
        if latents_and_coords is not None:
            for key, tensor in zip(("latents", "coords"), latents_and_coords):
                tensors[f"{name}/{key}"] = tensor.contiguous().cpu()
    save_file(tensors, path)


def read_samples(path: Path, ids: list[str]) -> Iterator[Sample]:
    """What `save_samples` wrote."""
    with safe_open(path, "pt") as file:
        known = set(file.keys())
        for name in ids:
            keys = (f"{name}/latents", f"{name}/coords")
            yield tuple(file.get_tensor(key) for key in keys) if keys[0] in known else None


@torch.no_grad()
def decode(args: argparse.Namespace, pipeline: Direct3DS2Pipeline, samples: Iterable[Sample]) -> Iterator[Shape]:
    """A mesh for each sample; one without a face for None."""
    stage = pipeline.sparse_stages[-1]
    for latents_and_coords in samples:
        if latents_and_coords is None:
            yield trimesh.Trimesh
            continue
        latents, coords = (tensor.to(args.device) for tensor in latents_and_coords)
        sdf = stage.decode_latents(latents, F.pad(coords.int(), (1, 0)), 0)
        yield to_shape(sdf.feats, sdf.coords, stage.resolution, stage.iso_level(args.level))


def draw_baseline(rows: list[dict[str, str]], row: dict[str, str], number: int, seed: int) -> list[int]:
    """Random rows of the same category, or else of the same source, or else any; the same for the same id."""
    for columns in (("source", "category"), ("source",), ()):
        alike = [i for i, other in enumerate(rows) if all(other[column] == row[column] for column in columns)]
        if alike:
            return random.Random(f"{seed} {row['id']}").sample(alike, min(number, len(alike)))
    return []


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and median of every number in the results, and their count."""
    names = sorted({name for result in results for name, value in result.items() if isinstance(value, (int, float))})
    summary: dict[str, Any] = {"count": len(results)}
    for name in names:
        values = [float(result[name]) for result in results if name in result]
        summary[name] = {"mean": float(np.mean(values)), "median": float(np.median(values))}
    return summary


def draw_sheet(cells: list[tuple[str, list[Image.Image]]], size: int, columns: int) -> Image.Image:
    """Rows of pictures with a caption, some cells beside each other."""
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
    """Runs what the command line asks for; returns what it writes to NAME.json."""
    generation = args.mode != "reconstruction"
    dtype = getattr(torch, args.dtype)
    if generation:
        pipeline = Direct3DS2Pipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
        pipeline.set_progress_bar_config(disable=True)
        resolution = pipeline.resolution
    else:
        vae = SparseVAE.from_pretrained(args.model, torch_dtype=dtype).to(args.device).eval()
        resolution = args.resolution or vae.config.sample_size * vae.spatial_compression_ratio
    data = SparseSDFDataset(args.data, args.split, resolution)
    data.rows = data.rows[:: args.every][: args.limit]
    images = [data.picture(index, args.view % int(row["num_images"])) for index, row in enumerate(data.rows)]
    ids = [row["id"] for row in data.rows]
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
    common = {"align": generation, "outer_resolution": outer_resolution, "picture_size": None}

    def tasks() -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
        if generation:
            samples = read_samples(args.samples, ids) if args.samples else sample(args, pipeline, images)
            shapes = decode(args, pipeline, samples)
        else:
            shapes = reconstruct(args, vae, data, resolution)
        for index, shape in enumerate(tqdm(shapes, total=len(data), desc=args.mode.capitalize(), unit="mesh")):
            size = args.picture_size if index in pictured else None
            yield (
                ("result", index),
                {**common, "prediction": shape, "reference": references[index], "picture_size": size},
            )
        if generation and args.num_baseline > 0:
            train = SparseSDFDataset(args.data, "train", resolution)
            for index, row in enumerate(data.rows):
                for other in draw_baseline(train.rows, row, args.num_baseline, args.seed):
                    name = train.rows[other]["id"]
                    shape = functools.partial(dataset_mesh, args.data, "train", name, resolution)
                    yield ("baseline", index), {**common, "prediction": shape, "reference": references[index]}

    results: list[dict[str, Any]] = [{} for _ in data.rows]
    baseline: list[list[dict[str, Any]]] = [[] for _ in data.rows]
    for (kind, index), result in tqdm(run_parallel(tasks(), args.num_workers), desc="Metrics", unit="mesh"):
        if kind == "result":
            results[index] = result
        else:
            baseline[index].append(result)

    cells = []
    for index in pictured:
        f1 = results[index][f"f1_{THRESHOLDS[-1 if generation else 0]:g}"]
        caption = f"{data.rows[index].get('name') or data.rows[index]['id']}  F1 {f1:.2f}"
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
            for row, result, values in zip(data.rows, results, baseline)
        ],
    }
    (output / f"{args.name or args.mode}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"summary": report["summary"], "baseline": report["baseline"]}, indent=1))
    return report


def summarize_baseline(results: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over the baseline shapes of one sample."""
    return {name: value["mean"] for name, value in summarize(results).items() if isinstance(value, dict)}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("reconstruction", "sample", "generation"))
    parser.add_argument("--model", required=True, help="folder of the SparseVAE, or of the pipeline")
    parser.add_argument("--data", required=True, help="dataset of prepare_data.py")
    parser.add_argument("--output", required=True, help="folder for the report and the sheet")
    parser.add_argument("--name", help="of the two files; the mode if not given")
    parser.add_argument("--split", default="val")
    parser.add_argument("--every", type=int, default=1, help="one in so many meshes of the split")
    parser.add_argument("--limit", type=int, help="at most this many meshes")
    parser.add_argument("--resolution", type=int, help="of the SDFs that are reconstructed; the VAE's if not given")
    parser.add_argument("--meshes", type=Path, help="original meshes to compare with: index.csv or a folder")
    parser.add_argument("--up_axis", type=key_value, nargs="+", default=[], metavar="[SOURCE=]AXIS")
    parser.add_argument("--samples", type=Path, help="latents from `sample`, instead of generating them")
    parser.add_argument("--level", type=float, default=0.0, help="iso-level of marching cubes")
    parser.add_argument("--view", type=int, default=0, help="which image of a mesh; -1: the last")
    parser.add_argument("--dense_steps", type=int, help="the pipeline's default if not given")
    parser.add_argument("--steps", type=int, help="the pipeline's default if not given")
    parser.add_argument("--dense_guidance_scale", type=float, help="the pipeline's default if not given")
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's default if not given")
    parser.add_argument("--num_baseline", type=int, default=3, help="random training shapes per sample; 0 for none")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_pictures", type=int, default=24, help="samples on the sheet, evenly from the split")
    parser.add_argument("--picture_size", type=int, default=160, help="pixels")
    parser.add_argument("--columns", type=int, default=3, help="of the sheet")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes for metrics; 0: this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the generators and of the baseline's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    evaluate(parse_args())
