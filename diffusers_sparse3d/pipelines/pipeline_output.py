"""Output class of the pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import trimesh
from diffusers.utils import BaseOutput
from torch import Tensor

from ..sparse_tensor import SparseTensor
from .selection import MeshScore


@dataclass
class Direct3DS2PipelineOutput(BaseOutput):
    """
    Output class of [`Direct3DS2Pipeline`]. Which fields are set depends on `output_type`. Where a stage left nothing
    of an image, which a warning names, its mesh has no faces, and its distances and latents no rows.

    Args:
        meshes (`list[trimesh.Trimesh]`):
            for "mesh": one closed mesh per image, in model space [-1, 1]^3, y up; `num_meshes_per_image` of each image
            one after the other, unless one of them is selected.
        sdfs (`list[SparseTensor]`):
            for "sdf": one per image; `feats [V, 1]` is s / tau, positive outside, `coords [V, 4]` int32 with batch
            index 0, at the resolution of the call. Where [`SDFRefiner`] was the last model, `level` is twice as high
            in it.
        latents (`torch.Tensor`):
            for "latent": `[N, C]`, the rows of all images; for "pt": `[B, N, C]`, padded with zeros. They are as the
            transformer gives them: `vae.decode` takes `latents / vae.config.scaling_factor + vae.config.shift_factor`.
        coords (`torch.Tensor`):
            with `latents`: `[N, 4]` int32 (image, x, y, z) for "latent"; `[B, N, 3]`, padded with -1, for "pt".
        interrupted (`bool`):
            True where a callback has interrupted the call. There is no mesh and no distance then; with "latent" and
            "pt", the latents are those of the interrupted step, if it was one of a sparse stage.
        scores (`list[MeshScore]`):
            with `select`: the score of each of `meshes`, see [`~pipelines.selection.MeshScore`].
    """

    meshes: list[trimesh.Trimesh] | None = None
    sdfs: list[SparseTensor] | None = None
    latents: Tensor | None = None
    coords: Tensor | None = None
    interrupted: bool | None = None
    scores: list[MeshScore] | None = None

    def positional(self, output_type: str, with_scores: bool) -> tuple[Any, ...]:
        """
        What a call returns with `return_dict=False`, whose length tells an interrupted call.

        Args:
            output_type: of the call.
            with_scores: whether it has selected among meshes.

        Returns:
            The fields of the output type, `meshes`, `sdfs` or `latents` and `coords`, then `scores` if asked for; None
            in the place of what there is not. True as one more entry if the call was interrupted.
        """
        names = {"mesh": ("meshes",), "sdf": ("sdfs",)}.get(output_type, ("latents", "coords"))
        values = [getattr(self, name) for name in (*names, *(["scores"] if with_scores else []))]
        return (*values, True) if self.interrupted else tuple(values)


def pad_samples(latents: Tensor, coords: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """
    Packed rows as a padded batch.

    Args:
        latents: `[N, C]`.
        coords: `[N, 4]` int32 (sample, x, y, z).
        batch_size: number of samples, B.

    Returns:
        `latents [B, L, C]`, padded with zeros to the L rows of the largest sample, and `coords [B, L, 3]`, padded with
        -1.
    """
    rows = [coords[:, 0] == index for index in range(batch_size)]
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad([latents[r] for r in rows], batch_first=True),
        pad([coords[r, 1:] for r in rows], batch_first=True, padding_value=-1),
    )
