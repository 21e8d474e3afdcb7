"""The commands `encode` and `decode`: meshes to sparse latents and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import check_packages
from .models import check_device, resolve_model
from .outputs import check_writable
from .parser import CLEAN_UP_OPTIONS


if TYPE_CHECKING:
    import trimesh
    from torch import Tensor

    from .. import SparseVAE

LATENT_TENSORS = ("latents", "coords", "resolution", "center", "scale")


def encode(args: argparse.Namespace) -> None:
    """Encodes a mesh and writes its sparse latents, with the place and scale that the mesh had."""
    import torch
    from safetensors.torch import save_file

    from ..files import written_beside
    from ..geometry.mesh import normalize_mesh
    from ..geometry.sdf import mesh_to_sparse_sdf

    if args.output.suffix.lower() != ".safetensors":
        raise ValueError(f"`--output` must end in .safetensors, got {str(args.output)!r}")
    check_writable("--output", args.output)
    check_packages("`encode`", "igl")
    device = check_device(args.device)
    model = resolve_model(args.model)
    mesh, center, scale = normalize_mesh(read_mesh(args.mesh))
    vae = _load_vae(model, device)
    resolution = args.resolution or vae.config.sample_size * vae.spatial_compression_ratio
    sdf = mesh_to_sparse_sdf(mesh, resolution, normalize=False).to(device)
    with torch.no_grad():
        encoded = vae.encode(sdf.feats, sdf.coords)
    tensors = {
        "latents": encoded.latent_dist.mode().cpu().contiguous(),
        "coords": encoded.coords.cpu().contiguous(),
        "center": torch.from_numpy(center),
        "scale": torch.tensor([scale], dtype=torch.float64),
        "resolution": torch.tensor([resolution]),
    }
    with written_beside(args.output) as partial:
        save_file(tensors, partial)
    rows, channels = tensors["latents"].shape
    print(f"{args.output}: {len(sdf.coords):,} voxels at {resolution}^3 as {rows:,} latents of {channels} channels")


def decode(args: argparse.Namespace) -> None:
    """Decodes the file of [`encode`] and writes the mesh, in its place and scale unless `--normalized`."""
    import torch

    from ..geometry.clean_up import MeshCleanUp
    from ..geometry.marching_cubes import sparse_sdf_to_mesh
    from ..geometry.mesh import EXPORT_SUFFIXES, check_export_support, export_mesh

    if args.output.suffix.lower() not in EXPORT_SUFFIXES:
        raise ValueError(f"`--output` must end in one of {', '.join(EXPORT_SUFFIXES)}, got {str(args.output)!r}")
    check_export_support(args.output)
    check_writable("--output", args.output)
    chosen = {name: getattr(args, name) for name in CLEAN_UP_OPTIONS}
    clean_up = MeshCleanUp(**{**chosen, "remove_floaters": bool(args.remove_floaters)})
    device = check_device(args.device)
    model = resolve_model(args.model)
    tensors = _load_latents(args.latents)
    vae = _load_vae(model, device)
    with torch.no_grad():
        decoded = vae.decode(tensors["latents"].to(device), tensors["coords"].to(device))
    mesh = sparse_sdf_to_mesh(decoded.sample, decoded.coords, int(tensors["resolution"]), args.level)
    if len(mesh.faces) == 0:
        raise ValueError("the latents gave no surface; try another `--level`")
    if not args.normalized:
        mesh.vertices = mesh.vertices / float(tensors["scale"]) + tensors["center"].numpy()
    mesh = clean_up(mesh)
    export_mesh(mesh, args.output, args.up_axis)
    print(f"{args.output}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles")


def _check_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"`{name}` {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")


def read_mesh(path: Path) -> trimesh.Trimesh:
    """The triangles of a file.

    Raises:
        ValueError: if it is missing or damaged, or has no usable triangle.
    """
    from ..geometry.mesh import load_mesh

    _check_file("mesh", path)
    try:
        return load_mesh(path)
    except ValueError as error:
        if str(path) in str(error):
            raise
        # What is wrong with its triangles.
        raise ValueError(f"{error} ({path})") from error
    except Exception as error:  # trimesh's readers raise anything on damaged files
        raise ValueError(f"`mesh` {str(path)!r} cannot be read: {error or type(error).__name__}") from error


def _load_vae(model: str, device: str) -> SparseVAE:
    from .. import SparseVAE

    return SparseVAE.from_pretrained(model, subfolder="vae").to(device)


def _load_latents(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `encode` has written.

    Raises:
        ValueError: if another program has, or the file is cut or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_file("latents", path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`latents` {str(path)!r} is no whole safetensors file: {error}") from error
    missing = set(LATENT_TENSORS) - set(tensors)
    if missing:
        raise ValueError(f"`{path}` was not written by `encode`: it has no {', '.join(sorted(missing))}")
    return tensors
