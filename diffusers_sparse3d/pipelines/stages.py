"""The stages of the pipeline: the models of each, the noise it starts from, and the way from its latents onward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.autoencoder_dense import DenseVAE
from ..models.autoencoder_sparse import SparseVAE
from ..models.input_checks import check_finite
from ..models.refiner_sdf import SDFRefiner, SDFSignRefiner
from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from ..ops.checks import check_floating
from ..ops.coordinates import check_coords
from ..sparse_tensor import CoordinateCache, SparseTensor
from .conditioning import sparse_conditioning
from .guards import report_empty, warn_of_full_grid, warn_of_memory


# The names of a stage's arguments and settings: `dense_latents`, `latents`, `latents_1024`.
ARGUMENT_FORMATS = {"dense": "dense_{}", "sparse": "{}", "sparse_1024": "{}_1024"}


def argument_name(stage: str, name: str) -> str:
    """The argument of the pipeline that is called `name` in the stage called `stage`."""
    return ARGUMENT_FORMATS[stage].format(name)


def compute_device(model: torch.nn.Module, default: torch.device) -> torch.device:
    """Where a model computes: by its hook, if offloading or a `device_map` has placed it, else `default`."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return default if device is None else torch.device(device)


def compute_dtype(model: ModelMixin) -> torch.dtype:
    """The dtype that a model computes in: `model.dtype`, or in a quantised one that of its first whole layer.

    `model.dtype` of a quantised model may be that of a bias beside a quantised weight, which bitsandbytes changes at
    the first call.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own and all(type(weight) is torch.nn.Parameter and weight.is_floating_point() for weight in own):
                return own[0].dtype
    return model.dtype


@dataclass(frozen=True)
class DenseStage:
    """
    The models that generate a dense latent grid and decode it to the occupied cells of the first sparse stage.

    Attributes:
        transformer: denoises latents `[B, C, r, r, r]`.
        scheduler: its scheduler.
        vae: decodes the latents to occupancy logits `[B, 1, R, R, R]`.
        occupancy_threshold: probability from which a cell is occupied.
    """

    name: ClassVar[str] = "dense"

    transformer: DenseDiT
    scheduler: FlowMatchEulerDiscreteScheduler
    vae: DenseVAE
    occupancy_threshold: float

    @property
    def resolution(self) -> int:
        """Cells per axis of the occupancy grid, R."""
        return self.transformer.config.sample_size * self.vae.spatial_compression_ratio

    def prepare_conditioning(self, tokens: Tensor, mask: Tensor, patch_size: int) -> dict[str, Tensor]:
        """Keyword arguments of the transformer: all tokens `[B, L, D]` of the images in its dtype."""
        return {"encoder_hidden_states": tokens.to(compute_dtype(self.transformer))}

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `[B, C, r, r, r]` in the transformer's dtype, or the given latents.

        Raises:
            ValueError: if the given latents have another shape or are not finite.
        """
        config, dtype = self.transformer.config, compute_dtype(self.transformer)
        shape = (batch_size, config.in_channels, *(config.sample_size,) * 3)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        check_floating(dense_latents=latents)
        if latents.shape != shape:
            raise ValueError(f"`dense_latents` must have shape {list(shape)}, got {list(latents.shape)}")
        latents = latents.to(device=device, dtype=dtype)
        check_finite(latents, "dense_latents")
        return latents

    def find_cells(self, latents: Tensor) -> Tensor:
        """
        Occupied cells `[N, 4]` int32 (sample, x, y, z), ascending, of normalised latents `[B, C, r, r, r]`.

        A warning names samples without any.

        Raises:
            ValueError: if no cell of any sample is occupied, or the latents are not finite.
        """
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        if not torch.isfinite(latents).all():
            raise ValueError("The dense stage gave latents that are not finite: are its weights damaged or too large?")
        logits = self.vae.decode(latents.to(compute_device(self.vae, latents.device)), return_dict=False)[0]
        occupied = logits[:, 0].float().sigmoid() >= self.occupancy_threshold
        empty = (~occupied.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        report_empty(
            empty,
            len(occupied),
            "The dense stage left no occupied cell for {} (index in the batch). Try another seed of `generator`, more"
            " `dense_num_inference_steps`, a `dense_guidance_scale` closer to the default, or an `image` that shows"
            " the object larger and whole.",
        )
        cells = occupied.nonzero().int()
        warn_of_full_grid(cells, occupied.shape[-1])
        return cells


@dataclass(frozen=True)
class SparseStage:
    """
    The models that generate a latent for each of a set of cells and decode the latents to signed distances.

    Attributes:
        name: "sparse", or "sparse_1024" for the second one.
        transformer: denoises latents `[N, C]` at cells `[N, 4]`.
        scheduler: its scheduler.
        vae: decodes the latents to signed distances, 512 samples a cell.
        refiner: corrects the decoded signed distances, or None.
    """

    name: str
    transformer: SparseDiT
    scheduler: FlowMatchEulerDiscreteScheduler
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
        """Whether the refiner is one of distances, [`SDFRefiner`], which takes the features of the decoder too."""
        return self.refiner is not None and "feature_channels" in self.refiner.config

    def iso_level(self, level: float) -> float:
        """The level of the surface in the decoded field: after a refiner of distances it is twice as high."""
        return 2 * level if self.refiner_takes_features else level

    def prepare_conditioning(self, tokens: Tensor, mask: Tensor, patch_size: int) -> dict[str, Tensor]:
        """
        Keyword arguments of the transformer.

        Args:
            tokens: `[B, L, D]`, all tokens of the images.
            mask: `[B, 1, S, S]`, foreground where positive.
            patch_size: edge of the image encoder's patches in pixels.

        Returns:
            `encoder_hidden_states`, and with sparse conditioning the tokens of the foreground alone, packed
            `[M, D]`, and their `encoder_coords [M, 4]` int32.

        Raises:
            ValueError: if an image has no foreground.
        """
        tokens = tokens.to(compute_dtype(self.transformer))
        if not self.transformer.config.sparse_conditioning:
            return {"encoder_hidden_states": tokens}
        num_prefix_tokens = tokens.shape[1] - (mask.shape[-1] // patch_size) ** 2
        packed, coords = sparse_conditioning(tokens, mask, patch_size, num_prefix_tokens)
        return {"encoder_hidden_states": packed, "encoder_coords": coords}

    def check_cells(self, coords: Tensor, batch_size: int) -> None:
        """Check that the `coords` of a call `[N, 4]` are cells of this stage, some for each sample.

        Raises:
            ValueError: if they are not.
        """
        name = argument_name(self.name, "coords")
        check_coords(coords, self.latent_resolution, name)
        if coords[:, 0].unique().tolist() != list(range(batch_size)):
            raise ValueError(f"`{name}` must hold cells of each of the {batch_size} meshes, told apart by column 0")

    def prepare_latents(
        self,
        coords: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `[N, C]` in the transformer's dtype for cells `[N, 4]`, or the given latents.

        Each generator of a list draws the noise of its sample. The noise of a cell does not depend on the order of the
        cells: it is drawn in ascending order.

        Raises:
            ValueError: if the given latents have another shape or are not finite.
        """
        shape = (len(coords), self.transformer.config.in_channels)
        device, dtype = coords.device, compute_dtype(self.transformer)
        if latents is not None:
            name = argument_name(self.name, "latents")
            check_floating(**{name: latents})
            if latents.shape != shape:
                raise ValueError(
                    f"`{name}` must have shape {list(shape)}, a row for each of"
                    f" `{argument_name(self.name, 'coords')}`, got {list(latents.shape)}"
                )
            latents = latents.to(device=device, dtype=dtype)
            check_finite(latents, name)
            return latents
        order = _ascending(coords)
        generators = generator if isinstance(generator, list) else [generator]
        counts = [len(coords)] if len(generators) == 1 else coords[:, 0].bincount(minlength=len(generators)).tolist()
        noise = [
            randn_tensor((count, shape[1]), generator=sample_generator, device=device, dtype=dtype)
            for count, sample_generator in zip(counts, generators)
        ]
        latents = torch.empty(shape, dtype=dtype, device=device)
        latents[order] = torch.cat(noise)
        return latents

    def to_transformer(self, tensor: Tensor) -> Tensor:
        """A tensor where the transformer computes: hooks move tensors, but not caches made of their coordinates."""
        return tensor.to(compute_device(self.transformer, tensor.device))

    def transformer_arguments(
        self,
        coords: Tensor,
        conditioning: Mapping[str, Tensor],
        batch_size: int,
        cache: CoordinateCache | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer that are the same at each step: all but latents and timestep.

        Their caches keep what attention derives from the coordinates, so that it is computed once for all steps. That
        of `coords` is made unless it is given.
        """
        conditioning = {name: tensor.to(coords.device) for name, tensor in conditioning.items()}
        arguments: dict[str, Any] = {
            **conditioning,
            "coords": coords,
            "cache": CoordinateCache(coords, batch_size) if cache is None else cache,
            # Cells were checked, or found by the stage before; values that are not finite show when they are decoded.
            "check_inputs": False,
        }
        if "encoder_coords" in conditioning:
            arguments["encoder_cache"] = CoordinateCache(conditioning["encoder_coords"], batch_size)
        return arguments

    def warn_of_memory(self, coords: Tensor, batch_size: int, copies: int) -> None:
        """Warn if the stage is likely to need more memory than there is: see `guards.warn_of_memory`."""
        counts = coords[:, 0].bincount(minlength=batch_size).tolist()
        warn_of_memory(self.name, self.transformer, self.vae, counts, copies, coords.device)

    def decode_latents(self, latents: Tensor, coords: Tensor, index: int) -> SparseTensor:
        """Signed distances of sample `index`, refined, from the normalised latents of a batch.

        Args:
            latents: `[N, C]` of all samples.
            coords: `[N, 4]` int32, their cells.
            index: which sample to decode.

        Returns:
            s / tau, positive outside: `feats [V, 1]` and `coords [V, 4]`, whose batch index is 0; no rows for a sample
            without cells.
        """
        config = self.vae.config
        rows = coords[:, 0] == index
        if not rows.any():
            return SparseTensor(latents.new_zeros(0, 1, dtype=self.vae.dtype), coords.new_zeros(0, 4))
        device = compute_device(self.vae, latents.device)
        latents = latents[rows].to(device, self.vae.dtype) / config.scaling_factor + config.shift_factor
        coords = F.pad(coords[rows, 1:], (1, 0)).to(device)
        decoded = self.vae.decode(latents, coords, return_features=self.refiner_takes_features)
        if self.refiner is not None:
            device = compute_device(self.refiner, device)
            features = {"features": decoded.features.to(device)} if self.refiner_takes_features else {}
            samples, coords = decoded.sample.to(device), decoded.coords.to(device)
            decoded = self.refiner.refine(samples, coords, resolution=self.resolution, **features)
        return SparseTensor(decoded.sample, decoded.coords)


Stage = DenseStage | SparseStage


def _ascending(coords: Tensor) -> Tensor:
    """The rows `[N]` of cells `[N, 4]` in ascending order of (sample, x, y, z)."""
    side = int(coords.max()) + 1 if len(coords) else 1
    sample, x, y, z = coords.long().unbind(1)
    return (((sample * side + x) * side + y) * side + z).argsort()
