"""Reconstructions of a VAE, latents sampled by a pipeline, and the shapes that they decode to."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import Direct3DS2Pipeline, SDFRefiner, SparseVAE
from ...pipelines.guards import EmptyResultError
from ..batches import BlockDataset, encoder_input, pack, vae_targets
from ..dataset import SparseSDFDataset
from .shapes import Shape, to_shape


# Latents [N, C] as the transformer gives them and their coordinates [N, 3]; None if the dense stage found nothing.
Sample = tuple[Tensor, Tensor] | None


@torch.no_grad()
def reconstruct(
    args: argparse.Namespace,
    vae: SparseVAE,
    refiner: SDFRefiner | None,
    data: SparseSDFDataset,
    resolution: int,
) -> Iterator[Shape]:
    """Yields the shape of each mesh of a split after encoding and decoding, and refining where there is a refiner."""
    blocks = BlockDataset(data)
    # A refined distance is twice one over tau (`RefinerConfig.distance_scale`).
    level = (args.level or 0.0) * (1 if refiner is None else 2)
    for start in range(0, len(data), args.batch_size):
        indices = range(start, min(start + args.batch_size, len(data)))
        batch = {name: t.to(args.device) for name, t in pack([blocks[index, resolution] for index in indices]).items()}
        target, is_input, _ = vae_targets(batch["values"].float(), batch["sharp"])
        feats, coords = encoder_input(batch["coords"], target, is_input)
        output = vae.encode(feats.to(vae.dtype), coords)
        latents = output.latent_dist.mode().to(vae.dtype)
        decoded = vae.decode(latents, output.coords, return_features=refiner is not None)
        feats, voxels = decoded.sample, decoded.coords
        if refiner is not None:
            feats = refiner.refine(feats, voxels, decoded.features, resolution=resolution).sample
        for sample in range(len(indices)):
            rows = voxels[:, 0] == sample
            yield to_shape(feats[rows], voxels[rows], resolution, level)


@torch.no_grad()
def sample(args: argparse.Namespace, pipeline: Direct3DS2Pipeline, images: list[Image.Image]) -> Iterator[Sample]:
    """Yields the sampled latents of each image, None where a stage left nothing.

    Raises:
        ValueError: if the pipeline refuses an image or an option, or its weights are damaged.
    """
    options = {
        "dense_num_inference_steps": args.dense_steps,
        "num_inference_steps": args.steps,
        "dense_guidance_scale": args.dense_guidance_scale,
        "guidance_scale": args.guidance_scale,
        "output_type": "latent",
    }

    def run(indices: range) -> list[Sample]:
        generators = [torch.Generator(args.device).manual_seed(args.seed + index) for index in indices]
        try:
            output = pipeline([images[index] for index in indices], generator=generators, **options)
        except EmptyResultError:
            return [None] * len(indices)
        rows = [output.coords[:, 0] == index for index in range(len(indices))]
        return [(output.latents[row].half(), output.coords[row, 1:].short()) if row.any() else None for row in rows]

    for start in range(0, len(images), args.batch_size):
        yield from run(range(start, min(start + args.batch_size, len(images))))


def save_samples(path: Path, ids: list[str], samples: Iterable[Sample]) -> None:
    """Writes the latents and coordinates of samples by their ids; tensors without rows for those that are None."""
    tensors = {}
    for name, latents_and_coords in zip(ids, samples):
        if latents_and_coords is None:
            latents_and_coords = (torch.zeros(0, 0, dtype=torch.float16), torch.zeros(0, 3, dtype=torch.int16))
        for key, tensor in zip(("latents", "coords"), latents_and_coords):
            tensors[f"{name}/{key}"] = tensor.contiguous().cpu()
    save_file(tensors, path)


def read_samples(path: Path, ids: list[str]) -> Iterator[Sample]:
    """
    The samples that `save_samples` wrote, in the order of `ids`.

    Raises:
        ValueError: if the file lacks one of `ids`, such as with another `--every` or `--limit`.
    """
    with safe_open(path, "pt") as file:
        known = set(file.keys())
    missing = [name for name in ids if f"{name}/coords" not in known]
    if missing:
        raise ValueError(
            f"`samples` must hold all {len(ids)} meshes that are measured, {path} lacks {len(missing)} of them, such"
            f" as {missing[0]!r}: `split`, `every` and `limit` must be those of `sample`"
        )
    return _read_samples(path, ids)


def _read_samples(path: Path, ids: list[str]) -> Iterator[Sample]:
    """The samples of a file by their ids, one after the other."""
    with safe_open(path, "pt") as file:
        for name in ids:
            latents, coords = file.get_tensor(f"{name}/latents"), file.get_tensor(f"{name}/coords")
            yield (latents, coords) if len(coords) else None


@torch.no_grad()
def decode(args: argparse.Namespace, pipeline: Direct3DS2Pipeline, samples: Iterable[Sample]) -> Iterator[Shape]:
    """Yields the shape of each sample; a mesh without faces for None."""
    stage = pipeline.sparse_stages[-1]
    level = pipeline.config.default_level if args.level is None else args.level
    max_opening = pipeline.config.default_max_opening if args.max_opening is None else args.max_opening
    surface = (stage.resolution, stage.iso_level(level), max_opening, pipeline.config.default_remove_floaters)
    for latents_and_coords in samples:
        if latents_and_coords is None:
            yield trimesh.Trimesh
            continue
        latents, coords = (tensor.to(args.device) for tensor in latents_and_coords)
        sdf = stage.decode_latents(latents, F.pad(coords.int(), (1, 0)), 0)
        yield to_shape(sdf.feats, sdf.coords, *surface)
