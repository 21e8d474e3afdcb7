"""Shapes that an evaluation compares: functions that make a mesh, called in the process that needs it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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


def missing_shape(reason: str) -> trimesh.Trimesh:
    """The shape of a mesh that could not be made, as a function that says so."""
    raise RuntimeError(reason)


def without_break(shapes: Iterable[Shape], count: int) -> Iterator[Shape]:
    """Yields `count` shapes; those that an error keeps from being made raise it when they are called.

    An error before the first shape is raised here: it is of the settings rather than of a mesh.
    """
    number = 0
    try:
        for shape in shapes:
            number += 1
            yield shape
    except Exception as error:
        if number == 0:
            raise
        reason = f"the model stopped after {number} of {count} meshes: {describe(error)}"
        for _ in range(number, count):
            yield functools.partial(missing_shape, reason)


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
