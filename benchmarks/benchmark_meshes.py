"""The meshes that benchmarks run on: files, or a torus that anyone can make.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from pathlib import Path

import trimesh

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
