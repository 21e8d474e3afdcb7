"""
Several surfaces in one set of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..surface import Surface


# A surface lets all light pass where its opacity is less than this, and none where it is more. Materials of OBJ files
# have 0.35 at least, see `surface.py`, so that no part vanishes for them.
CUTOUT_OPACITY = 0.3


@dataclass(frozen=True)
class PackedSurfaces:
    """
    The T triangles of S surfaces, one surface after the other, with K textures.

    Attributes:
        triangles: `[T, 3, 3]` float32, corner positions in model space.
        normals: `[T, 3, 3]` float32, unit normals of the corners, of either orientation.
        colors: `[T, 3, 4]` float32, linear RGB and opacity of the corners.
        uvs: `[T, 3, 2]` float32, texture coordinates of the corners.
        texture: `[T]` int64, the row of the texture, -1 for none.
        has_holes: `[T]` bool, whether a triangle may be transparent somewhere.
        texels: `[X, 4]` float32, the pixels of all textures, linear RGB and opacity.
        texture_start: `[K]` int64, the first texel of each texture.
        texture_size: `[K, 2]` int64, width and height of each.
        start: `[S]` int64, the first triangle of each surface.
        count: `[S]` int64, its number of triangles.
        radius: `[S]` float32, that of its bounding sphere around the origin.
        is_plain: `[S]` bool, whether it is of one colour.
    """

    triangles: Tensor
    normals: Tensor
    colors: Tensor
    uvs: Tensor
    texture: Tensor
    has_holes: Tensor
    texels: Tensor
    texture_start: Tensor
    texture_size: Tensor
    start: Tensor
    count: Tensor
    radius: Tensor
    is_plain: Tensor

    def __len__(self) -> int:
        return len(self.start)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.triangles.device

    @classmethod
    def pack(cls, surfaces: Sequence[Surface], device: torch.device | str = "cpu") -> PackedSurfaces:
        """
        The surfaces, packed.

        Args:
            surfaces: of `load_surface`, in model space.
            device: the device of the tensors.

        Raises:
            ValueError: if there is no surface, or one has no triangle or corners that are not finite.
        """
        if not surfaces or not all(len(surface.triangles) for surface in surfaces):
            counts = [len(surface.triangles) for surface in surfaces]
            raise ValueError(f"`surfaces` must hold surfaces with triangles, got numbers of triangles {counts}")
        if not all(np.isfinite(surface.triangles).all() for surface in surfaces):
            raise ValueError("`surfaces` must have finite corners, got NaN or infinity")
        textures = [texture for surface in surfaces for texture in surface.textures]
        shapes = torch.tensor([texture.shape[1::-1] for texture in textures], dtype=torch.int64).reshape(-1, 2)
        # The last texel is for triangles without a texture.
        texels = [texture.reshape(-1, 4) for texture in textures] + [np.ones((1, 4), np.float32)]
        rows, holes, first = [], [], 0
        for surface in surfaces:
            index = surface.texture_index.astype(np.int64)
            rows.append(np.where(index < 0, -1, index + first))
            lowest = [texture[..., 3].min() for texture in surface.textures] + [1.0]
            holes.append(surface.colors[..., 3].min(axis=1) * np.array(lowest)[index] < CUTOUT_OPACITY)
            first += len(surface.textures)

        def joined(arrays: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays)).to(device)

        count = torch.tensor([len(surface.triangles) for surface in surfaces])
        pixels = shapes.prod(1)
        return cls(
            triangles=joined([surface.triangles for surface in surfaces]),
            normals=joined([surface.normals for surface in surfaces]),
            colors=joined([surface.colors.astype(np.float32) for surface in surfaces]),
            uvs=joined([surface.uvs for surface in surfaces]),
            texture=joined(rows),
            has_holes=joined(holes),
            texels=joined(texels),
            texture_start=(pixels.cumsum(0) - pixels).to(device),
            texture_size=shapes.to(device),
            start=(count.cumsum(0) - count).to(device),
            count=count.to(device),
            radius=torch.tensor([_radius(surface) for surface in surfaces], device=device),
            is_plain=torch.tensor([_is_plain(surface) for surface in surfaces], device=device),
        )

    def instances(self, surface: Tensor) -> tuple[Tensor, Tensor]:
        """
        The triangles of the surfaces of some pictures, one picture after the other.

        Args:
            surface: `[B]` int64, the surface that each picture shows.

        Returns:
            The picture and the triangle of each instance, `[N]` int64 each.
        """
        count = self.count[surface]
        picture = torch.arange(len(surface), device=self.device).repeat_interleave(count)
        shift = self.start[surface] - (count.cumsum(0) - count)
        return picture, torch.arange(len(picture), device=self.device) + shift[picture]


def _radius(surface: Surface) -> float:
    return float(np.linalg.norm(surface.triangles, axis=-1).max())


def _is_plain(surface: Surface) -> bool:
    colors = surface.colors[..., :3]
    return not surface.textures and bool((colors == colors[0, 0]).all())
