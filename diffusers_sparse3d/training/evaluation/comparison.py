"""Metrics of meshes against their references, in many processes, and their summary."""

import multiprocessing
import os
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from ...geometry.metrics import align_meshes, compare_surfaces
from ...geometry.render import render_mesh_views
from .shapes import Missing, Shape, describe


# A key with the arguments of a comparison, or with its result.
Task = tuple[Any, dict[str, Any]]

# Of a process that died, and of processes that do not work at all.
DIED = "its process died, as one does that needs too much memory or crashes in a library"
NOT_WORKING = (
    "the processes of `num_workers` do not work: they cannot start, as those of a script whose work is not below"
    " `if __name__ == '__main__':` or of which an import fails, or they die one after the other, of too much memory or"
    " a crash in a library; with `num_workers` 0 this process does the work"
)
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
        `picture_size` "pictures", two of the prediction and one of the reference, or "picture_error", why there are
        none. An empty prediction has F1 and normal consistency 0, is not watertight, and has no Chamfer distance,
        bodies, yaw and pictures.
    """
    predicted, target = prediction(), reference()
    if len(predicted.faces) == 0:
        zeros = {**{f"f1_{threshold:g}": 0.0 for threshold in thresholds}, "normal_consistency": 0.0}
        return {"empty": True, "watertight": False, **zeros}
    result: dict[str, Any] = {"empty": False, "watertight": bool(predicted.is_watertight)}
    result |= {"bodies": int(predicted.body_count), "reference_bodies": int(target.body_count)}
    if picture_size is not None:
        try:
            result["pictures"] = [
                *render_mesh_views(predicted, [FRONT, BACK], picture_size),
                *render_mesh_views(target, [FRONT], picture_size),
            ]
        except Exception as error:  # the figures count without pictures, too
            result["picture_error"] = describe(error)
    if align:
        predicted, target, result["yaw"] = align_meshes(predicted, target)
    comparison = compare_surfaces(predicted, target, outer_resolution=outer_resolution)
    result["chamfer_l1"] = comparison.chamfer_l1()
    result["normal_consistency"] = comparison.normal_consistency()
    for threshold in thresholds:
        result[f"f1_{threshold:g}"] = comparison.f1(threshold)
    return result


def try_to_compare(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns `compare(**arguments)`, or the "error" that it raised, or that left its prediction `Missing`."""
    if isinstance(arguments["prediction"], Missing):
        return {"error": arguments["prediction"].reason}
    try:
        return compare(**arguments)
    except Exception as error:  # of meshes of any kind
        return {"error": describe(error)}


def start_worker() -> None:
    """Limits the libraries of a worker process to one core."""
    os.environ["IGL_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def run_parallel(tasks: Iterable[Task], num_workers: int) -> Iterator[Task]:
    """Yields (key, `try_to_compare(arguments)`) for all (key, arguments) in the order in which they finish.

    At most four tasks per process are taken from `tasks` ahead of time. Where a process dies, as one that needs too
    much memory, all tasks that were taken and are not finished are done again, one after the other: the one that kills
    its process has an "error", too.

    Raises:
        BrokenProcessPool: if processes cannot start, or two tasks in a row kill theirs.
    """
    if num_workers == 0:
        yield from ((key, try_to_compare(arguments)) for key, arguments in tasks)
        return
    tasks = iter(tasks)
    while lost := (yield from _run_pool(tasks, num_workers)):
        died = False
        while lost:
            source, count = iter(lost), len(lost)
            # One process takes them in order: where it dies, the first that is left is the one that killed it.
            lost = [*(yield from _run_pool(source, 1)), *source]
            if died and len(lost) == count:
                raise BrokenProcessPool(NOT_WORKING)
            if lost:
                died = True
                (key, _), *lost = lost
                yield key, {"error": DIED}


def _run_pool(tasks: Iterable[Task], num_workers: int) -> Generator[Task, None, list[Task]]:
    """Yields what `run_parallel` does until a process dies, and returns the tasks that were taken and not finished.

    Raises:
        BrokenProcessPool: if no process started.
    """
    context = multiprocessing.get_context("spawn")
    pending: dict[Future[dict[str, Any]], Task] = {}
    taken: list[Task] = []
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as executor:
        # The first call of the first process that is up.
        started = executor.submit(bool)
        try:
            for task in tasks:
                # Of a pool that is broken already, which takes no more.
                taken = [task]
                pending[executor.submit(try_to_compare, task[1])] = task
                taken = []
                while len(pending) >= 4 * num_workers:
                    yield from _take_finished(pending)
            while pending:
                yield from _take_finished(pending)
        except BrokenProcessPool as error:
            if started.exception() is not None:
                raise BrokenProcessPool(NOT_WORKING) from error
            return [*pending.values(), *taken]
    return []


def _take_finished(pending: dict[Future[dict[str, Any]], Task]) -> Iterator[Task]:
    """Waits for comparisons, and yields and removes those that are finished."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        result = future.result()
        yield pending.pop(future)[0], result


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
