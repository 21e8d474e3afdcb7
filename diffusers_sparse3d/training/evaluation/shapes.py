"""Shapes that an evaluation compares: functions that make a mesh, called in the process that needs it."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import trimesh
from torch import Tensor

from ...geometry.cavities import fill_cavities
from ...geometry.clean_up import remove_floaters
from ...geometry.marching_cubes import sparse_sdf_to_mesh
from ...geometry.mesh import load_mesh, normalize_mesh
from ...geometry.render import UP_ROTATIONS
from ..dataset import SparseSDFDataset
from ..preparation.deformation import Deformation


# A function that makes a mesh.
Shape = Callable[[], trimesh.Trimesh]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Missing:
    """Stands for what could not be made of a mesh, its latents or its shape.

    Attributes:
        reason: Why, as `describe` has it.
    """

    reason: str


def sdf_mesh(
    feats: np.ndarray,
    coords: np.ndarray,
    resolution: int,
    level: float,
    max_opening: float = 0.0,
    without_floaters: bool = False,
) -> trimesh.Trimesh:
    """Returns the surface of a sparse SDF as a pipeline gives it: `feats [N]` at `coords [N, 3]`."""
    rows = torch.from_numpy(feats).float(), torch.from_numpy(coords.astype(np.int32))
    mesh = sparse_sdf_to_mesh(*fill_cavities(*rows, resolution, level, max_opening), resolution, level)
    return remove_floaters(mesh) if without_floaters else mesh


def to_shape(feats: Tensor, coords: Tensor, resolution: int, *surface: Any) -> Shape:
    """
    Returns the shape of an SDF on any device: `feats [N, 1]` at `coords [N, 4]`, kept in half precision.

    `surface` is what `sdf_mesh` takes after the resolution.
    """
    arrays = feats[:, 0].half().cpu().numpy(), coords[:, 1:].short().cpu().numpy()
    return functools.partial(sdf_mesh, *arrays, resolution, *surface)


def describe(error: Exception) -> str:
    """An error as the report of an evaluation has it."""
    return f"{type(error).__name__}: {error}"


def attempt(make: Callable[[], Made], first: bool) -> Made | Missing:
    """Returns `make()`, or what is missing after an error, which is raised of the first: it may be of the settings."""
    try:
        return make()
    except Exception as error:  # of meshes of any kind
        if first:
            raise
        return Missing(describe(error))


def in_batches(count: int, size: int, make: Callable[[range], list[Made]]) -> Iterator[Made | Missing]:
    """Yields what `make` returns of `count` meshes by their indices, `size` at a time.

    The meshes of a batch that fails are made again, each alone, so that one that cannot be made costs no other. An
    error of the first batch is raised: it may be of the settings.
    """
    for start in range(0, count, size):
        batch = range(start, min(start + size, count))
        results = attempt(functools.partial(make, batch), start == 0)
        if not isinstance(results, Missing):
            yield from results
        elif len(batch) == 1:
            yield results
        else:
            for index in batch:
                alone = attempt(functools.partial(make, range(index, index + 1)), first=False)
                yield alone if isinstance(alone, Missing) else alone[0]


@functools.lru_cache(maxsize=4)
def open_dataset(root: str, split: str, resolution: int) -> SparseSDFDataset:
    """Returns the SDFs of a split, opened once per process."""
    return SparseSDFDataset(root, split, resolution, occupancy=False, image=False)


def dataset_mesh(root: str, split: str, name: str, resolution: int) -> trimesh.Trimesh:
    """Returns the surface of the SDF of the mesh with the id `name` in a dataset."""
    data = open_dataset(root, split, resolution)
    coords, feats, _ = data.blocks(data.find(name), resolution).band()
    return sparse_sdf_to_mesh(feats, coords, resolution)


def file_mesh(path: Path, up_axis: str, deformation: Deformation | None = None) -> trimesh.Trimesh:
    """Returns the mesh of a file in model space, or what a deformation makes of it."""
    mesh = load_mesh(path)
    mesh.vertices = mesh.vertices @ UP_ROTATIONS[up_axis].T
    return normalize_mesh(mesh)[0] if deformation is None else deformation.mesh(mesh)
