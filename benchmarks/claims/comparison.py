"""Shapes that a model makes beside their references, compared in several processes."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from diffusers_sparse3d.geometry.metrics import compare_surfaces
from diffusers_sparse3d.training.evaluation.comparison import start_worker
from diffusers_sparse3d.training.evaluation.shapes import Shape


THRESHOLDS = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Comparison:
    """
    A shape and its reference, both as functions that make a mesh in the process that compares them.

    Attributes:
        prediction: the shape to judge.
        reference: what it should be.
        num_samples: points on each surface.
    """

    prediction: Shape
    reference: Shape
    num_samples: int

    def measures(self) -> dict[str, float]:
        """
        F1 at the thresholds, the normal error (mean angle between normals, without orientation, in degrees, over both
        directions) and the L1 Chamfer distance. A shape without surface has F1 0, 90 degrees, and no distance.
        """
        predicted, target = self.prediction(), self.reference()
        if len(predicted.faces) == 0:
            return {**{f"f1_{threshold:g}": 0.0 for threshold in THRESHOLDS}, "normal_error": 90.0}
        found = compare_surfaces(predicted, target, num_samples=self.num_samples)
        cosines = (found.prediction_cosine, found.reference_cosine)
        angles = [float(np.degrees(np.arccos(cosine.clip(0, 1))).mean()) for cosine in cosines]
        measures = {f"f1_{threshold:g}": found.f1(threshold) for threshold in THRESHOLDS}
        return {**measures, "normal_error": statistics.mean(angles), "chamfer_l1": found.chamfer_l1()}


@contextmanager
def make_pool(num_workers: int) -> Iterator[Executor | None]:
    """Processes that compare shapes, for `compare_all`; None for no processes, which compares in this one."""
    if num_workers == 0:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as executor:
        yield executor


def compare_all(comparisons: Sequence[Comparison], pool: Executor | None) -> list[dict[str, float]]:
    """The measures of each comparison, in the processes of `make_pool`."""
    return list((map if pool is None else pool.map)(Comparison.measures, comparisons))


def means(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the shapes that have it, and "num_shapes"."""
    names = dict.fromkeys(name for result in results for name in result)
    found = {name: statistics.mean(result[name] for result in results if name in result) for name in names}
    return {"num_shapes": len(results), **found}
