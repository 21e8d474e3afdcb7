"""
The nodes. Pictures and masks are ComfyUI's: `IMAGE [B, H, W, 3]` and `MASK [B, H, W]`, floating point in [0, 1].

Of a batch, the first picture counts. Meshes have the type `TRIMESH`, as in other packs: a `trimesh.Trimesh`, y up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trimesh
from PIL import Image

from diffusers_sparse3d.cli.models import check_device, load_pipeline, resolve_loras, resolve_model
from diffusers_sparse3d.cli.parser import DTYPES, MESH_FORMATS
from diffusers_sparse3d.geometry.cavities import MAX_OPENING, fill_cavities
from diffusers_sparse3d.geometry.clean_up import MeshCleanUp
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import export_mesh, normalize_mesh
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface
from diffusers_sparse3d.pipelines.background import DEFAULT_NETWORK, BackgroundRemover
from diffusers_sparse3d.pipelines.inputs import stage_setting
from diffusers_sparse3d.pipelines.stages import SparseStage
from diffusers_sparse3d.sparse_tensor import SparseTensor


CATEGORY = "3d/sparse3d"
SEED = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True})
STEPS = ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: as the model asks"})
GUIDANCE = (
    "FLOAT",
    {"default": 0.0, "min": 0.0, "max": 30.0, "step": 0.1, "tooltip": "0: the model's own; 1: none"},
)


@dataclass(frozen=True)
class Cells:
    """
    Where the sparse stage generates, and for which picture.

    Attributes:
        coords: `[N, 4]` int32, (0, x, y, z).
        picture: RGB.
        mask: "L", white on the object.
    """

    coords: torch.Tensor
    picture: Image.Image
    mask: Image.Image


@dataclass(frozen=True)
class Distances:
    """
    A sparse signed distance field, and how its model has the surface taken.

    Attributes:
        sdf: s / tau, positive outside, with batch index 0.
        resolution: samples per axis.
        level_factor: of iso-levels: 2 after a refiner of distances.
        default_level: iso-level of the surface where the user asks for none.
        default_max_opening: width of the openings of cavities that are filled, likewise.
    """

    sdf: SparseTensor
    resolution: int
    level_factor: float
    default_level: float
    default_max_opening: float

    @classmethod
    def of_stage(cls, pipe: Any, stage: SparseStage, sdf: SparseTensor) -> Distances:
        """The distances that a sparse stage of a pipeline has made."""
        config = pipe.config
        return cls(sdf, stage.resolution, stage.iso_level(1.0), config.default_level, config.default_max_opening)


def to_picture(image: torch.Tensor) -> Image.Image:
    """The first picture of a batch `[B, H, W, 3]`, RGB."""
    return Image.fromarray((image[0, ..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy())


def to_mask(mask: torch.Tensor) -> Image.Image:
    """The first mask of a batch `[B, H, W]`, or of one `[H, W]`, mode "L"."""
    mask = mask[0] if mask.ndim == 3 else mask
    return Image.fromarray((mask.clamp(0, 1) * 255).round().byte().cpu().numpy())


def from_mask(mask: Image.Image) -> torch.Tensor:
    """A batch `[1, H, W]` of one mask."""
    pixels = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, mask.height, mask.width).float() / 255


def step_callback(steps: int) -> Callable[..., None]:
    """A callback of the pipeline that moves ComfyUI's progress bar and obeys its button "Cancel"."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:  # outside of ComfyUI
        return lambda *_: None
    bar = ProgressBar(steps)

    def on_step(*_: Any) -> None:
        throw_exception_if_processing_interrupted()
        bar.update(1)

    return on_step


def settings_of(pipe: Any, stage: str, steps: int, guidance_scale: float) -> tuple[int, float]:
    """Steps and guidance scale of a stage, the model's own where they are 0."""
    return (
        steps or stage_setting(pipe.config, stage, "num_inference_steps"),
        guidance_scale or stage_setting(pipe.config, stage, "guidance_scale"),
    )


