"""The best of several meshes of one image, by a score that needs no truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import trimesh
from torch import Tensor

from ..checks import check_choice
from ..geometry.clean_up import count_bodies
from ..geometry.silhouettes import View, best_view, frame_mask, surface_points


SELECTIONS = (None, "best", "ranked")
# What each doubling of the number of bodies takes off the score.
BODY_PENALTY = 0.01


@dataclass(frozen=True)
class MeshScore:
    """
    How well a mesh fits the images that it was made of.

    Attributes:
        score: `silhouette_iou - 0.01 * log2(num_bodies)`; -1 for a mesh without a surface.
        silhouette_iou: intersection over union, 0 to 1, of the image's mask and the mesh's silhouette, both cropped
            and scaled to the same frame. The camera of an image is not known: the best one of some hundred directions
            and focal lengths counts. With several images of an object, their mean.
        num_bodies: connected parts of the surface.
        views: the camera found for each image.
        candidate: place of the mesh among those of its image before the selection, hence of its generator.
    """

    score: float
    silhouette_iou: float
    num_bodies: int
    views: tuple[View, ...]
    candidate: int = 0


def score_mesh(mesh: trimesh.Trimesh, masks: Sequence[np.ndarray] | np.ndarray, candidate: int = 0) -> MeshScore:
    """
    The score of a mesh, see [`MeshScore`].

    Args:
        mesh: the mesh, y up.
        masks: a mask `[H, W]` of each image of the object, nonzero on it, such as those of the image processor. Alpha
            is none before a threshold: faint haze is nonzero, too.
        candidate: the place of the mesh among those of its image.

    Raises:
        ValueError: if there is no mask, or one of them is zero everywhere.
    """
    if not len(masks):
        raise ValueError("`masks` must hold at least one mask, got none")
    framed = [frame_mask(mask) for mask in masks]
    if len(mesh.faces) == 0 or not mesh.area > 0:
        return MeshScore(-1.0, 0.0, 0, (), candidate)
    points = surface_points(mesh)
    found = [best_view(points, mask) for mask in framed]
    silhouette_iou, num_bodies = float(np.mean([iou for iou, _ in found])), count_bodies(mesh)
    score = silhouette_iou - BODY_PENALTY * math.log2(num_bodies)
    return MeshScore(score, silhouette_iou, num_bodies, tuple(view for _, view in found), candidate)


def check_selection(select: str | None, output_type: str) -> None:
    """Raise a ValueError unless `select` is one of `SELECTIONS`, and there are meshes to select from."""
    check_choice("select", select, SELECTIONS)
    if select is not None and output_type != "mesh":
        raise ValueError(f"`select` must be None with the `output_type` {output_type!r}: it compares meshes")


def select_meshes(
    meshes: Sequence[trimesh.Trimesh], masks: Tensor, counts: Sequence[int], select: str
) -> tuple[list[trimesh.Trimesh], list[MeshScore]]:
    """
    The best mesh of each object, or all of them with the best first.

    Args:
        meshes: as many for each object, those of one object after those of another.
        masks: `[P, 1, S, S]`, of all images, object by object.
        counts: how many images each object has.
        select: "best" or "ranked".

    Returns:
        The meshes, object by object, and the score of each.
    """
    chosen, scores = [], []
    each, starts = len(meshes) // len(counts), np.cumsum([0, *counts])
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        candidates = meshes[index * each : (index + 1) * each]
        own_masks = masks[start:stop, 0].cpu().numpy()
        ranked = [score_mesh(mesh, own_masks, place) for place, mesh in enumerate(candidates)]
        # A stable sort: of equal ones the first generator's.
        ranked.sort(key=lambda score: score.score, reverse=True)
        kept = ranked[:1] if select == "best" else ranked
        scores += kept
        chosen += [candidates[score.candidate] for score in kept]
    return chosen, scores
