"""Reconstructions of a VAE, latents sampled by a pipeline, and the shapes that they decode to."""

import argparse
import functools
import json
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
from .shapes import Missing, Shape, attempt, in_batches, to_shape


# Latents [N, C] as the transformer gives them and their coordinates [N, 3]; None if a stage left nothing.
Sample = tuple[Tensor, Tensor] | None
# Key of the metadata of a file of samples: why some of them are missing, by their ids.
ERRORS = "errors"


@torch.no_grad()
def reconstruct(
    args: argparse.Namespace,
    vae: SparseVAE,
    refiner: SDFRefiner | None,
    data: SparseSDFDataset,
    resolution: int,
) -> Iterator[Shape | Missing]:
    """Yields the shape of each mesh of a split after encoding and decoding, and refining where there is a refiner.

    An error is its mesh's own, unless it is one of the first batch, see `in_batches`.
    """
    blocks = BlockDataset(data)
    # A refined distance is twice one over tau (`RefinerConfig.distance_scale`).
    level = (args.level or 0.0) * (1 if refiner is None else 2)

    def run(indices: range) -> list[Shape]:
        batch = {name: t.to(args.device) for name, t in pack([blocks[index, resolution] for index in indices]).items()}
        target, is_input, _ = vae_targets(batch["values"].float(), batch["sharp"])
        feats, coords = encoder_input(batch["coords"], target, is_input)
        output = vae.encode(feats.to(vae.dtype), coords)
        latents = output.latent_dist.mode().to(vae.dtype)
        decoded = vae.decode(latents, output.coords, return_features=refiner is not None)
        feats, voxels = decoded.sample, decoded.coords
        if refiner is not None:
            feats = refiner.refine(feats, voxels, decoded.features, resolution=resolution).sample
        samples = [voxels[:, 0] == sample for sample in range(len(indices))]
        return [to_shape(feats[rows], voxels[rows], resolution, level) for rows in samples]

    yield from in_batches(len(data), args.batch_size, run)


@torch.no_grad()
def sample(
    args: argparse.Namespace, pipeline: Direct3DS2Pipeline, images: list[Image.Image]
) -> Iterator[Sample | Missing]:
    """Yields the sampled latents of each image, None where a stage left nothing.

    An error is its image's own, unless it is one of the first batch, see `in_batches`.

    Raises:
        ValueError: if the pipeline refuses an option or an image of the first batch, or its weights are damaged.
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

    yield from in_batches(len(images), args.batch_size, run)


def save_samples(path: Path, ids: list[str], samples: Iterable[Sample | Missing]) -> dict[str, str]:
    """Writes the latents and coordinates of samples by their ids, and returns why some are missing, by id.

    Those that are None and those that are missing have tensors without rows; the metadata tell the latter and why.
    """
    tensors, errors = {}, {}
    for name, latents_and_coords in zip(ids, samples):
        if isinstance(latents_and_coords, Missing):
            errors[name] = latents_and_coords.reason
        if latents_and_coords is None or isinstance(latents_and_coords, Missing):
            latents_and_coords = (torch.zeros(0, 0, dtype=torch.float16), torch.zeros(0, 3, dtype=torch.int16))
        for key, tensor in zip(("latents", "coords"), latents_and_coords):
            tensors[f"{name}/{key}"] = tensor.contiguous().cpu()
    save_file(tensors, path, metadata={ERRORS: json.dumps(errors)} if errors else None)
    return errors


def read_samples(path: Path, ids: list[str]) -> Iterator[Sample | Missing]:
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


def _read_samples(path: Path, ids: list[str]) -> Iterator[Sample | Missing]:
    """The samples of a file by their ids, one after the other."""
    with safe_open(path, "pt") as file:
        errors = json.loads((file.metadata() or {}).get(ERRORS, "{}"))
        for name in ids:
            if name in errors:
                yield Missing(errors[name])
                continue
            latents, coords = file.get_tensor(f"{name}/latents"), file.get_tensor(f"{name}/coords")
            yield (latents, coords) if len(coords) else None


@torch.no_grad()
def decode(
    args: argparse.Namespace, pipeline: Direct3DS2Pipeline, samples: Iterable[Sample | Missing]
) -> Iterator[Shape | Missing]:
    """Yields the shape of each sample; a mesh without faces for None, and what is missing as it is.

    An error is its mesh's own, unless nothing was decoded before: then it is raised, as it may be of the settings.
    """
    stage = pipeline.sparse_stages[-1]
    level = pipeline.config.default_level if args.level is None else args.level
    max_opening = pipeline.config.default_max_opening if args.max_opening is None else args.max_opening
    surface = (stage.resolution, stage.iso_level(level), max_opening, pipeline.config.default_remove_floaters)

    def make(latents: Tensor, coords: Tensor) -> Shape:
        sdf = stage.decode_latents(latents.to(args.device), F.pad(coords.to(args.device).int(), (1, 0)), 0)
        return to_shape(sdf.feats, sdf.coords, *surface)

    first = True
    for latents_and_coords in samples:
        if latents_and_coords is None:
            yield trimesh.Trimesh
        elif isinstance(latents_and_coords, Missing):
            yield latents_and_coords
        else:
            yield attempt(functools.partial(make, *latents_and_coords), first)
            first = False