class Sparse3DLoadPipeline:
    """Loads a pipeline."""

    TITLE = "Load Sparse3D pipeline"
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("SPARSE3D_PIPELINE",)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = "folder, owner/name on the Hub, or empty for the small pipeline of the checkout"
        lora = "LoRA weights, one on each line: file, folder or owner/name on the Hub, with :WEIGHT behind it if not 1"
        return {
            "required": {
                "model": ("STRING", {"default": "", "tooltip": text}),
                "dtype": (list(DTYPES), {"default": "float32"}),
                "low_memory": ("BOOLEAN", {"default": False, "tooltip": "offload models, work in tiles"}),
            },
            "optional": {"lora": ("STRING", {"default": "", "multiline": True, "tooltip": lora})},
        }

    def load(self, model: str, dtype: str, low_memory: bool, lora: str = "") -> tuple[Any]:
        loras = resolve_loras(line.strip() for line in lora.splitlines() if line.strip())
        return (load_pipeline(resolve_model(model.strip() or None), check_device(None), dtype, low_memory, loras),)


class Sparse3DRemoveBackground:
    """Finds the mask of the object in a photo."""

    TITLE = "Remove background (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "remove"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "mask")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        network = ("STRING", {"default": DEFAULT_NETWORK, "tooltip": "of the installed rembg"})
        return {"required": {"image": ("IMAGE",), "network": network}}

    def remove(self, image: torch.Tensor, network: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The first picture on white, and its mask, white on the object."""
        mask = from_mask(BackgroundRemover(network)(to_picture(image))).to(image)
        on_white = image[:1, ..., :3] * mask[..., None] + (1 - mask[..., None])
        return on_white, mask


class Sparse3DImageToCells:
    """The dense stage: the cells of a coarse grid that the object occupies."""

    TITLE = "Image to cells (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("SPARSE3D_CELLS",)
    RETURN_NAMES = ("cells",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": ("SPARSE3D_PIPELINE",),
                "image": ("IMAGE",),
                "mask": ("MASK", {"tooltip": "white on the object; ComfyUI's Load Image gives it inverted"}),
                "seed": SEED,
                "steps": STEPS,
                "guidance_scale": GUIDANCE,
            }
        }

    @torch.no_grad()
    def generate(
        self, pipeline: Any, image: torch.Tensor, mask: torch.Tensor, seed: int, steps: int, guidance_scale: float
    ) -> tuple[Cells]:
        picture, mask_picture = to_picture(image), to_mask(mask)
        pixel_values, foreground = pipeline.image_processor.preprocess([picture], [mask_picture])
        stage, device = pipeline.dense_stage, pipeline._execution_device
        steps, guidance_scale = settings_of(pipeline, "dense", steps, guidance_scale)
        conditioning = pipeline.encode_image(pixel_values.to(device), foreground.to(device), stages=[stage])[0]
        generator = torch.Generator().manual_seed(seed)
        noise = stage.prepare_latents(1, device, generator)
        settings = {"callback_on_step_end": step_callback(steps), "generator": generator}
        latents = pipeline.denoise(stage, noise, conditioning, 1, steps, guidance_scale, **settings)
        cells = stage.find_cells(latents)
        pipeline.maybe_free_model_hooks()
        return (Cells(cells, picture, mask_picture),)


class Sparse3DCellsToSDF:
    """The sparse stage: signed distances in the cells."""

    TITLE = "Cells to SDF (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("SPARSE3D_SDF",)
    RETURN_NAMES = ("sdf",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": ("SPARSE3D_PIPELINE",),
                "cells": ("SPARSE3D_CELLS",),
                "seed": SEED,
                "steps": STEPS,
                "guidance_scale": GUIDANCE,
            }
        }

    def generate(self, pipeline: Any, cells: Cells, seed: int, steps: int, guidance_scale: float) -> tuple[Distances]:
        steps, guidance_scale = settings_of(pipeline, "sparse", steps, guidance_scale)
        stage = pipeline.sparse_stages[0]
        sdf = pipeline(
            cells.picture,
            mask_image=cells.mask,
            coords=cells.coords,
            resolution=stage.resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="sdf",
            callback_on_step_end=step_callback(steps),
        ).sdfs[0]
        return (Distances.of_stage(pipeline, stage, sdf),)


class Sparse3DRefine:
    """The second sparse stage: signed distances on a finer grid near a mesh of the first."""

    TITLE = "Refine mesh to finer SDF (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("SPARSE3D_SDF",)
    RETURN_NAMES = ("sdf",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = Sparse3DCellsToSDF.INPUT_TYPES()["required"]
        return {"required": {"mesh": ("TRIMESH",), **inputs}}

    def generate(
        self, mesh: trimesh.Trimesh, pipeline: Any, cells: Cells, seed: int, steps: int, guidance_scale: float
    ) -> tuple[Distances]:
        if len(pipeline.sparse_stages) < 2:
            raise ValueError("This pipeline has no second sparse stage: use the mesh as it is.")
        stage = pipeline.sparse_stages[1]
        steps, guidance_scale = settings_of(pipeline, stage.name, steps, guidance_scale)
        near = cells_near_surface(normalize_mesh(mesh)[0], stage.resolution, stage.vae.spatial_compression_ratio)
        sdf = pipeline(
            cells.picture,
            mask_image=cells.mask,
            coords_1024=torch.nn.functional.pad(near, (1, 0)),
            num_inference_steps_1024=steps,
            guidance_scale_1024=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="sdf",
            callback_on_step_end=step_callback(steps),
        ).sdfs[0]
        return (Distances.of_stage(pipeline, stage, sdf),)


class Sparse3DSDFToMesh:
    """Marching cubes, after cavities are filled as the pipeline fills them."""

    TITLE = "SDF to mesh (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "extract"
    RETURN_TYPES = ("TRIMESH",)
    RETURN_NAMES = ("mesh",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = {"default": -1.0, "min": -1.0}
        level = {"max": 0.2, "step": 0.01, "tooltip": "-1: the model's own; more is thicker"}
        text = "what openings up to this width lead to becomes solid; -1: the model's own; 0: nothing"
        opening = {"max": MAX_OPENING, "step": 0.0125, "round": False, "tooltip": text}
        return {
            "required": {"sdf": ("SPARSE3D_SDF",), "level": ("FLOAT", {**own, **level})},
            # Workflows from before there was this input go on working.
            "optional": {"max_opening": ("FLOAT", {**own, **opening})},
        }

    def extract(self, sdf: Distances, level: float, max_opening: float = -1.0) -> tuple[trimesh.Trimesh]:
        level = sdf.level_factor * (sdf.default_level if level < 0 else level)
        max_opening = sdf.default_max_opening if max_opening < 0 else max_opening
        rows = fill_cavities(sdf.sdf.feats, sdf.sdf.coords, sdf.resolution, level, max_opening)
        mesh = sparse_sdf_to_mesh(*rows, sdf.resolution, level)
        if len(mesh.faces) == 0:
            raise ValueError("There is no surface: try another seed or level.")
        return (mesh,)


class Sparse3DCleanUp:
    """Removes and closes what a mesh should not have, and simplifies it."""

    TITLE = "Clean up mesh (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "clean"
    RETURN_TYPES = ("TRIMESH",)
    RETURN_NAMES = ("mesh",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        faces = ("INT", {"default": 0, "min": 0, "max": 100_000_000, "tooltip": "triangles to keep; 0: all"})
        return {
            "required": {
                "mesh": ("TRIMESH",),
                "remove_inner_parts": ("BOOLEAN", {"default": False}),
                "remove_floaters": ("BOOLEAN", {"default": True}),
                "fill_holes": ("BOOLEAN", {"default": False}),
                "num_faces": faces,
            }
        }

    def clean(
        self, mesh: trimesh.Trimesh, remove_inner_parts: bool, remove_floaters: bool, fill_holes: bool, num_faces: int
    ) -> tuple[trimesh.Trimesh]:
        return (MeshCleanUp(remove_inner_parts, remove_floaters, fill_holes, num_faces or None)(mesh),)


class Sparse3DSaveMesh:
    """Writes a mesh into ComfyUI's output folder."""

    TITLE = "Save mesh (Sparse3D)"
    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "mesh": ("TRIMESH",),
                "filename_prefix": ("STRING", {"default": "mesh/sparse3d"}),
                "format": (list(MESH_FORMATS), {"default": "glb"}),
                "up_axis": (["y", "z"], {"default": "y"}),
            }
        }

    def save(self, mesh: trimesh.Trimesh, filename_prefix: str, format: str, up_axis: str) -> dict[str, Any]:
        import folder_paths

        output = folder_paths.get_output_directory()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, output)
        path = export_mesh(mesh, Path(folder) / f"{name}_{counter:05}_.{format}", up_axis)
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {"ui": {"3d": [shown]}, "result": (str(path),)}


NODES = (
    Sparse3DLoadPipeline,
    Sparse3DRemoveBackground,
    Sparse3DImageToCells,
    Sparse3DCellsToSDF,
    Sparse3DRefine,
    Sparse3DSDFToMesh,
    Sparse3DCleanUp,
    Sparse3DSaveMesh,
)
