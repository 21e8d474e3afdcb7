"""Which shapes are made of a mesh, and the random numbers that decide about them."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .index import MeshEntry
from .settings import Settings


# Ends the id of a mesh in that of one of its shapes, before the number.
SHAPE_SEPARATOR = "~"


def shapes_of(entry: MeshEntry, settings: Settings) -> list[MeshEntry]:
    """Returns the shapes that are made of a mesh: itself where nothing is augmented.

    A mesh of the training split becomes the shapes `ID~0`, `ID~1`, ...; their number is that of `Settings.augment` for
    its source, whose fraction is the probability of one more. Meshes of other splits keep their ids and proportions
    and are turned to the camera. Pictures that came with meshes do not show what they have become, and are left out.
    """
    if not settings.augment or entry.problem:
        return [entry]
    if SHAPE_SEPARATOR in entry.id:
        return [replace(entry, problem=f"its id must not have {SHAPE_SEPARATOR!r}, which numbers shapes")]
    entry = replace(entry, image=None)
    if entry.split != "train":
        return [entry]
    number = settings.shapes_per_mesh(entry.source)
    share = generator_of(f"share {settings.seed} {entry.id}").random()
    count = int(number) + (share < number % 1)
    return [
        replace(entry, id=f"{entry.id}{SHAPE_SEPARATOR}{copy}", mesh_id=entry.id, copy=copy) for copy in range(count)
    ]


def find_shape(name: str, meshes: Mapping[str, MeshEntry], settings: Settings | None) -> MeshEntry | None:
    """Returns the mesh, or the shape of a mesh, that has an id in a dataset; None if there is no such mesh.

    Args:
        name: The id.
        meshes: The meshes that the dataset was made of, by their ids.
        settings: Settings of the dataset; None, as where nothing is augmented, if they are not known.
    """
    if name in meshes:
        return meshes[name]
    mesh_id, _, copy = name.rpartition(SHAPE_SEPARATOR)
    if settings is None or not settings.augment or mesh_id not in meshes or not copy.isdecimal():
        return None
    return replace(meshes[mesh_id], id=name, mesh_id=mesh_id, copy=int(copy))


def generator_of(text: str) -> np.random.Generator:
    """Returns a generator of random numbers that a text decides, alike on all machines."""
    return np.random.default_rng(list(hashlib.sha1(text.encode()).digest()))
