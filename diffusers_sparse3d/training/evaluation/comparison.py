"""Metrics of meshes against their references, in many processes, and their summary."""

import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from ...geometry.metrics import align_meshes, compare_surfaces
from ...geometry.render import render_mesh_views
from .shapes import Shape


THRESHOLDS = (0.01, 0.02, 0.05)
# (azimuth, elevation, focal length) of the pictures of a sheet.
FRONT, BACK = (30.0, 20.0, 60.0), (210.0, 20.0, 60.0)


def compare(
    prediction: Shape,
    reference: Shape,
    align: bool,
    outer_resolution: int | None,
    picture_size: int | None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, Any]:
    """Measures one mesh against its reference; F1 at each of `thresholds`.

    Returns:
        "empty", whether the prediction has no surface, "chamfer_l1", "f1_<threshold>", "normal_consistency",
        "watertight", and "bodies" and "reference_bodies", the numbers of connected parts; with `align` the "yaw"; with
        `picture_size` "pictures", two of the prediction and one of the reference. An empty prediction has F1 and
        normal consistency 0, is not watertight, and has no Chamfer distance, bodies, yaw and pictures.
    """
    predicted, target = prediction(), reference()
    if len(predicted.faces) == 0:
        zeros = {**{f"f1_{threshold:g}": 0.0 for threshold in thresholds}, "normal_consistency": 0.0}
        return {"empty": True, "watertight": False, **zeros}
    result: dict[str, Any] = {"empty": False, "watertight": bool(predicted.is_watertight)}
    result |= {"bodies": int(predicted.body_count), "reference_bodies": int(target.body_count)}
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
    for threshold in thresholds:
        result[f"f1_{threshold:g}"] = comparison.f1(threshold)
    return result


def start_worker() -> None:
    """Limits the libraries of a worker process to one core."""
    os.environ["IGL_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def run_parallel(
    tasks: Iterable[tuple[Any, dict[str, Any]]], num_workers: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields (key, `compare(**arguments)`) for all (key, arguments) in the order in which they finish.

    At most four tasks per process are taken from `tasks` ahead of time.
    """
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


def draw_baseline(rows: list[dict[str, str]], row: dict[str, str], number: int, seed: int) -> list[int]:
    """Draws rows of the same category, or else of the same source, or else any; the same for the same id."""
    for columns in (("source", "category"), ("source",), ()):
        alike = [i for i, other in enumerate(rows) if all(other[column] == row[column] for column in columns)]
        if alike:
            return random.Random(f"{seed} {row['id']}").sample(alike, min(number, len(alike)))
    return []


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns mean and median of every number in the results, and the count of results.

    A number that not all results have, as an empty mesh has no Chamfer distance, has a count of its own.
    """
    names = sorted({name for result in results for name, value in result.items() if isinstance(value, (int, float))})
    summary: dict[str, Any] = {"count": len(results)}
    for name in names:
        values = [float(result[name]) for result in results if name in result]
        summary[name] = {"mean": float(np.mean(values)), "median": float(np.median(values))}
        if len(values) < len(results):
            summary[name]["count"] = len(values)
    return summary


def summarize_baseline(results: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the means over the baseline shapes of one sample."""
    return {name: value["mean"] for name, value in summarize(results).items() if isinstance(value, dict)}
