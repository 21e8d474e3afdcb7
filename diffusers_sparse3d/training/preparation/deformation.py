"""One of many shapes that are made of a mesh: the mesh stretched, bent, mirrored and turned."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import trimesh

from ...geometry.mesh import NORMALIZED_SCALE, normalize_mesh
from ...geometry.rasterized_distance import split_triangles
from ...geometry.render import Surface


# Longest side of triangles that are bent, in model space: at a bend of 0.2 its middle is at most 0.003 off the curve.
BENT_SIDE = 0.25


@dataclass(frozen=True)
class Deformation:
    """Points p of the model cube become `matrix (p + (b_0 y^2, 0, b_1 y^2))`, then the whole is normalised again.

    Attributes:
        matrix: `[3, 3]` float64.
        bend: `[2]` float64, b.
    """

    matrix: np.ndarray
    bend: np.ndarray

    def points(self, points: np.ndarray) -> np.ndarray:
        """Returns where points `[..., 3]` go, float64, not normalised."""
        height = points[..., 1:2].astype(np.float64) ** 2
        shift = np.concatenate([self.bend[0] * height, np.zeros_like(height), self.bend[1] * height], axis=-1)
        return (points + shift) @ self.matrix.T

    def normals(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Returns the unit normals `[..., 3]` float64 of a deformed surface, from points and normals before it."""
        # By the transpose of the inverse of the derivative: of the bend, then of the matrix.
        x, y, z = np.moveaxis(normals.astype(np.float64), -1, 0)
        slope = 2 * points[..., 1]
        straight = np.stack([x, y - slope * (self.bend[0] * x + self.bend[1] * z), z], axis=-1)
        turned = straight @ np.linalg.inv(self.matrix)
        return turned / np.maximum(np.linalg.norm(turned, axis=-1, keepdims=True), 1e-20)

    def mesh(self, mesh: trimesh.Trimesh) -> trimesh.Trimesh:
        """Returns a deformed copy of a mesh in any units, in the model cube."""
        normalized, _, _ = normalize_mesh(mesh)
        vertices, faces = np.asarray(normalized.vertices), np.asarray(normalized.faces)
        if self.bend.any():
            pieces = split_triangles(torch.from_numpy(vertices[faces]), BENT_SIDE)[0].numpy()
            vertices, faces = pieces.reshape(-1, 3), np.arange(3 * len(pieces)).reshape(-1, 3)
        if np.linalg.det(self.matrix) < 0:
            faces = faces[:, ::-1]
        return normalize_mesh(trimesh.Trimesh(self.points(vertices), faces, process=False))[0]

    def surface(self, surface: Surface) -> Surface:
        """Returns a deformed copy of a surface in the model cube."""
        if self.bend.any():
            surface = _with_short_sides(surface)
        normals = self.normals(surface.triangles, surface.normals).astype(np.float32)
        triangles = self.points(surface.triangles)
        center, scale = _fit(triangles)
        triangles = ((triangles - center) * scale).astype(np.float32)
        return replace(surface, triangles=triangles, normals=normals)

    def points_like(self, points: np.ndarray, mesh: trimesh.Trimesh) -> np.ndarray:
        """Returns where points `[P, 3]` of a mesh in the model cube go, float32, normalised with the mesh."""
        center, scale = _fit(self.points(np.asarray(mesh.vertices)))
        return ((self.points(points) - center) * scale).astype(np.float32)


def _fit(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The middle of the bounding box of points `[..., 3]`, and the scale with which its longest side is 1.9."""
    low, high = (np.array([extreme(axis) for axis in np.moveaxis(points, -1, 0)]) for extreme in (np.min, np.max))
    return (low + high) / 2, float(2 * NORMALIZED_SCALE / (high - low).max())


def _with_short_sides(surface: Surface) -> Surface:
    """A surface whose triangles are cut until no side is longer than `BENT_SIDE`."""
    columns = (surface.triangles, surface.normals, surface.colors, surface.uvs)
    corners = np.concatenate([column.astype(np.float32) for column in columns], axis=2)
    pieces, owner = split_triangles(torch.from_numpy(corners), BENT_SIDE)
    triangles, normals, colors, uvs = np.split(pieces.numpy(), [3, 6, 10], axis=2)
    texture_index = surface.texture_index[owner.numpy()]
    return Surface(triangles, normals, colors, uvs, texture_index, surface.textures)
