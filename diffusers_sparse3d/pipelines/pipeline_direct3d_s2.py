"""Direct3DS2Pipeline: from an image to a mesh (arXiv 2505.17412)."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
import trimesh
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import Dinov2WithRegistersModel

from ..geometry.clean_up import MeshCleanUp
from ..geometry.marching_cubes import sparse_sdf_to_mesh
from ..geometry.mesh import normalize_mesh
from ..geometry.surface_cells import cells_near_surface
from ..models.autoencoder_dense import DenseVAE
from ..models.autoencoder_sparse import SparseVAE
from ..models.refiner_sdf import SDFRefiner, SDFSignRefiner
from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from ..ops.coordinates import check_coords
from ..sparse_tensor import SparseTensor
from .conditioning import encode_image, sparse_conditioning
from .image_processor import ImageInput, Sparse3DImageProcessor
from .pipeline_output import Direct3DS2PipelineOutput
from .sparse_stage import SparseStage


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> import diffusers_sparse3d
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("checkpoints/direct3d-s2-small")
        >>> mesh = pipe("chair.png", generator=torch.Generator().manual_seed(0)).meshes[0]
        >>> mesh.export("chair.glb")
        ```
"""

SECOND_STAGE = ("vae_1024", "transformer_1024", "scheduler_1024")
OUTPUT_TYPES = ("mesh", "sdf", "latent", "pt")


