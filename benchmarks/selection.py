"""
What the selection of the best of several meshes of a picture gains, on pictures whose shapes are known.

    python benchmarks/selection.py --data data/small --json selection.json

The pipeline makes meshes of several seeds of each of some pictures, evenly spaced over the validation split, and ranks
them by the score that needs no truth. Each mesh is turned about the vertical axis and normalised to fit the true
shape, and compared with it. A single mesh is as good as the mean of the seeds, and no selection can give more than the
mesh nearest to the truth. Rows that the file of `--json` has are kept.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import torch
import trimesh

from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.geometry.metrics import align_meshes, compare_surfaces
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.evaluation.shapes import dataset_mesh
from result_files import describe_run, earlier_rows, parse_arguments, write_report


THRESHOLDS = (0.02, 0.05)


def judge(mesh: trimesh.Trimesh, truth: trimesh.Trimesh, num_samples: int) -> dict[str, float]:
    """F1 at the thresholds of a mesh in the orientation that fits the truth best; 0 for one without a surface."""
    if len(mesh.faces) == 0:
        return {f"f1_{threshold:g}": 0.0 for threshold in THRESHOLDS}
    aligned, reference, _ = align_meshes(mesh, truth)
    found = compare_surfaces(aligned, reference, num_samples=num_samples)
    return {f"f1_{threshold:g}": found.f1(threshold) for threshold in THRESHOLDS}


def make_row(args: argparse.Namespace, pipe: Any, data: SparseSDFDataset, index: int) -> dict[str, Any]:
    """The candidates of a picture, in the order of their scores: score, overlap, bodies, seed and F1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(args.seeds)]
    options: dict[str, Any] = {"num_meshes_per_image": args.seeds, "generator": generators, "select": "ranked"}
    output = pipe(data.picture(index, 0), dense_num_inference_steps=args.dense_steps, **options)
    truth = dataset_mesh(args.data, "val", data.ids[index], data.resolutions[0])
    candidates = [
        {
            "seed": score.candidate,
            "score": score.score,
            "silhouette_iou": score.silhouette_iou,
            "bodies": score.num_bodies,
            **judge(mesh, truth, args.num_samples),
        }
        for mesh, score in zip(output.meshes, output.scores)
    ]
    return {"id": data.ids[index], "candidates": candidates}


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the pictures: of all seeds, of the selected mesh, and of the one nearest to the truth."""
    summary: dict[str, dict[str, float]] = {}
    for name in (*(f"f1_{threshold:g}" for threshold in THRESHOLDS), "bodies"):
        values = [[candidate[name] for candidate in row["candidates"]] for row in rows]
        nearest = min if name == "bodies" else max
        summary[name] = {
            "one": statistics.mean(statistics.mean(own) for own in values),
            "selected": statistics.mean(own[0] for own in values),
            "nearest": statistics.mean(nearest(own) for own in values),
        }
    return summary


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset of prepare_data.py with pictures")
    parser.add_argument("--model", default="checkpoints/direct3d-s2-small", help="folder of a pipeline")
    parser.add_argument("--shapes", type=int, default=12, help="pictures, each of another shape; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=4, help="meshes of each picture; default: %(default)s")
    parser.add_argument("--dense_steps", type=int, help="denoising steps of the dense stage; by default the model's")
    parser.add_argument("--num_samples", type=int, default=20_000, help="points on each surface of a comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Make, rank and judge the meshes of all pictures, and write the report."""
    pipe: Any = Direct3DS2Pipeline.from_pretrained(args.model).to(device=args.device, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    data = SparseSDFDataset(args.data, "val", sdf=False, occupancy=False)
    report: dict[str, Any] = {**describe_run(args), "rows": earlier_rows(args, but=["shapes"])}
    done = {row["id"] for row in report["rows"]}
    for index in np.linspace(0, len(data) - 1, min(args.shapes, len(data))).round().astype(int).tolist():
        if data.ids[index] in done:
            continue
        try:
            report["rows"].append(make_row(args, pipe, data, index))
        except ValueError as error:  # the dense stage found nothing for one of the seeds
            report["failed"] = [*report.get("failed", []), {"id": data.ids[index], "error": str(error)}]
            print(f"{data.ids[index]}: {error}", flush=True)
            continue
        write_report(args.json, {**report, "summary": summarize(report["rows"])})
        best = report["rows"][-1]["candidates"]
        print(f"{data.ids[index]:40}", *(f"{one['score']:.3f}: F1 {one['f1_0.05']:.3f}" for one in best), flush=True)
    report["summary"] = summarize(report["rows"]) if report["rows"] else {}
    write_report(args.json, report)
    for name, means in report["summary"].items():
        print(f"{name:8}", *(f"{which} {value:.3f}" for which, value in means.items()))
    return report


if __name__ == "__main__":
    main(parse_args())
