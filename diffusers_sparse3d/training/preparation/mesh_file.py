"""The file of a mesh, read once for all shapes that are made of it."""

from collections.abc import Sequence
from functools import cached_property

import torch
import trimesh

from ...geometry.mesh import load_mesh, normalize_mesh
from ...geometry.outer_points import OuterPoints, outer_surface_points
from ...geometry.render import UP_ROTATIONS, Surface, load_surface
from .index import MeshEntry


class MeshFile:
    """The mesh of a file, in the forms that records need; each is made when it is first needed.

    Args:
        entry: The mesh, or one of its shapes.
    """

    def __init__(self, entry: MeshEntry):
        self.path, self.up_axis = entry.mesh, entry.up_axis
        self._surfaces: dict[tuple[float, ...], Surface] = {}
        self._outer: dict[int, OuterPoints] = {}

    @cached_property
    def mesh(self) -> trimesh.Trimesh:
        """The triangles in the units of the file, y up."""
        mesh = load_mesh(self.path)
        mesh.vertices = mesh.vertices @ UP_ROTATIONS[self.up_axis].T
        return mesh

    @cached_property
    def normalized(self) -> trimesh.Trimesh:
        """The triangles in the model cube."""
        return normalize_mesh(self.mesh)[0]

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def surface(self, base_color: Sequence[float]) -> Surface:
        """Returns the triangles with materials, in the model cube; parts without one have `base_color`."""
        key = tuple(base_color)
        if key not in self._surfaces:
            # Each shape may have a colour of its own; one surface at a time is enough.
            self._surfaces = {key: load_surface(self.path, self.up_axis, base_color)}
        return self._surfaces[key]

    def outer_points(self, resolution: int, device: torch.device | str) -> OuterPoints:
        """Returns points on the outer surface, in the model cube, as an SDF of a resolution sees it."""
        if resolution not in self._outer:
            self._outer[resolution] = outer_surface_points(self.normalized, resolution, device=device)
        return self._outer[resolution]
