"""What the two sparse stages of the pipeline have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.autoencoder_sparse import SparseVAE
from ..models.refiner_sdf import SDFRefiner, SDFSignRefiner
from ..models.transformer_sparse import SparseDiT
from ..sparse_tensor import CoordinateCache, SparseTensor


@dataclass(frozen=True)
class SparseStage:
    """
    The models of one sparse stage, which generates a latent for each of a set of cells and decodes them to signed
    distances.

    Attributes:
        name: "sparse" or "sparse_1024".
        suffix: "" or "_1024", the end of the names of the components and of the arguments of the stage.
        transformer, scheduler, vae: the models.
        refiner: corrects the decoded signed distances, or None.
    """

    name: str
    suffix: str
    transformer: SparseDiT
    scheduler: SchedulerMixin
    vae: SparseVAE
    refiner: SDFRefiner | SDFSignRefiner | None

    @property
    def latent_resolution(self) -> int:
        """Cells per axis."""
        return self.transformer.config.sample_size

    @property
    def resolution(self) -> int:
        """Samples per axis of the signed distance field."""
        return self.latent_resolution * self.vae.spatial_compression_ratio

    @property
    def refiner_takes_features(self) -> bool:
        return self.refiner is not None and "feature_channels" in self.refiner.config

    def iso_level(self, level: float) -> float:
        """The level of the surface in the decoded field: after a refiner of distances it is twice as high."""
        return 2 * level if self.refiner_takes_features else level

    def prepare_latents(
        self,
        coords: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `[N, C]` for cells `[N, 4]`, or the given latents; each generator of a list draws for its sample."""
        shape = (len(coords), self.transformer.config.in_channels)
        device, dtype = coords.device, self.transformer.dtype
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(
                    f"`latents{self.suffix}` must have shape {list(shape)}, a row for each of `coords{self.suffix}`,"
                    f" not {list(latents.shape)}"
                )
            latents = latents.to(device=device, dtype=dtype)
            if not torch.isfinite(latents).all():
                raise ValueError(f"`latents{self.suffix}` has values that are not finite")
            return latents
        if not isinstance(generator, list):
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = torch.empty(shape, dtype=dtype, device=device)
        for index, sample_generator in enumerate(generator):
            rows = (coords[:, 0] == index).nonzero().flatten()
            latents[rows] = randn_tensor((len(rows), shape[1]), generator=sample_generator, device=device, dtype=dtype)
        return latents

    def transformer_arguments(
        self, coords: Tensor, conditioning: dict[str, Tensor], batch_size: int
    ) -> dict[str, Tensor | CoordinateCache | bool]:
        """What the transformer takes at each step beside latents and timestep: attention is planned once for all."""
        arguments = {**conditioning, "coords": coords, "cache": CoordinateCache(coords, batch_size)}
        if "encoder_coords" in conditioning:
            arguments["encoder_cache"] = CoordinateCache(conditioning["encoder_coords"], batch_size)
        # Cells were checked, or found by the stage before; values that are not finite show when they are decoded.
        return {**arguments, "check_inputs": False}

    def decode_latents(self, latents: Tensor, coords: Tensor, index: int) -> SparseTensor:
        """Signed distances of sample `index`, refined, from the normalised latents `[N, C]` of a batch."""
        config = self.vae.config
        rows = coords[:, 0] == index
        latents = latents[rows].to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        coords = F.pad(coords[rows, 1:], (1, 0))
        decoded = self.vae.decode(latents, coords, return_features=self.refiner_takes_features)
        if self.refiner is not None:
            features = {"features": decoded.features} if self.refiner_takes_features else {}
            decoded = self.refiner.refine(decoded.sample, decoded.coords, resolution=self.resolution, **features)
        return SparseTensor(decoded.sample, decoded.coords)