class Direct3DS2Pipeline(DiffusionPipeline):
    r"""
    Image to mesh: a dense diffusion transformer finds the occupied cells of a coarse grid, a sparse one generates a
    latent for each of them, which the sparse VAE decodes to a signed distance field. With the components of the
    second sparse stage, the cells of a finer grid near that surface are generated and decoded in the same way.

    This model inherits from [`~diffusers.DiffusionPipeline`]; see there for loading, saving, devices and the like.

    Args:
        image_encoder ([`~transformers.Dinov2WithRegistersModel`]): Encoder of the conditioning image.
        dense_vae ([`DenseVAE`]): Decodes dense latents to occupancies.
        dense_transformer ([`DenseDiT`]): Denoises dense latents.
        dense_scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]): Scheduler of the dense stage.
        vae ([`SparseVAE`]): Decodes sparse latents to signed distances.
        transformer ([`SparseDiT`]): Denoises sparse latents.
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]): Scheduler of the sparse stage.
        refiner ([`SDFRefiner`], *optional*): Refines the signed distances of the sparse stage.
        vae_1024, transformer_1024, scheduler_1024 (as `vae`, `transformer`, `scheduler`, *optional*):
            Models of the second sparse stage, all three or none. Its resolution follows from them; the published one
            is 1024.
        refiner_1024 ([`SDFSignRefiner`], *optional*): Refines the signed distances of the second sparse stage.
        background_remover (`Callable`, *optional*):
            Maps an RGB `PIL.Image.Image` to an RGBA image or an "L" mask, for example `rembg.remove`; for images
            without alpha. Not saved.
        default_dense_num_inference_steps, default_num_inference_steps, default_num_inference_steps_1024 (`int`):
            Steps of the stages where a call does not say; by default the published 50, 30 and 15. These and the
            following are saved in `model_index.json`, so that every checkpoint carries the settings that suit it.
        default_dense_guidance_scale, default_guidance_scale, default_guidance_scale_1024 (`float`):
            Guidance scales of the stages where a call does not say; by default the published 7.
        occupancy_threshold (`float`, defaults to `0.1`): Probability from which a cell is occupied.
        default_level (`float`, defaults to `0.0`):
            Iso-level of marching cubes where a call does not say, in units of the narrow band: 0 is the surface
            itself, the published code takes 0.2.
    """

    __module__ = "diffusers_sparse3d"  # as of the components
    model_cpu_offload_seq = (
        "image_encoder->dense_transformer->dense_vae->transformer->vae->refiner"
        "->transformer_1024->vae_1024->refiner_1024"
    )
    _optional_components = [
        "refiner",
        "vae_1024",
        "transformer_1024",
        "scheduler_1024",
        "refiner_1024",
        "background_remover",
    ]
    _callback_tensor_inputs = ["latents", "encoder_hidden_states"]

    # `Optional`, because diffusers 0.36 cannot read `X | None` from this signature.
    def __init__(
        self,
        image_encoder: Dinov2WithRegistersModel,
        dense_vae: DenseVAE,
        dense_transformer: DenseDiT,
        dense_scheduler: FlowMatchEulerDiscreteScheduler,
        vae: SparseVAE,
        transformer: SparseDiT,
        scheduler: FlowMatchEulerDiscreteScheduler,
        refiner: Optional[SDFRefiner] = None,  # noqa: UP045
        vae_1024: Optional[SparseVAE] = None,  # noqa: UP045
        transformer_1024: Optional[SparseDiT] = None,  # noqa: UP045
        scheduler_1024: Optional[FlowMatchEulerDiscreteScheduler] = None,  # noqa: UP045
        refiner_1024: Optional[SDFSignRefiner] = None,  # noqa: UP045
        background_remover: Optional[Callable] = None,  # noqa: UP045
        default_dense_num_inference_steps: int = 50,
        default_num_inference_steps: int = 30,
        default_dense_guidance_scale: float = 7.0,
        default_guidance_scale: float = 7.0,
        occupancy_threshold: float = 0.1,
        default_level: float = 0.0,
        default_num_inference_steps_1024: int = 15,
        default_guidance_scale_1024: float = 7.0,
    ):
        super().__init__()
        self.register_modules(
            image_encoder=image_encoder,
            dense_vae=dense_vae,
            dense_transformer=dense_transformer,
            dense_scheduler=dense_scheduler,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            refiner=refiner,
            vae_1024=vae_1024,
            transformer_1024=transformer_1024,
            scheduler_1024=scheduler_1024,
            refiner_1024=refiner_1024,
            background_remover=background_remover,
        )
        self.register_to_config(
            default_dense_num_inference_steps=default_dense_num_inference_steps,
            default_num_inference_steps=default_num_inference_steps,
            default_dense_guidance_scale=default_dense_guidance_scale,
            default_guidance_scale=default_guidance_scale,
            occupancy_threshold=occupancy_threshold,
            default_level=default_level,
            default_num_inference_steps_1024=default_num_inference_steps_1024,
            default_guidance_scale_1024=default_guidance_scale_1024,
        )
        self.image_processor = Sparse3DImageProcessor(
            image_size=image_encoder.config.image_size, patch_size=image_encoder.config.patch_size
        )

    @property
    def sparse_stages(self) -> list[SparseStage]:
        """The sparse stage and, if all its components are there, the second one."""
        stages = [SparseStage("sparse", "", self.transformer, self.scheduler, self.vae, self.refiner)]
        second = (self.transformer_1024, self.scheduler_1024, self.vae_1024)
        if None not in second:
            stages.append(SparseStage("sparse_1024", "_1024", *second, self.refiner_1024))
        return stages

    @property
    def resolutions(self) -> tuple[int, ...]:
        """What a call can be asked for: the resolutions of the sparse stages, in samples per axis."""
        return tuple(stage.resolution for stage in self.sparse_stages)

    @property
    def resolution(self) -> int:
        """Resolution that a call generates unless told otherwise: that of the last stage there is."""
        return self.resolutions[-1]

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the stage that runs."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def stage(self) -> str | None:
        """ "dense", "sparse" or "sparse_1024" while that stage denoises, for callbacks; else None."""
        return self._stage

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the stage that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        Write `model_index.json`, the last step of [`~diffusers.DiffusionPipeline.save_pretrained`], with a
        `pipeline.py` that makes `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline",
        trust_remote_code=True)` work in code that does not import this package.

        Where the image encoder is saved already, its configuration then asks for float32, as diffusers loads the
        other models where no `torch_dtype` is given: transformers would take the dtype of the file.
        """
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "w", encoding="utf-8") as file:
            file.write("from diffusers_sparse3d import Direct3DS2Pipeline  # noqa: F401\n")
        encoder_config = Path(save_directory, "image_encoder", "config.json")
        if encoder_config.exists():
            config = json.loads(encoder_config.read_text(encoding="utf-8"))
            config["dtype"] = "float32"
            encoder_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        super().save_config(save_directory, *args, **kwargs)

    def check_inputs(
        self,
        resolution: int | None,
        dense_num_inference_steps: int,
        num_inference_steps: int,
        num_inference_steps_1024: int,
        num_meshes_per_image: int,
        output_type: str,
        level: float,
        dense_latents: Tensor | None,
        coords: Tensor | None,
        latents: Tensor | None,
        coords_1024: Tensor | None,
        latents_1024: Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises ValueErrors for arguments of `__call__` that do not depend on the images."""
        resolutions = self.resolutions
        if resolution not in (None, *resolutions):
            message = f"`resolution` must be one of {list(resolutions)}, which the stages generate, not {resolution}"
            missing = [name for name in SECOND_STAGE if getattr(self, name) is None]
            if missing:
                message += (
                    f". The second stage lacks {', '.join(f'`{name}`' for name in missing)}: load a checkpoint that"
                    " has them, or give them to `from_pretrained`"
                )
            raise ValueError(message)
        if len(resolutions) == 2 and resolutions[1] <= resolutions[0]:
            raise ValueError(
                f"`transformer_1024` and `vae_1024` give {resolutions[1]}^3 samples, not more than the"
                f" {resolutions[0]}^3 of the first stage: these components do not belong together"
            )
        if coords_1024 is not None and (len(resolutions) == 1 or resolution == resolutions[0]):
            raise ValueError("`coords_1024` need the second stage: its components, and its `resolution`")
        cells = self.dense_transformer.config.sample_size * self.dense_vae.spatial_compression_ratio
        if coords is None and coords_1024 is None and cells != self.transformer.config.sample_size:
            raise ValueError(
                f"`dense_vae` gives a grid of {cells}^3 cells, but `transformer` works on a grid of"
                f" {self.transformer.config.sample_size}^3: these components do not belong together"
            )
        for name, steps in (
            ("dense_num_inference_steps", dense_num_inference_steps),
            ("num_inference_steps", num_inference_steps),
            ("num_inference_steps_1024", num_inference_steps_1024),
            ("num_meshes_per_image", num_meshes_per_image),
        ):
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"`{name}` must be a positive integer, not {steps!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, not {output_type!r}")
        if not 0 <= level <= 0.2:
            raise ValueError(f"`level` must be between 0 and 0.2, in units of the narrow band, not {level}")
        if coords is not None and dense_latents is not None:
            raise ValueError("`coords` skip the dense stage, which `dense_latents` belong to: give one of the two")
        if coords_1024 is not None and (coords is not None or dense_latents is not None):
            raise ValueError(
                "`coords_1024` skip the stages before, which `dense_latents` and `coords` belong to: give one of them"
            )
        for suffix, given in (("", (latents, coords)), ("_1024", (latents_1024, coords_1024))):
            if given[0] is not None and given[1] is None:
                raise ValueError(f"`latents{suffix}` need `coords{suffix}`, the cells that their rows belong to")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, but found {unknown}"
            )

    def encode_image(
        self, pixel_values: Tensor, mask: Tensor, num_meshes_per_image: int = 1
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Conditioning of the dense and the (first) sparse stage, as keyword arguments of their transformers.

        Args:
            pixel_values: `[B, 3, S, S]` and
            mask: `[B, 1, S, S]`, from the image processor.
            num_meshes_per_image: how often to repeat the tokens of each image.

        Raises:
            ValueError: if an image has no foreground.
        """
        tokens, mask = self._image_tokens(pixel_values, mask, num_meshes_per_image)
        dense = {"encoder_hidden_states": tokens.to(self.dense_transformer.dtype)}
        return dense, self.prepare_sparse_conditioning(tokens, mask, self.transformer)

    def _image_tokens(self, pixel_values: Tensor, mask: Tensor, num_meshes_per_image: int) -> tuple[Tensor, Tensor]:
        """All tokens `[B, L, D]` and masks `[B, 1, S, S]`, those of an image once for each of its meshes."""
        tokens = encode_image(self.image_encoder, pixel_values)
        return tuple(tensor.repeat_interleave(num_meshes_per_image, dim=0) for tensor in (tokens, mask))

    def prepare_sparse_conditioning(self, tokens: Tensor, mask: Tensor, transformer: SparseDiT) -> dict[str, Tensor]:
        """Keyword arguments of a sparse transformer from all tokens `[B, L, D]` and the masks `[B, 1, S, S]`."""
        tokens = tokens.to(transformer.dtype)
        if not transformer.config.sparse_conditioning:
            return {"encoder_hidden_states": tokens}
        patch_size = self.image_encoder.config.patch_size
        num_prefix_tokens = tokens.shape[1] - (mask.shape[-1] // patch_size) ** 2
        packed, coords = sparse_conditioning(tokens, mask, patch_size, num_prefix_tokens)
        return {"encoder_hidden_states": packed, "encoder_coords": coords}

    def prepare_dense_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `[B, C, r, r, r]` of the dense stage, or the given `dense_latents`."""
        config = self.dense_transformer.config
        shape = (batch_size, config.in_channels, *(config.sample_size,) * 3)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"`dense_latents` must have shape {list(shape)}, not {list(latents.shape)}")
        return latents.to(device=device, dtype=dtype)

    def decode_dense_latents(self, latents: Tensor) -> Tensor:
        """
        Occupied cells `[N, 4]` int32 (image, x, y, z), ascending, of normalised dense latents `[B, C, r, r, r]`.

        Raises:
            ValueError: if no cell of a sample is occupied.
        """
        config = self.dense_vae.config
        latents = latents.to(self.dense_vae.dtype) / config.scaling_factor + config.shift_factor
        logits = self.dense_vae.decode(latents, return_dict=False)[0]
        occupied = logits[:, 0].float().sigmoid() >= self.config.occupancy_threshold
        empty = (~occupied.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"The dense stage left no occupied cell for {empty} (index in the batch). Try another seed of"
                " `generator`, more `dense_num_inference_steps`, a `dense_guidance_scale` closer to the default, or an"
                " `image` that shows the object larger and whole."
            )
        return occupied.nonzero().int()

    def find_cells(
        self, latents: Tensor, coords: Tensor, batch_size: int, level: float, clean_up: MeshCleanUp
    ) -> Tensor:
        """
        Cells `[N, 4]` int32 of the second stage, ascending: those with a sample in the narrow band of the surface of
        the first stage, normalised.

        Args:
            latents: `[M, C]`, normalised, of the first stage, and
            coords: `[M, 4]` int32, their cells.
            level: iso-level of the surface.
            clean_up: what to remove from the surface beforehand.

        Raises:
            ValueError: if a sample has no surface.
        """
        first, second = self.sparse_stages
        meshes = self._decode(first, latents, coords, batch_size, level)
        meshes = [clean_up.remove_parts(mesh) for mesh in meshes]
        empty = [index for index, mesh in enumerate(meshes) if len(mesh.faces) == 0]
        if empty:
            raise ValueError(
                f"The first sparse stage left no surface for {empty} (index in the batch). Try another seed of"
                " `generator`, more `num_inference_steps` or a `guidance_scale` closer to the default."
            )
        cells = []
        for index, mesh in enumerate(meshes):
            mesh, _, _ = normalize_mesh(mesh)
            cell_size = second.vae.spatial_compression_ratio
            near = cells_near_surface(mesh, second.resolution, cell_size, device=coords.device)
            cells.append(torch.nn.functional.pad(near, (1, 0), value=index))
        return torch.cat(cells)

    def _decode(
        self, stage: SparseStage, latents: Tensor, coords: Tensor, batch_size: int, level: float | None
    ) -> list[trimesh.Trimesh] | list[SparseTensor]:
        """The mesh of every sample at `level`, or its signed distances if there is no `level`."""
        results = []
        with self.progress_bar(total=batch_size) as progress_bar:
            progress_bar.set_description(f"Decoding {stage.resolution}^3")
            for index in range(batch_size):
                result = stage.decode_latents(latents, coords, index)
                if level is not None:
                    level_of_stage = stage.iso_level(level)
                    result = sparse_sdf_to_mesh(result.feats, result.coords, stage.resolution, level_of_stage)
                results.append(result)
                progress_bar.update()
        return results

    def _denoise(
        self,
        stage: str,
        transformer: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latents: Tensor,
        conditioning: dict[str, Any],
        batch_size: int,
        num_inference_steps: int,
        guidance_scale: float,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> Tensor:
        """The denoising loop of one stage; classifier-free guidance takes zeros as the unconditional tokens."""
        self._stage, self._guidance_scale = stage, guidance_scale
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        scheduler.set_begin_index(0)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)
        conditioning = {**conditioning, "attention_kwargs": attention_kwargs, "return_dict": False}

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            progress_bar.set_description(f"{stage.replace('_', ' ').capitalize()} stage")
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                timestep = t.expand(batch_size)
                with transformer.cache_context("cond"):
                    noise_pred = transformer(latents, timestep=timestep, **conditioning)[0]
                if self.do_classifier_free_guidance:
                    zeros = torch.zeros_like(conditioning["encoder_hidden_states"])
                    with transformer.cache_context("uncond"):
                        noise_pred_uncond = transformer(
                            latents, timestep=timestep, **{**conditioning, "encoder_hidden_states": zeros}
                        )[0]
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred - noise_pred_uncond)

                latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "encoder_hidden_states": conditioning["encoder_hidden_states"]}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    conditioning["encoder_hidden_states"] = callback_outputs.pop(
                        "encoder_hidden_states", conditioning["encoder_hidden_states"]
                    )
                progress_bar.update()
        self._stage = None
        return latents

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: ImageInput | list[ImageInput],
        mask_image: ImageInput | list[ImageInput] | None = None,
        resolution: int | None = None,
        dense_num_inference_steps: int | None = None,
        num_inference_steps: int | None = None,
        dense_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        num_meshes_per_image: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        dense_latents: Tensor | None = None,
        coords: Tensor | None = None,
        latents: Tensor | None = None,
        level: float | None = None,
        output_type: str = "mesh",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        num_inference_steps_1024: int | None = None,
        guidance_scale_1024: float | None = None,
        coords_1024: Tensor | None = None,
        latents_1024: Tensor | None = None,
        remove_inner_parts: bool = False,
        remove_floaters: bool = False,
        fill_holes: bool = False,
        num_faces: int | None = None,
    ) -> Direct3DS2PipelineOutput | tuple:
        r"""
        Generate a mesh for every image.

        Args:
            image (`PIL.Image.Image`, `str`, `np.ndarray`, `torch.Tensor` or a list of these):
                One picture of each object, RGBA or with a plain background. Arrays are `[H, W, C]` or `[B, H, W, C]`,
                tensors `[C, H, W]` or `[B, C, H, W]`, uint8 or floating point in [0, 1].
            mask_image (as `image`, *optional*): Masks of the objects, white on the object.
            resolution (`int`, *optional*):
                Resolution of the signed distance field, one of `pipeline.resolutions`, for example 512 or 1024: which
                stage is the last. Without it, all stages run that there are components for.
            dense_num_inference_steps (`int`, *optional*): Denoising steps of the dense stage.
            num_inference_steps (`int`, *optional*): Denoising steps of the sparse stage.
            dense_guidance_scale (`float`, *optional*): Guidance scale of the dense stage; none up to 1.
            guidance_scale (`float`, *optional*): Guidance scale of the sparse stage; none up to 1.
            num_meshes_per_image (`int`, defaults to `1`): How many meshes to make of each image.
            generator (`torch.Generator` or a list of these, *optional*):
                Makes the result deterministic; with a list, one for each mesh, a mesh does not depend on the batch.
            dense_latents (`torch.Tensor` of shape `(B, C, r, r, r)`, *optional*): Noise of the dense stage.
            coords (`torch.Tensor` of shape `(N, 4)`, int32, *optional*):
                Cells (mesh in the batch, x, y, z) of the latent grid to generate in; skips the dense stage.
            latents (`torch.Tensor` of shape `(N, C)`, *optional*): Noise of the sparse stage, for `coords`.
            level (`float`, *optional*): Iso-level of the surface, from 0 to 0.2, in units of the narrow band.
            output_type (`str`, defaults to `"mesh"`):
                "mesh", "sdf", "latent" (packed rows) or "pt" (padded); see [`Direct3DS2PipelineOutput`].
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple of its fields.
            attention_kwargs (`dict`, *optional*): Passed to all transformers; `scale` is the LoRA scale.
            callback_on_step_end (`Callable`, *optional*):
                Called after every step of all stages as `callback(pipeline, step, timestep, callback_kwargs)`; the
                step counts within the stage, which is `pipeline.stage`. Returns a dict of the tensors to replace.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds: "latents" (`[B, C, r, r, r]` in the dense stage, `[N, C]` in the sparse
                ones) and "encoder_hidden_states".
            num_inference_steps_1024 (`int`, *optional*): Denoising steps of the second sparse stage.
            guidance_scale_1024 (`float`, *optional*): Guidance scale of the second sparse stage; none up to 1.
            coords_1024 (`torch.Tensor` of shape `(N, 4)`, int32, *optional*):
                Cells (mesh in the batch, x, y, z) of the second sparse stage; skips the stages before. Those of a mesh
                of one's own come from [`~geometry.surface_cells.cells_near_surface`].
            latents_1024 (`torch.Tensor` of shape `(N, C)`, *optional*): Noise of that stage, for `coords_1024`.
            remove_inner_parts (`bool`, defaults to `False`):
                Remove parts of the surface that lie inside of another; after the first sparse stage too, so that the
                second one spends nothing on them. This and the following are for meshes and need the extra `mesh`.
            remove_floaters (`bool`, defaults to `False`):
                Remove parts smaller than 5 % of the longest side of the whole; likewise after the first stage.
            fill_holes (`bool`, defaults to `False`): Close what the surface leaves open.
            num_faces (`int`, *optional*): Simplify the mesh to this many triangles.

        Examples:

        Returns:
            [`Direct3DS2PipelineOutput`] or `tuple`.

        Raises:
            ValueError: for an image without (known) foreground, a stage that leaves nothing, a `resolution` that the
                components do not give, or an argument that does not fit; the message says what to do.
            ImportError: if a library for the clean-up of meshes is missing.
        """
        # 1. Settings of the checkpoint where the call does not say
        config = self.config
        if dense_num_inference_steps is None:
            dense_num_inference_steps = config.default_dense_num_inference_steps
        if num_inference_steps is None:
            num_inference_steps = config.default_num_inference_steps
        if num_inference_steps_1024 is None:
            num_inference_steps_1024 = config.default_num_inference_steps_1024
        if dense_guidance_scale is None:
            dense_guidance_scale = config.default_dense_guidance_scale
        if guidance_scale is None:
            guidance_scale = config.default_guidance_scale
        if guidance_scale_1024 is None:
            guidance_scale_1024 = config.default_guidance_scale_1024
        if level is None:
            level = config.default_level
        clean_up = MeshCleanUp(remove_inner_parts, remove_floaters, fill_holes, num_faces)
        self._interrupt = False
        self.check_inputs(
            resolution,
            dense_num_inference_steps,
            num_inference_steps,
            num_inference_steps_1024,
            num_meshes_per_image,
            output_type,
            level,
            dense_latents,
            coords,
            latents,
            coords_1024,
            latents_1024,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        callback = {
            "attention_kwargs": attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }

        # 2. Image tokens
        pixel_values, mask = self.image_processor.preprocess(image, mask_image, self.background_remover)
        batch_size = len(pixel_values) * num_meshes_per_image
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)} for a batch of {batch_size} meshes")
        tokens, mask = self._image_tokens(pixel_values.to(device), mask.to(device), num_meshes_per_image)
        stages = [stage for stage in self.sparse_stages if resolution is None or stage.resolution <= resolution]
        conditioning = {
            stage.name: self.prepare_sparse_conditioning(tokens, mask, stage.transformer) for stage in stages
        }

        # 3. Dense stage: the occupied cells, if there are no given ones
        if coords_1024 is not None:
            stages, coords, latents = stages[1:], coords_1024, latents_1024
        if coords is not None:
            coords = coords.to(device)
            name = f"coords{stages[0].suffix}"
            check_coords(coords, stages[0].latent_resolution, name)
            if coords[:, 0].unique().tolist() != list(range(batch_size)):
                raise ValueError(
                    f"`{name}` must hold cells of each of the {batch_size} meshes, told apart by column 0"
                )
        else:
            dense_latents = self.prepare_dense_latents(
                batch_size, self.dense_transformer.dtype, device, generator, dense_latents
            )
            dense_latents = self._denoise(
                "dense",
                self.dense_transformer,
                self.dense_scheduler,
                dense_latents,
                {"encoder_hidden_states": tokens.to(self.dense_transformer.dtype)},
                batch_size,
                dense_num_inference_steps,
                dense_guidance_scale,
                **callback,
            )
            coords = self.decode_dense_latents(dense_latents)

        # 4. Sparse stages: the latents of the cells, then of the cells of the finer grid near their surface
        settings = {
            "sparse": (num_inference_steps, guidance_scale),
            "sparse_1024": (num_inference_steps_1024, guidance_scale_1024),
        }
        for stage in stages:
            if stage is not stages[0]:
                coords = self.find_cells(latents, coords, batch_size, level, clean_up)
                latents = None
            latents = stage.prepare_latents(coords, generator, latents)
            latents = self._denoise(
                stage.name,
                stage.transformer,
                stage.scheduler,
                latents,
                stage.transformer_arguments(coords, conditioning[stage.name], batch_size),
                batch_size,
                *settings[stage.name],
                **callback,
            )
            # The surface of a stage that was stopped half-way may fill the grid: no cells from it.
            if self.interrupt:
                break

        # 5. Output
        if output_type == "latent":
            output = Direct3DS2PipelineOutput(latents=latents, coords=coords)
        elif output_type == "pt":
            rows = [coords[:, 0] == index for index in range(batch_size)]
            pad = torch.nn.utils.rnn.pad_sequence
            output = Direct3DS2PipelineOutput(
                latents=pad([latents[r] for r in rows], batch_first=True),
                coords=pad([coords[r, 1:] for r in rows], batch_first=True, padding_value=-1),
            )
        elif output_type == "sdf":
            output = Direct3DS2PipelineOutput(sdfs=self._decode(stage, latents, coords, batch_size, None))
        else:
            meshes = self._decode(stage, latents, coords, batch_size, level)
            output = Direct3DS2PipelineOutput(meshes=[clean_up(mesh) for mesh in meshes])

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return output.to_tuple()
        return output
