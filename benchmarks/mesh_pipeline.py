"""A pipeline that goes on with the cells of a mesh where random weights have found some without a shape.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface
from diffusers_sparse3d.pipelines.stages import DenseStage


class MeshPipeline(Direct3DS2Pipeline):
    """The pipeline, all of whose models run; the cells that the dense stage finds are those of a mesh."""

    # By the resolution of the stage that generates in their cells.
    meshes: dict[int, trimesh.Trimesh]

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of a function that is a step called `name`."""
        return function()

    def cells(self, resolution: int, device: torch.device) -> Tensor:
        """`[N, 4]` int32 cells of the latent grid of a resolution that the narrow band of the mesh touches."""
        return F.pad(cells_near_surface(self.meshes[resolution], resolution, device=device), (1, 0))

    @property
    def dense_stage(self) -> DenseStage:
        """The dense stage; the cells that it finds are those of the mesh."""
        return MeshDenseStage(**vars(super().dense_stage), pipeline=self)


@dataclass(frozen=True)
class MeshDenseStage(DenseStage):
    """Decodes the dense latents, then goes on with the cells of the pipeline's mesh."""

    pipeline: MeshPipeline

    def find_cells(self, latents: Tensor) -> Tensor:
        """`[N, 4]` int32 cells of the mesh."""
        find = super().find_cells
        self.pipeline.measure("dense: decoding", lambda: find(latents))
        resolution = self.pipeline.resolutions[0]
        return self.pipeline.cells(resolution, latents.device)
