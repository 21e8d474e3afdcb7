"""The meshes that benchmarks run on: files, or a torus that anyone can make.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor

from diffusers_sparse3d.geometry.mesh import load_mesh, normalize_mesh


def load_or_torus(path: str | Path | None, tube_radius: float = 0.2) -> trimesh.Trimesh:
    """The mesh of a file, or a torus if None, in model space.

    By default, the torus has about as many latent cells at 512^3 as the paper's mean shape, 10,700.
    """
    torus = trimesh.creation.torus(0.7, tube_radius, major_sections=256, minor_sections=128)
    return normalize_mesh(torus if path is None else load_mesh(path))[0]


def mesh_name(path: str | Path | None) -> str:
    """The name of a mesh in tables."""
    return "torus" if path is None else Path(path).stem


def signed_distance(points: Tensor, size: int = 1024) -> Tensor:
    """Distance of `[..., 3]` points, in voxels of a grid of `size^3`, to a torus in it."""
    x, y, z = (points.float() - size / 2).unbind(-1)
    return torch.hypot(torch.hypot(x, y) - 0.3125 * size, z) - 0.109375 * size


def torus_cells(count: int, size: int = 128) -> Tensor:
    """`[count, 3]` int64, the cells of a grid of `size^3` nearest to the surface of a torus, in ascending order."""
    axis = torch.arange(size)
    grid = torch.cartesian_prod(axis, axis, axis)
    nearest = signed_distance(8 * grid + 3.5, 8 * size).abs().argsort()[:count]
    return grid[nearest.sort().values]


def write_bumpy_spheres(folder: Path, count: int, subdivisions: int = 5) -> None:
    """Writes `count` closed meshes of 20 * 4^subdivisions faces, spheres with waves of their own on them, as PLY."""
    folder.mkdir(parents=True)
    for number in range(count):
        generator = np.random.default_rng(number)
        sphere = trimesh.creation.icosphere(subdivisions)
        waves = np.sin(sphere.vertices @ generator.uniform(-6, 6, (3, 4)) + generator.uniform(0, 6, 4))
        sphere.vertices *= 1 + 0.08 * waves.sum(1, keepdims=True)
        sphere.export(folder / f"sphere-{number:03d}.ply")
