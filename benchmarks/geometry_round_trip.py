"""
Round trip mesh -> sparse SDF -> mesh on real meshes, compared with the outer surface of the original.

    python benchmarks/geometry_round_trip.py --meshes DIR --resolution 256 --per-source 100 --json FILE

`DIR/index.csv` names the meshes in the columns `id`, `source` and `mesh` (path relative to DIR). The meshes of each
source are drawn at random with a seed. F1 is taken at 0.01 in model space (the longest side of a mesh is 1.9), on
100,000 samples per surface. The outer surface is that of `diffusers_sparse3d/geometry/sdf/outer_surface.py`.
"""

import argparse
import csv
import random
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import load_mesh, normalize_mesh
from diffusers_sparse3d.geometry.metrics import compare_surfaces
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from result_files import describe_run, parse_arguments, write_report


THRESHOLD = 0.01
GOAL = 0.99


def round_trip(row: dict[str, str], root: Path, resolution: int, num_samples: int) -> dict[str, Any]:
    """The figures of one mesh, or the cause of its failure; `row` is its line in the index."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"id": row["id"], "source": row["source"]}
    try:
        mesh, _, _ = normalize_mesh(load_mesh(root / row["mesh"]))
        result["faces"] = len(mesh.faces)
        start, cpu_start = time.perf_counter(), time.process_time()
        sdf = mesh_to_sparse_sdf(mesh, resolution, normalize=False, progress=False)
        middle, cpu_middle = time.perf_counter(), time.process_time()
        reconstruction = sparse_sdf_to_mesh(sdf.feats, sdf.coords, resolution)
        result["sdf_seconds"], result["mesh_seconds"] = middle - start, time.perf_counter() - middle
        result["sdf_cpu_seconds"], result["mesh_cpu_seconds"] = (
            cpu_middle - cpu_start,
            time.process_time() - cpu_middle,
        )
        comparison = compare_surfaces(reconstruction, mesh, num_samples, outer_resolution=resolution)
        recall = float((comparison.reference_distance < THRESHOLD).mean())
        precision = float((comparison.prediction_distance < THRESHOLD).mean())
        result.update(
            voxels=len(sdf.feats),
            f1=comparison.f1(THRESHOLD),
            precision=precision,
            recall=recall,
            chamfer_l1=comparison.chamfer_l1(),
            normal_consistency=comparison.normal_consistency(),
            watertight=bool(reconstruction.is_watertight),
        )
    except (ValueError, OSError, MemoryError) as error:
        result["cause"] = f"error: {error}"
        return result
    if not result["watertight"]:
        result["cause"] = "not watertight"
    elif result["f1"] < GOAL:
        result["cause"] = "surface is missing" if recall < precision else "surface is added"
    return result


def main() -> None:
    """Prints the table and the failures, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", type=Path, required=True, help="folder with index.csv")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--per-source", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; give each its share of IGL_NUM_THREADS")
    arguments = parse_arguments(parser, __file__)

    with open(arguments.meshes / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    generator = random.Random(arguments.seed)
    chosen = []
    for source in sorted({row["source"] for row in rows}):
        candidates = [row for row in rows if row["source"] == source]
        chosen += generator.sample(candidates, min(arguments.per_source, len(candidates)))

    work = partial(
        round_trip,
        root=arguments.meshes,
        resolution=arguments.resolution,
        num_samples=arguments.num_samples,
    )
    with ProcessPoolExecutor(arguments.workers) as pool:
        results = list(tqdm(pool.map(work, chosen), total=len(chosen), unit="mesh"))

    table = []
    for source in sorted({row["source"] for row in chosen}):
        of_source = [result for result in results if result["source"] == source]
        measured = [result for result in of_source if "f1" in result]
        table.append(
            {
                "source": source,
                "meshes": len(of_source),
                "measured": len(measured),
                "median_f1": statistics.median(result["f1"] for result in measured),
                "min_f1": min(result["f1"] for result in measured),
                "share_at_goal": sum(result["f1"] >= GOAL for result in measured) / len(of_source),
                "watertight": sum(result["watertight"] for result in measured) / len(of_source),
                "median_normal_consistency": statistics.median(result["normal_consistency"] for result in measured),
                "median_sdf_cpu_seconds": statistics.median(result["sdf_cpu_seconds"] for result in measured),
                "median_mesh_cpu_seconds": statistics.median(result["mesh_cpu_seconds"] for result in measured),
            }
        )

    print(f"Round trip at {arguments.resolution}^3, F1({THRESHOLD}) against the outer surface")
    print("| source | meshes | median F1 | lowest F1 | F1 >= 0.99 | watertight | normals | SDF cpu s | mesh cpu s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row['source']} | {row['meshes']} | {row['median_f1']:.4f} | {row['min_f1']:.4f} "
            f"| {row['share_at_goal']:.0%} | {row['watertight']:.0%} | {row['median_normal_consistency']:.3f} "
            f"| {row['median_sdf_cpu_seconds']:.2f} | {row['median_mesh_cpu_seconds']:.2f} |"
        )
    failures = [result for result in results if "cause" in result]
    print(f"\n{len(failures)} failures: {dict(Counter(result['cause'] for result in failures))}")
    for result in failures:
        detail = (
            f" F1 {result['f1']:.3f} (P {result['precision']:.3f}, R {result['recall']:.3f})" if "f1" in result else ""
        )
        print(f"- {result['id']}: {result['cause']}{detail}")

    write_report(arguments.json, describe_run(arguments) | {"rows": table, "meshes": results})


if __name__ == "__main__":
    main()
