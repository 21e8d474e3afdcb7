"""Direct3DS2Pipeline: from an image to a mesh (arXiv 2505.17412)."""

import os
from collections.abc import Callable
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import Dinov2WithRegistersModel

from ..geometry.marching_cubes import sparse_sdf_to_mesh
from ..models.autoencoder_dense import DenseVAE
from ..models.autoencoder_sparse import SparseVAE
from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from ..ops.coordinates import check_coords
from ..sparse_tensor import SparseTensor
from .conditioning import encode_image, sparse_conditioning
from .image_processor import ImageInput, Sparse3DImageProcessor
from .pipeline_output import Direct3DS2PipelineOutput


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

OUTPUT_TYPES = ("mesh", "sdf", "latent", "pt")


class Direct3DS2Pipeline(DiffusionPipeline):
    r"""
    Image to mesh in two stages: a dense diffusion transformer finds the occupied cells of a coarse grid, a sparse one
    generates a latent for each of them, which the sparse VAE decodes to a signed distance field.

    This model inherits from [`~diffusers.DiffusionPipeline`]; see there for loading, saving, devices and the like.

    Args:
        image_encoder ([`~transformers.Dinov2WithRegistersModel`]): Encoder of the conditioning image.
        dense_vae ([`DenseVAE`]): Decodes dense latents to occupancies.
        dense_transformer ([`DenseDiT`]): Denoises dense latents.
        dense_scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]): Scheduler of the dense stage.
        vae ([`SparseVAE`]): Decodes sparse latents to signed distances.
        transformer ([`SparseDiT`]): Denoises sparse latents.
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]): Scheduler of the sparse stage.
        refiner, vae_1024, transformer_1024, scheduler_1024, refiner_1024 (*optional*):
            Models of the refinement and of the second sparse stage. They are loaded, moved and saved with the
            pipeline, which generates at the resolution of `vae`.
        background_remover (`Callable`, *optional*):
            Maps an RGB `PIL.Image.Image` to an RGBA image or an "L" mask, for example `rembg.remove`; for images
            without alpha. Not saved.
        default_dense_num_inference_steps, default_num_inference_steps (`int`, defaults to `50`, `30`):
            Steps of the two stages where a call does not say. These and the following are saved in
            `model_index.json`, so that every checkpoint carries the settings that suit it.
        default_dense_guidance_scale, default_guidance_scale (`float`, defaults to `7.0`):
            Guidance scales of the two stages where a call does not say.
        occupancy_threshold (`float`, defaults to `0.1`): Probability from which a cell is occupied.
        default_level (`float`, defaults to `0.0`):
            Iso-level of marching cubes where a call does not say, in units of the narrow band: 0 is the surface
            itself, the published code takes 0.2.
    """

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
        refiner: Optional[ModelMixin] = None,  # noqa: UP045
        vae_1024: Optional[SparseVAE] = None,  # noqa: UP045
        transformer_1024: Optional[SparseDiT] = None,  # noqa: UP045
        scheduler_1024: Optional[FlowMatchEulerDiscreteScheduler] = None,  # noqa: UP045
        refiner_1024: Optional[ModelMixin] = None,  # noqa: UP045
        background_remover: Optional[Callable] = None,  # noqa: UP045
        default_dense_num_inference_steps: int = 50,
        default_num_inference_steps: int = 30,
        default_dense_guidance_scale: float = 7.0,
        default_guidance_scale: float = 7.0,
        occupancy_threshold: float = 0.1,
        default_level: float = 0.0,
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
        )
        self.image_processor = Sparse3DImageProcessor(
            image_size=image_encoder.config.image_size, patch_size=image_encoder.config.patch_size
        )

    @property
    def resolution(self) -> int:
        """Resolution of the signed distance field, in samples per axis."""
        return self.transformer.config.sample_size * self.vae.spatial_compression_ratio

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the stage that runs."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def stage(self) -> str | None:
        """ "dense" or "sparse" while that stage denoises, for callbacks; else None."""
        return self._stage

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the stage that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        Save the pipeline, as [`~diffusers.DiffusionPipeline.save_pretrained`] does, with a `pipeline.py` that makes
        `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` work in code that
        does not import this package.
        """
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "w", encoding="utf-8") as file:
            file.write("from diffusers_sparse3d import Direct3DS2Pipeline  # noqa: F401\n")
        super().save_pretrained(save_directory, *args, **kwargs)

    def check_inputs(
        self,
        resolution: int | None,
        dense_num_inference_steps: int,
        num_inference_steps: int,
        num_meshes_per_image: int,
        output_type: str,
        level: float,
        dense_latents: Tensor | None,
        coords: Tensor | None,
        latents: Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises ValueErrors for arguments of `__call__` that do not depend on the images."""
        if resolution not in (None, self.resolution):
            raise ValueError(f"`resolution` must be {self.resolution}, which `vae` generates, not {resolution}")
        cells = self.dense_transformer.config.sample_size * self.dense_vae.spatial_compression_ratio
        if coords is None and cells != self.transformer.config.sample_size:
            raise ValueError(
                f"`dense_vae` gives a grid of {cells}^3 cells, but `transformer` works on a grid of"
                f" {self.transformer.config.sample_size}^3: these components do not belong together"
            )
        for name, steps in (
            ("dense_num_inference_steps", dense_num_inference_steps),
            ("num_inference_steps", num_inference_steps),
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
        if latents is not None and coords is None:
            raise ValueError("`latents` need `coords`, the cells that their rows belong to")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, but found {unknown}"
            )

    def encode_image(
        self, pixel_values: Tensor, mask: Tensor, num_meshes_per_image: int = 1
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Conditioning of the two stages, as keyword arguments of their transformers.

        Args:
            pixel_values: `[B, 3, S, S]` and
            mask: `[B, 1, S, S]`, from the image processor.
            num_meshes_per_image: how often to repeat the tokens of each image.

        Raises:
            ValueError: if an image has no foreground.
        """
        tokens = encode_image(self.image_encoder, pixel_values).repeat_interleave(num_meshes_per_image, dim=0)
        dense = {"encoder_hidden_states": tokens.to(self.dense_transformer.dtype)}
        tokens = tokens.to(self.transformer.dtype)
        if not self.transformer.config.sparse_conditioning:
            return dense, {"encoder_hidden_states": tokens}
        patch_size = self.image_encoder.config.patch_size
        num_prefix_tokens = tokens.shape[1] - (mask.shape[-1] // patch_size) ** 2
        mask = mask.repeat_interleave(num_meshes_per_image, dim=0)
        packed, coords = sparse_conditioning(tokens, mask, patch_size, num_prefix_tokens)
        return dense, {"encoder_hidden_states": packed, "encoder_coords": coords}

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

    def prepare_latents(
        self,
        coords: Tensor,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `[N, C]` of the sparse stage, or the given `latents`; each generator of a list draws for its image."""
        shape = (len(coords), self.transformer.config.in_channels)
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(
                    f"`latents` must have shape {list(shape)}, a row for each of `coords`, not {list(latents.shape)}"
                )
            return latents.to(device=coords.device, dtype=dtype)
        if not isinstance(generator, list):
            return randn_tensor(shape, generator=generator, device=coords.device, dtype=dtype)
        latents = torch.empty(shape, dtype=dtype, device=coords.device)
        for index, sample_generator in enumerate(generator):
            rows = (coords[:, 0] == index).nonzero().flatten()
            latents[rows] = randn_tensor(
                (len(rows), shape[1]), generator=sample_generator, device=coords.device, dtype=dtype
            )
        return latents

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

    def decode_latents(self, latents: Tensor, coords: Tensor, index: int) -> SparseTensor:
        """Signed distances of sample `index`, from the normalised sparse latents `[N, C]` of a batch."""
        config = self.vae.config
        rows = coords[:, 0] == index
        latents = latents[rows].to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        coords = torch.nn.functional.pad(coords[rows, 1:], (1, 0))
        decoded = self.vae.decode(latents, coords)
        return SparseTensor(decoded.sample, decoded.coords)

    def _denoise(
        self,
        stage: str,
        transformer: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latents: Tensor,
        conditioning: dict[str, Tensor],
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
            progress_bar.set_description(f"{stage.capitalize()} stage")
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
    ) -> Direct3DS2PipelineOutput | tuple:
        r"""
        Generate a mesh for every image.

        Args:
            image (`PIL.Image.Image`, `str`, `np.ndarray`, `torch.Tensor` or a list of these):
                One picture of each object, RGBA or with a plain background. Arrays are `[H, W, C]` or `[B, H, W, C]`,
                tensors `[C, H, W]` or `[B, C, H, W]`, uint8 or floating point in [0, 1].
            mask_image (as `image`, *optional*): Masks of the objects, white on the object.
            resolution (`int`, *optional*): Resolution of the signed distance field; that of `vae` if not given.
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
            attention_kwargs (`dict`, *optional*): Passed to both transformers; `scale` is the LoRA scale.
            callback_on_step_end (`Callable`, *optional*):
                Called after every step of both stages as `callback(pipeline, step, timestep, callback_kwargs)`; the
                step counts within the stage, which is `pipeline.stage`. Returns a dict of the tensors to replace.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds: "latents" (`[B, C, r, r, r]` in the dense stage, `[N, C]` in the sparse
                one) and "encoder_hidden_states".

        Examples:

        Returns:
            [`Direct3DS2PipelineOutput`] or `tuple`.

        Raises:
            ValueError: for an image without (known) foreground, a dense stage that leaves nothing, or an argument that
                does not fit; the message says what to do.
        """
        # 1. Settings of the checkpoint where the call does not say
        config = self.config
        if dense_num_inference_steps is None:
            dense_num_inference_steps = config.default_dense_num_inference_steps
        if num_inference_steps is None:
            num_inference_steps = config.default_num_inference_steps
        if dense_guidance_scale is None:
            dense_guidance_scale = config.default_dense_guidance_scale
        if guidance_scale is None:
            guidance_scale = config.default_guidance_scale
        if level is None:
            level = config.default_level
        self._interrupt = False
        self.check_inputs(
            resolution,
            dense_num_inference_steps,
            num_inference_steps,
            num_meshes_per_image,
            output_type,
            level,
            dense_latents,
            coords,
            latents,
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
        dense_conditioning, conditioning = self.encode_image(
            pixel_values.to(device), mask.to(device), num_meshes_per_image
        )

        # 3. Dense stage: the occupied cells
        if coords is None:
            dense_latents = self.prepare_dense_latents(
                batch_size, self.dense_transformer.dtype, device, generator, dense_latents
            )
            dense_latents = self._denoise(
                "dense",
                self.dense_transformer,
                self.dense_scheduler,
                dense_latents,
                dense_conditioning,
                batch_size,
                dense_num_inference_steps,
                dense_guidance_scale,
                **callback,
            )
            coords = self.decode_dense_latents(dense_latents)
        else:
            coords = coords.to(device)
            check_coords(coords, self.transformer.config.sample_size)
            if coords[:, 0].unique().tolist() != list(range(batch_size)):
                raise ValueError(
                    f"`coords` must hold cells of each of the {batch_size} meshes, told apart by column 0"
                )

        # 4. Sparse stage: their latents
        latents = self.prepare_latents(coords, self.transformer.dtype, generator, latents)
        latents = self._denoise(
            "sparse",
            self.transformer,
            self.scheduler,
            latents,
            {"coords": coords, **conditioning},
            batch_size,
            num_inference_steps,
            guidance_scale,
            **callback,
        )

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
        else:
            results = []
            with self.progress_bar(total=batch_size) as progress_bar:
                progress_bar.set_description("Decoding")
                for index in range(batch_size):
                    result = self.decode_latents(latents, coords, index)
                    if output_type == "mesh":
                        result = sparse_sdf_to_mesh(result.feats, result.coords, self.resolution, level)
                    results.append(result)
                    progress_bar.update()
            field = "meshes" if output_type == "mesh" else "sdfs"
            output = Direct3DS2PipelineOutput(**{field: results})

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return output.to_tuple()
        return output
