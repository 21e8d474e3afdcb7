"""The stages as blocks of diffusers' `ModularPipeline`: run one by one, put together in other ways, or exchanged.

Each block takes what it needs from the state and leaves what it made there: image tokens, cells, latents, meshes.
Their components and settings are those of a saved [`Direct3DS2Pipeline`]; a pipeline of some blocks loads its own.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from transformers import Dinov2WithRegistersModel

from ..checks import check_integer
from ..geometry.clean_up import MeshCleanUp
from ..models.autoencoder_dense import DenseVAE
from ..models.autoencoder_sparse import SparseVAE
from ..models.refiner_sdf import SDFRefiner, SDFSignRefiner
from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from .conditioning import encode_image
from .image_processor import Sparse3DImageProcessor
from .inputs import StageInputs
from .stages import DenseStage, SparseStage, Stage, argument_name
from .steps import GenerationSteps


GENERATOR = InputParam("generator", description="Makes the noise: a generator, or a list with one for each mesh.")
TOKENS = [
    InputParam("image_tokens", required=True, description="`[B, L, D]` tokens of the images."),
    InputParam("image_mask", required=True, description="`[B, 1, S, S]`, 1 on the foreground."),
    InputParam("patch_size", required=True, description="Edge of the image encoder's patches in pixels."),
]


class DecodingStage(SparseStage):
    """A sparse stage without its transformer: the VAE says which resolution it is meant for."""

    @property
    def latent_resolution(self) -> int:
        return self.vae.config.sample_size


def _settings(stage: str) -> list[ConfigSpec]:
    """The settings of a stage in `model_index.json`, with the published values."""
    steps = {"dense": 50, "sparse": 30, "sparse_1024": 15}[stage]
    return [
        ConfigSpec("default_" + argument_name(stage, "num_inference_steps"), steps),
        ConfigSpec("default_" + argument_name(stage, "guidance_scale"), 7.0),
    ]


def _step_inputs(stage: str) -> list[InputParam]:
    return [
        InputParam(argument_name(stage, "num_inference_steps"), description="Denoising steps; by default the saved."),
        InputParam(argument_name(stage, "guidance_scale"), description="Scale of guidance; by default the saved."),
        InputParam(argument_name(stage, "latents"), description="Noise to start from."),
    ]


def _steps() -> GenerationSteps:
    """The steps of the pipeline, without one: they take all models as arguments."""
    steps = GenerationSteps()
    steps.register_to_config()
    return steps


def _denoise(stage: Stage, noise: Any, arguments: dict[str, Any], batch_size: int, config: Any, state: Any) -> Any:
    """Denoise with the steps and the guidance of the state, or the saved ones."""
    values = {
        name: getattr(state, argument_name(stage.name, name)) for name in ("num_inference_steps", "guidance_scale")
    }
    inputs = StageInputs.complete(stage.name, config, **values, latents=None)
    settings = (inputs.num_inference_steps, inputs.guidance_scale)
    return _steps().denoise(stage, noise, arguments, batch_size, *settings, generator=state.generator)


class EncodeImageStep(ModularPipelineBlocks):
    """Images to tokens, for all stages."""

    model_name = "direct3d-s2"
    description = "Crops the object, puts it on white, and encodes the picture to tokens."
    expected_components: ClassVar = [ComponentSpec("image_encoder", Dinov2WithRegistersModel)]
    inputs: ClassVar = [
        InputParam("image", required=True, description="Pictures, as `Direct3DS2Pipeline` takes them, one an object."),
        InputParam("mask_image", description="Masks of the objects, white on the object."),
        InputParam("num_meshes_per_image", default=1, description="How many meshes to make of each image."),
    ]
    intermediate_outputs: ClassVar = [
        OutputParam("image_tokens", description="`[B, L, D]`."),
        OutputParam("image_mask", description="`[B, 1, S, S]`."),
        OutputParam("patch_size", description="In pixels."),
    ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        config, device = components.image_encoder.config, components._execution_device
        check_integer("num_meshes_per_image", block.num_meshes_per_image, 1)
        processor = Sparse3DImageProcessor(config.image_size, config.patch_size)
        pixel_values, mask = processor.preprocess(block.image, block.mask_image)
        tokens = encode_image(components.image_encoder, pixel_values.to(device))
        block.image_tokens = tokens.repeat_interleave(block.num_meshes_per_image, dim=0)
        block.image_mask = mask.to(device).repeat_interleave(block.num_meshes_per_image, dim=0)
        block.patch_size = config.patch_size
        self.set_block_state(state, block)
        return components, state


class ImageToCellsStep(ModularPipelineBlocks):
    """The dense stage: tokens to the occupied cells of the first sparse stage."""

    model_name = "direct3d-s2"
    description = "Finds the cells of the latent grid that the object occupies."
    expected_components: ClassVar = [
        ComponentSpec("dense_transformer", DenseDiT),
        ComponentSpec("dense_scheduler", FlowMatchEulerDiscreteScheduler),
        ComponentSpec("dense_vae", DenseVAE),
    ]
    expected_configs: ClassVar = [*_settings("dense"), ConfigSpec("occupancy_threshold", 0.1)]
    inputs: ClassVar = [*TOKENS, *_step_inputs("dense"), GENERATOR]
    intermediate_outputs: ClassVar = [OutputParam("coords", description="`[N, 4]` int32 (mesh, x, y, z), ascending.")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        models = (components.dense_transformer, components.dense_scheduler, components.dense_vae)
        stage = DenseStage(*models, components.config.occupancy_threshold)
        batch_size, device = len(block.image_tokens), block.image_tokens.device
        noise = stage.prepare_latents(batch_size, device, block.generator, block.dense_latents)
        conditioning = stage.prepare_conditioning(block.image_tokens, block.image_mask, block.patch_size)
        block.coords = stage.find_cells(_denoise(stage, noise, conditioning, batch_size, components.config, block))
        self.set_block_state(state, block)
        return components, state


class CellsToLatentsStep(ModularPipelineBlocks):
    """A sparse stage: cells and tokens to latents."""

    model_name = "direct3d-s2"
    stage = "sparse"
    description = "Generates a latent for each cell."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec(argument_name(self.stage, "transformer"), SparseDiT),
            ComponentSpec(argument_name(self.stage, "scheduler"), FlowMatchEulerDiscreteScheduler),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return _settings(self.stage)

    @property
    def inputs(self) -> list[InputParam]:
        coords = InputParam(
            argument_name(self.stage, "coords"), required=True, description="`[N, 4]` int32, the cells."
        )
        return [coords, *TOKENS, *_step_inputs(self.stage), GENERATOR]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(argument_name(self.stage, "latents"), description="`[N, C]`, a row for each cell.")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        names = (argument_name(self.stage, name) for name in ("transformer", "scheduler"))
        models: Any = (*(getattr(components, name) for name in names), None, None)
        stage = SparseStage(self.stage, *models)
        batch_size = len(block.image_tokens)
        coords = getattr(block, argument_name(self.stage, "coords")).to(block.image_tokens.device)
        stage.check_cells(coords, batch_size)
        name = argument_name(self.stage, "latents")
        noise = stage.prepare_latents(coords, block.generator, getattr(block, name))
        conditioning = stage.prepare_conditioning(block.image_tokens, block.image_mask, block.patch_size)
        arguments = stage.transformer_arguments(coords, conditioning, batch_size)
        setattr(block, name, _denoise(stage, noise, arguments, batch_size, components.config, block))
        self.set_block_state(state, block)
        return components, state


class LatentsToMeshStep(ModularPipelineBlocks):
    """A sparse stage: latents to signed distances and meshes."""

    model_name = "direct3d-s2"
    stage = "sparse"
    description = "Decodes latents to signed distances, refines them if there is a refiner, and extracts meshes."
    intermediate_outputs: ClassVar = [OutputParam("meshes", description="A trimesh.Trimesh for each object.")]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        refiner = SDFRefiner if self.stage == "sparse" else SDFSignRefiner
        return [
            ComponentSpec(argument_name(self.stage, "vae"), SparseVAE),
            ComponentSpec(argument_name(self.stage, "refiner"), refiner),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [
            ConfigSpec("default_level", 0.0),
            ConfigSpec("default_max_opening", 0.0),
            ConfigSpec("default_remove_floaters", False),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        names = [argument_name(self.stage, name) for name in ("latents", "coords")]
        surface = {
            "level": "Iso-level.",
            "max_opening": "Width of the openings of cavities that are filled.",
            "remove_floaters": "Whether to remove parts smaller than 5 % of the whole.",
        }
        return [
            *(InputParam(name, required=True) for name in names),
            *(InputParam(name, description=description) for name, description in surface.items()),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        stage, latents, coords = self._decoding(components, block)
        batch_size = int(coords[:, 0].max()) + 1
        level, clean_up, max_opening = self._surface(components, block)
        meshes = _steps().extract_meshes(stage, latents, coords, batch_size, level, max_opening)
        block.meshes = [clean_up(mesh) for mesh in meshes]
        self.set_block_state(state, block)
        return components, state

    @staticmethod
    def _surface(components: Any, block: Any) -> tuple[float, MeshCleanUp, float]:
        """`level`, the clean-up and `max_opening`."""

        def value(name: str) -> Any:
            given = getattr(block, name)
            return components.config[f"default_{name}"] if given is None else given

        return value("level"), MeshCleanUp(remove_floaters=value("remove_floaters")), value("max_opening")

    def _decoding(self, components: Any, block: Any) -> tuple[DecodingStage, Any, Any]:
        """The stage, and its latents and cells on the device of the pipeline."""
        vae, refiner = (getattr(components, argument_name(self.stage, name), None) for name in ("vae", "refiner"))
        models: Any = (None, None, vae, refiner)
        device = components._execution_device
        values = (getattr(block, argument_name(self.stage, name)).to(device) for name in ("latents", "coords"))
        return DecodingStage(self.stage, *models), *values


class LatentsToCellsStep(LatentsToMeshStep):
    """Between the sparse stages: latents of the first to the cells of the second, those near the surface."""

    description = "Finds the cells of the second sparse stage, near the surface of the first."
    intermediate_outputs: ClassVar = [OutputParam("coords_1024", description="`[N, 4]` int32, ascending.")]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, ComponentSpec("vae_1024", SparseVAE)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        stage, latents, coords = self._decoding(components, block)
        models: Any = (None, None, components.vae_1024, None)
        finer_stage = DecodingStage("sparse_1024", *models)
        surface = (int(coords[:, 0].max()) + 1, *self._surface(components, block))
        block.coords_1024 = _steps().find_cells(stage, finer_stage, latents, coords, *surface)
        self.set_block_state(state, block)
        return components, state


class SecondCellsToLatentsStep(CellsToLatentsStep):
    """`CellsToLatentsStep` of the second sparse stage."""

    stage = "sparse_1024"


class SecondLatentsToMeshStep(LatentsToMeshStep):
    """`LatentsToMeshStep` of the second sparse stage."""

    stage = "sparse_1024"


class Direct3DS2Blocks(SequentialPipelineBlocks):
    """Image to mesh, by the dense and one sparse stage."""

    model_name = "direct3d-s2"
    block_classes: ClassVar = [EncodeImageStep, ImageToCellsStep, CellsToLatentsStep, LatentsToMeshStep]
    block_names: ClassVar = ["encode", "cells", "latents", "mesh"]
    description = "Image to mesh: tokens, cells, latents, signed distances."


class Direct3DS2TwoStageBlocks(SequentialPipelineBlocks):
    """Image to mesh, by the dense and both sparse stages."""

    model_name = "direct3d-s2"
    block_classes: ClassVar = [
        *Direct3DS2Blocks.block_classes[:3],
        LatentsToCellsStep,
        SecondCellsToLatentsStep,
        SecondLatentsToMeshStep,
    ]
    block_names: ClassVar = ["encode", "cells", "latents", "cells_1024", "latents_1024", "mesh"]
    description = "Image to mesh with a second sparse stage near the surface of the first."


def load_modular_pipeline(blocks: ModularPipelineBlocks, folder: str | os.PathLike, **kwargs: Any) -> ModularPipeline:
    """
    A modular pipeline of some blocks, with their components from a saved pipeline.

    `blocks.init_pipeline(folder)` and `load_components()` do the same, and report components that the folder does not
    have, such as refiners, as errors.

    Args:
        blocks: one of this module or several, in a `SequentialPipelineBlocks`, with others between them perhaps.
        folder: of a saved [`Direct3DS2Pipeline`], or its name on the Hub.
        kwargs: to `load_components`, for example `dtype`.

    Returns:
        The pipeline, whose call takes the inputs of the blocks and returns the state, or the `output` asked for.

    Raises:
        ValueError: if the folder lacks a component that is no refiner.
    """
    index = DiffusionPipeline.load_config(folder)
    names = [spec.name for spec in blocks.expected_components]
    present = [name for name in names if index.get(name, (None, None))[0] is not None]
    missing = [name for name in names if name not in present and not name.startswith("refiner")]
    if missing:
        raise ValueError(f"`folder` must have the components of all blocks, but {folder} has no {', '.join(missing)}")
    pipeline = blocks.init_pipeline(str(folder))
    pipeline.load_components(names=present, **kwargs)
    return pipeline
