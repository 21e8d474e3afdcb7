"""Finished meshes side by side, and which of them are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import trimesh


@dataclass(frozen=True)
class FinishedMesh:
    """
    A mesh that was asked for.

    Attributes:
        photo: which of the photos it is of, from 0.
        seed: that it was made with.
        mesh: y up.
        score: how well it fits its photo, where there are several of that photo.
    """

    photo: int
    seed: int
    mesh: trimesh.Trimesh
    score: float | None = None


# By their places on the page; None where another mesh of the same photo was kept.
Meshes = Sequence[FinishedMesh | None]


def kept(meshes: Meshes) -> list[FinishedMesh]:
    """The meshes that are there, in the order of their places."""
    return [mesh for mesh in meshes if mesh is not None]


def undecided(meshes: Meshes) -> set[int]:
    """The photos of which there is more than one mesh."""
    return {photo for photo, count in Counter(mesh.photo for mesh in kept(meshes)).items() if count > 1}


def keep(meshes: Meshes, place: int) -> Meshes:
    """The meshes without the others of the photo of the mesh at a place.

    Raises:
        ValueError: if there is no mesh at that place.
    """
    chosen = meshes[place] if 0 <= place < len(meshes) else None
    if chosen is None:
        raise ValueError("There is no such mesh.")
    return [mesh if mesh is chosen or mesh is None or mesh.photo != chosen.photo else None for mesh in meshes]


def title(meshes: Meshes, place: int, photos: int, seeds: int) -> str:
    """What the mesh at a place is called, where there are so many photos and seeds."""
    mesh = meshes[place]
    assert mesh is not None  # a title is given once, to a new mesh
    name = f"Mesh {place + 1}" if photos == 1 else f"Photo {mesh.photo + 1}"
    if photos > 1 and seeds > 1:
        name += f", seed {mesh.seed}"
    return name if mesh.score is None else f"{name}, score {mesh.score:.3f}"


def summary(meshes: Meshes, failures: Sequence[str]) -> str:
    """What is there after a generation, in words."""
    finished = kept(meshes)
    photos = {mesh.photo for mesh in finished}
    if len(finished) == 1:
        words = f"{len(finished[0].mesh.faces):,} triangles"
    elif len(photos) == len(finished):
        words = f"{len(finished)} meshes, one of each photo"
    elif len(photos) == 1:
        best = max(range(len(finished)), key=lambda place: finished[place].score or 0.0)
        words = f"choose the one to keep, mesh {best + 1} fits best"
    else:
        words = "choose the one to keep of each photo"
    return "; ".join([words, *failures])
