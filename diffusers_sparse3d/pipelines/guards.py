"""Words of warning before work that is likely to fail or to be in vain."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import trimesh
from diffusers.utils import logging
from torch import Tensor

from ..models.autoencoder_sparse import VOXELS_PER_LATENT, SparseVAE
from ..models.transformer_sparse import SparseDiT


logger = logging.get_logger(__name__)

# A surface meets some r^2 to 6 r^2 cells of a grid of r^3; only noise meets more than this many.
MOST_CELLS = 16
# What a decoder holds of the finest level at once, relative to its hidden states: measured, 66 to 73 KiB a latent of
# the published one (benchmarks/results/vae.json). Tiles of 32^3 need a third.
DECODER_COPIES = 2
TILED_SHARE = 1 / 3


class EmptyResultError(ValueError):
    """A stage has left nothing of any sample, although all arguments are right."""


def warn_of_full_grid(cells: Tensor, resolution: int) -> None:
    """
    Warn of a dense stage that takes nearly everything for occupied: later stages would take minutes, for noise.

    Args:
        cells: `[N, 4]` int32 (sample, x, y, z), the occupied cells.
        resolution: cells per axis.
    """
    counts = cells[:, 0].bincount().tolist()
    full = [index for index, count in enumerate(counts) if count > MOST_CELLS * resolution**2]
    if full:
        logger.warning(
            f"The dense stage takes {max(counts):,} of {resolution**3:,} cells for occupied (meshes {full}),"
            " more than a surface has: the following stages will take long, and the mesh will be noise. Is the dense"
            " stage trained, and are `dense_num_inference_steps` and `dense_guidance_scale` those of the checkpoint?"
        )


def report_empty(empty: Sequence[int], batch_size: int, message: str) -> None:
    """
    Warn of samples of which a stage left nothing, which the next stages leave out.

    Args:
        empty: their indices in the batch.
        batch_size: number of samples.
        message: what is missing and what to do, with `{}` in the place of the indices.

    Raises:
        EmptyResultError: if these are all samples.
    """
    if not empty:
        return
    text = message.format(list(empty))
    if len(empty) == batch_size:
        raise EmptyResultError(text)
    logger.warning(f"{text} The others go on; in the place of these the result is empty.")


def warn_of_meshes(meshes: Sequence[trimesh.Trimesh]) -> None:
    """Warn of meshes of no volume: without a surface, or flat."""
    flat = [index for index, mesh in enumerate(meshes) if len(mesh.faces) == 0 or mesh.extents.min() == 0]
    if flat:
        logger.warning(
            f"The meshes {flat} (index in the batch) have no surface, or one without volume: try another seed of"
            " `generator`, another `level`, or less clean-up."
        )


def warn_of_unseen_pictures(name: str, num_inference_steps: int, num_pictures: int) -> None:
    """
    Warn if not all pictures of an object take their turn in the steps of a stage.

    Args:
        name: of the argument for its steps.
        num_inference_steps: its steps, each of which sees one picture.
        num_pictures: of an object.
    """
    if num_inference_steps < num_pictures:
        logger.warning(
            f"`{name}` is {num_inference_steps}: of the {num_pictures} pictures of an object, which take turns, that"
            f' stage does not see the last {num_pictures - num_inference_steps}. `multiple_images="average"` sees all'
            " of them at each step."
        )


def memory_of_denoising(transformer: SparseDiT, num_tokens: int) -> int:
    """Bytes that a step without gradients needs beside the weights: hidden states, and the feed-forward network's."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    return int(num_tokens * width * (config.mlp_ratio + 4)) * transformer.dtype.itemsize


def memory_of_decoding(vae: SparseVAE, num_latents: int) -> int:
    """Bytes that decoding latents of one sample needs beside the weights: the finest level, and the result."""
    hidden = DECODER_COPIES * (vae.config.decoder_channels // 16) * vae.dtype.itemsize
    if vae.use_tiling:
        hidden = int(hidden * TILED_SHARE)
    coords_and_sample = 16 + 4
    return num_latents * VOXELS_PER_LATENT * (hidden + coords_and_sample)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None where there is no way to know."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def warn_of_memory(
    name: str, transformer: SparseDiT, vae: SparseVAE | None, counts: list[int], copies: int, device: torch.device
) -> None:
    """
    Warn if a sparse stage is likely to need more memory than there is, before it starts.

    Args:
        name: of the stage.
        transformer: its transformer.
        vae: its VAE; None if it is for decoding elsewhere.
        counts: cells of each sample.
        copies: how often each cell is a token of one call: twice with guidance in one batch.
        device: where the stage runs.
    """
    free = free_memory(device)
    if free is None or not counts:
        return
    steps = {"denoising": memory_of_denoising(transformer, copies * sum(counts))}
    if vae is not None:
        steps["decoding"] = memory_of_decoding(vae, max(counts))
    advice = {
        "denoising": "`pipe.disable_guidance_batching()`, one mesh at a time or fewer cells",
        "decoding": "`pipe.enable_vae_tiling()`",
    }
    for step, needed in steps.items():
        if needed > free:
            logger.warning(
                f"{step.capitalize()} {sum(counts):,} cells in the stage `{name}` needs some {needed / 2**30:.1f} GiB"
                f" beside the weights, and {free / 2**30:.1f} GiB are free on {device}. If it fails, take"
                f" {advice[step]}; `pipe.enable_model_cpu_offload()` and half precision save weights."
            )
