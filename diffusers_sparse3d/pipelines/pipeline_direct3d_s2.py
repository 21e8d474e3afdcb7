"""Direct3DS2Pipeline: from an image to a mesh (arXiv 2505.17412)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from torch import Tensor
from transformers import Dinov2Model, Dinov2WithRegistersModel

from ..checks import check_choice
from ..geometry.clean_up import MeshCleanUp
from ..loaders.lora import Direct3DS2LoraLoaderMixin
from ..models.autoencoder_dense import DenseVAE
from ..models.autoencoder_sparse import SparseVAE
from ..models.refiner_sdf import SDFRefiner, SDFSignRefiner
from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from ..sparse_tensor import CoordinateCache
from .image_processor import ImageInput, Sparse3DImageProcessor
from .inputs import (
    StageInputs,
    check_generator,
    check_hooks,
    check_num_meshes,
    check_output,
    check_stage_inputs,
    check_stages,
    warn_of_slow_dtype,
)
from .memory import MemorySavingMixin
from .pipeline_output import Direct3DS2PipelineOutput
from .saving import SafetensorsLoadingMixin, save_companions
from .selection import check_selection, select_meshes
from .several_pictures import MODES, condition_on_pictures, group_pictures
from .stages import DenseStage, SparseStage, Stage
from .steps import Callback, GenerationSteps, one_call_at_a_time


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


class Direct3DS2Pipeline(Direct3DS2LoraLoaderMixin, MemorySavingMixin, SafetensorsLoadingMixin, GenerationSteps):
    r"""
    Image to mesh: a dense diffusion transformer finds the occupied cells of a coarse grid, a sparse one generates a
    latent for each of them, which the sparse VAE decodes to a signed distance field. With the components of the
    second sparse stage, the cells of a finer grid near that surface are generated and decoded in the same way.

    This model inherits from [`~diffusers.DiffusionPipeline`]; see there for loading, saving, devices and the like.
    LoRA weights of its transformers are loaded, saved, weighted and fused as in diffusers' pipelines, see
    [`~loaders.lora.Direct3DS2LoraLoaderMixin`].

    Args:
        image_encoder ([`~transformers.Dinov2WithRegistersModel`] or [`~transformers.Dinov2Model`]): Encoder of the
            conditioning image.
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
        default_max_opening (`float`, defaults to `0.0`):
            `max_opening` where a call does not say: 0 leaves the surface as it is.
        default_remove_floaters (`bool`, defaults to `False`): `remove_floaters` where a call does not say.
        weights_license (`str`, *optional*):
            Identifier of the licence of the weights, for example "cc-by-sa-4.0", for the model card.
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

    # `Optional` and `Union`, because diffusers 0.36 cannot read `X | None` from this signature.
    def __init__(
        self,
        image_encoder: Union[Dinov2WithRegistersModel, Dinov2Model],  # noqa: UP007
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
        weights_license: Optional[str] = None,  # noqa: UP045
        default_max_opening: float = 0.0,
        default_remove_floaters: bool = False,
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
            weights_license=weights_license,
            default_max_opening=default_max_opening,
            default_remove_floaters=default_remove_floaters,
        )
        self.image_processor = Sparse3DImageProcessor(
            image_size=image_encoder.config.image_size, patch_size=image_encoder.config.patch_size
        )

    @property
    def dense_stage(self) -> DenseStage:
        """The stage that finds the cells of the first sparse stage."""
        return DenseStage(
            self.dense_transformer, self.dense_scheduler, self.dense_vae, self.config.occupancy_threshold
        )

    @property
    def sparse_stages(self) -> list[SparseStage]:
        """The sparse stage and, if all its components are there, the second one."""
        stages = [SparseStage("sparse", self.transformer, self.scheduler, self.vae, self.refiner)]
        if all(getattr(self, name) is not None for name in SECOND_STAGE):
            second = (self.transformer_1024, self.scheduler_1024, self.vae_1024, self.refiner_1024)
            stages.append(SparseStage("sparse_1024", *second))
        return stages

    @property
    def stages(self) -> list[Stage]:
        """The stages that have all their components, in the order of use."""
        return [self.dense_stage, *self.sparse_stages]

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolutions that a call can ask for: those of the sparse stages, in samples per axis."""
        return tuple(stage.resolution for stage in self.sparse_stages)

    @property
    def resolution(self) -> int:
        """Resolution that a call generates unless told otherwise: that of the last stage there is."""
        return self.resolutions[-1]

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write `model_index.json`, the last step of `save_pretrained`, and the files of `save_companions`."""
        save_companions(self, Path(save_directory))
        super().save_config(save_directory, *args, **kwargs)

    @one_call_at_a_time
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: ImageInput | list[ImageInput] | list[list[ImageInput]],
        mask_image: ImageInput | list[ImageInput] | list[list[ImageInput]] | None = None,
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
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        num_inference_steps_1024: int | None = None,
        guidance_scale_1024: float | None = None,
        coords_1024: Tensor | None = None,
        latents_1024: Tensor | None = None,
        remove_inner_parts: bool = False,
        remove_floaters: bool | None = None,
        fill_holes: bool = False,
        num_faces: int | None = None,
        dense_guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_interval_1024: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int | None = None,
        multiple_images: str = "alternate",
        select: str | None = None,
        max_opening: float | None = None,
    ) -> Direct3DS2PipelineOutput | tuple:
        r"""
        Generate a mesh for every image.

        Args:
            image (`PIL.Image.Image`, `str`, `bytes`, file, `np.ndarray`, `torch.Tensor` or a list of these):
                One picture of each object, RGBA or with a plain background. A `str` is a path or a URL, `bytes` and
                open files hold an image file. Arrays are `[H, W, C]` or `[B, H, W, C]`, tensors `[C, H, W]` or
                `[B, C, H, W]`, uint8 or floating point in [0, 1]. A list of lists has several pictures of each
                object: `[[front, side], [front, back]]`.
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
                Schedulers that draw noise at each step draw it from these too, with a list cell by cell.
            dense_latents (`torch.Tensor` of shape `(B, C, r, r, r)`, *optional*): Noise of the dense stage.
            coords (`torch.Tensor` of shape `(N, 4)`, int32, *optional*):
                Cells (mesh in the batch, x, y, z) of the latent grid to generate in; skips the dense stage.
            latents (`torch.Tensor` of shape `(N, C)`, *optional*): Noise of the sparse stage, for `coords`.
            level (`float`, *optional*): Iso-level of the surface, from 0 to 0.2, in units of the narrow band.
            output_type (`str`, defaults to `"mesh"`):
                "mesh", "sdf", "latent" (packed rows) or "pt" (padded); see [`Direct3DS2PipelineOutput`].
            return_dict (`bool`, defaults to `True`):
                Return an output class rather than a tuple: `(meshes,)`, `(meshes, scores)` with `select`, `(sdfs,)` or
                `(latents, coords)`. That of an interrupted call has None where there is nothing, and True at the end.
            attention_kwargs (`dict`, *optional*): Passed to all transformers; `scale` is the LoRA scale.
            callback_on_step_end (`Callable`, *optional*):
                Called after every step of all stages as `callback(pipeline, step, timestep, callback_kwargs)`; the
                step counts within the stage, which is `pipeline.stage`. Returns a dict of the tensors to replace.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds: "latents" (`[B, C, r, r, r]` in the dense stage, `[N, C]` in the sparse
                ones) and "encoder_hidden_states". A [`~diffusers.callbacks.PipelineCallback`] has a list of its own.
            num_inference_steps_1024 (`int`, *optional*): Denoising steps of the second sparse stage.
            guidance_scale_1024 (`float`, *optional*): Guidance scale of the second sparse stage; none up to 1.
            coords_1024 (`torch.Tensor` of shape `(N, 4)`, int32, *optional*):
                Cells (mesh in the batch, x, y, z) of the second sparse stage; skips the stages before. Those of a mesh
                of one's own come from [`~geometry.surface_cells.cells_near_surface`].
            latents_1024 (`torch.Tensor` of shape `(N, C)`, *optional*): Noise of that stage, for `coords_1024`.
            remove_inner_parts (`bool`, defaults to `False`):
                Remove parts of the surface that lie inside of another; after the first sparse stage too, so that the
                second one spends nothing on them. This and the following are for meshes and need the extra `mesh`.
            remove_floaters (`bool`, *optional*):
                Remove parts smaller than 5 % of the longest side of the whole; likewise after the first stage. Needs
                no extra.
            fill_holes (`bool`, defaults to `False`): Close what the surface leaves open.
            num_faces (`int`, *optional*): Simplify the mesh to this many triangles.
            dense_guidance_interval, guidance_interval, guidance_interval_1024 (`tuple[float, float]`):
                The steps of each stage that have guidance, from and up to a share of the steps; by default all. A step
                without guidance takes half the time, see docs/speed_and_memory.md.
            num_images_per_prompt (`int`, *optional*): Another name of `num_meshes_per_image`, as in diffusers.
            multiple_images (`str`, defaults to `"alternate"`):
                For several pictures of an object, with models that were trained with one: "alternate" takes another
                one at each step, and in fewer steps leaves out the last; "average" averages what the transformer
                predicts for each, which takes longer.
            select (`str`, *optional*):
                "best" returns one mesh of each image, that of `num_meshes_per_image` whose silhouette fits the image
                best and which has few loose bodies; "ranked" returns all, the best first. Scores are in the output.
            max_opening (`float`, *optional*):
                Make solid what the surface encloses but for openings up to this width in model space, whose cube is 2
                wide: where a thin surface has holes, its inside would be a second wall. 0 fills nothing. Space that
                is nowhere wider than its opening is left alone. Needs no extra.

        Examples:

        Returns:
            [`Direct3DS2PipelineOutput`] or `tuple`.

        Raises:
            ValueError: for an image without (known) foreground, a stage that leaves nothing of any mesh, a
                `resolution` that the components do not give, or an argument that does not fit; the message says what
                to do.
            TypeError: if an argument is of another type.
            ImportError: if a library for the clean-up of meshes is missing.
            RuntimeError: if the pipeline is running already, in another thread or in a callback.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. The arguments of each stage, with the settings of the checkpoint where the call gives none
        dense = (dense_num_inference_steps, dense_guidance_scale, dense_latents, None, dense_guidance_interval)
        first = (num_inference_steps, guidance_scale, latents, coords, guidance_interval)
        second = (num_inference_steps_1024, guidance_scale_1024, latents_1024, coords_1024, guidance_interval_1024)
        given = {"dense": dense, "sparse": first, "sparse_1024": second}
        inputs = {name: StageInputs.complete(name, self.config, *values) for name, values in given.items()}
        level = self.config.default_level if level is None else level
        max_opening = self.config.default_max_opening if max_opening is None else max_opening
        remove_floaters = self.config.default_remove_floaters if remove_floaters is None else remove_floaters
        clean_up = MeshCleanUp(remove_inner_parts, remove_floaters, fill_holes, num_faces)
        missing = [name for name in SECOND_STAGE if getattr(self, name) is None]
        check_stages(self.dense_stage, self.sparse_stages, missing, resolution, inputs)
        check_stage_inputs(inputs)
        num_meshes_per_image = check_num_meshes(num_meshes_per_image, num_images_per_prompt)
        check_choice("multiple_images", multiple_images, MODES)
        check_hooks(attention_kwargs, callback_on_step_end)
        check_output(output_type, level, max_opening, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_selection(select, output_type)
        device = self._execution_device
        warn_of_slow_dtype(self.transformer.dtype, device)

        # 2. Image -> tokens, for every stage up to the resolution
        pictures, counts = group_pictures(image)
        pixel_values, mask = self.image_processor.preprocess(pictures, mask_image, self.background_remover)
        counts = [1] * len(pixel_values) if counts is None else counts
        batch_size = len(counts) * num_meshes_per_image
        check_generator(generator, batch_size)
        dense_stage = self.dense_stage
        stages = [stage for stage in self.sparse_stages if resolution is None or stage.resolution <= resolution]
        own_cells = [(index, own) for index, s in enumerate(stages) if (own := inputs[s.name].coords) is not None]
        running: list[Stage] = [*stages[own_cells[-1][0] :]] if own_cells else [dense_stage, *stages]
        guided = {name: values.guidance_scale > 1 for name, values in inputs.items()}
        self._compile_kernels(running, batch_size, guided, max_opening)
        encoded = self.encode_image(pixel_values.to(device), mask.to(device), 1, running)
        conditioning = {
            stage.name: condition_on_pictures(
                kwargs, counts, num_meshes_per_image, multiple_images, stage, inputs[stage.name].num_inference_steps
            )
            for stage, kwargs in zip(running, encoded)
        }

        def denoise(stage: Stage, noise: Tensor, transformer_arguments: list[dict[str, Any]]) -> Tensor:
            return self.denoise(
                stage,
                noise,
                transformer_arguments,
                batch_size,
                inputs[stage.name].num_inference_steps,
                inputs[stage.name].guidance_scale,
                attention_kwargs,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                inputs[stage.name].guidance_interval,
                multiple_images,
                generator,
                [count for count in counts for _ in range(num_meshes_per_image)],
            )

        # 3. Dense stage: noise -> dense latents -> occupied cells; given cells take the place of the stages before
        if own_cells:
            start, cells = own_cells[-1]
            stages, cells = stages[start:], cells.to(device)
            stages[0].check_cells(cells, batch_size)
        else:
            noise = dense_stage.prepare_latents(batch_size, device, generator, dense_latents)
            denoised = denoise(dense_stage, noise, conditioning["dense"])
            # The grid of a stage that was stopped half-way is full of noise, and so is its surface: no cells from it.
            stages = [] if self.interrupt else stages
            cells = dense_stage.find_cells(denoised) if stages else torch.empty(0, 4)

        # 4. Sparse stages: noise -> latents of the cells -> surface -> cells of a finer grid near it
        for stage, finer_stage in zip(stages, [*stages[1:], None]):
            noise = stage.prepare_latents(cells.to(device), generator, inputs[stage.name].latents)
            noise, cells = stage.to_transformer(noise), stage.to_transformer(cells)
            cache = CoordinateCache(cells, batch_size)
            arguments = [
                stage.transformer_arguments(cells, kwargs, batch_size, cache) for kwargs in conditioning[stage.name]
            ]
            denoised = denoise(stage, noise, arguments)
            if finer_stage is None or self.interrupt:
                break
            surface = (batch_size, level, clean_up, max_opening)
            cells = self.find_cells(stage, finer_stage, denoised, cells, *surface)

        # 5. Latents -> signed distances -> mesh
        if self.interrupt and (not stages or output_type in ("mesh", "sdf")):
            output = Direct3DS2PipelineOutput(interrupted=True)
        else:
            surface = (batch_size, level, clean_up, max_opening)
            output = self.make_output(output_type, stage, denoised, cells, *surface)
        if select is not None and output.meshes is not None:
            meshes, scores = select_meshes(output.meshes, mask, counts, select)
            output = Direct3DS2PipelineOutput(meshes=meshes, scores=scores)

        # Offload all models
        self.maybe_free_model_hooks()

        return output if return_dict else output.positional(output_type, select is not None)
