"""
The points of surfaces that the pixels of pictures show.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .depth_buffer import EMPTY
from .packed_surfaces import PackedSurfaces
from .projection import Screen, dot, unit


class Fragments(NamedTuple):
    """
    The n pixels that show something, and what they show.

    Attributes:
        pixel: `[n]` int64, their places in the depth buffer.
        picture: `[n]` int64.
        triangle: `[n]` int64, the triangle of the packed surfaces.
        weights: `[n, 3]`, barycentric coordinates.
        point: `[n, 3]` in model space.
        to_eye: `[n, 3]`, unit vector towards the camera.
        normal: `[n, 3]`, smooth unit normal, turned towards the camera.
        flat: `[n, 3]`, unit normal of the triangle, turned towards the camera.
    """

    pixel: Tensor
    picture: Tensor
    triangle: Tensor
    weights: Tensor
    point: Tensor
    to_eye: Tensor
    normal: Tensor
    flat: Tensor


def visible_fragments(
    surfaces: PackedSurfaces, instance: Tensor, screen: Screen, eyes: Tensor, buffer: Tensor
) -> Fragments:
    """
    The points that pictures show.

    Args:
        surfaces: the surfaces.
        instance: `[N]` int64, the triangle of the surfaces that each triangle of the screen is.
        screen: the screen of the cameras.
        eyes: `[B, 3]`, the positions of the cameras.
        buffer: the depth buffer of the screen.
    """
    pixel = (buffer != EMPTY).nonzero()[:, 0]
    row = buffer[pixel] & 0xFFFFFFFF
    size = screen.size
    places = torch.stack([pixel % size, pixel // size % size], 1) + 0.5
    weights = screen.barycentric(row, places)
    picture, triangle = screen.picture[row], instance[row]
    corners = surfaces.triangles[triangle]
    point = interpolate(weights, corners)
    to_eye = unit(eyes[picture] - point)
    flat = unit(torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    flat = _turned(flat, to_eye)
    normal = interpolate(weights, surfaces.normals[triangle])
    # Normals of opposite orientation cancel each other.
    normal = torch.where(dot(normal, normal)[:, None] < 0.25, flat, unit(normal))
    return Fragments(pixel, picture, triangle, weights, point, to_eye, _turned(normal, flat), flat)


def interpolate(weights: Tensor, values: Tensor) -> Tensor:
    """Values `[n, d]` at barycentric `weights [n, 3]` of triangles with `values [n, 3, d]` at their corners."""
    return sum((weights[:, index, None] * values[:, index] for index in (1, 2)), weights[:, :1] * values[:, 0])


def _turned(normals: Tensor, toward: Tensor) -> Tensor:
    """Normals `[n, 3]`, turned to the side of the directions `toward [n, 3]`."""
    return torch.where((dot(normals, toward) < 0)[:, None], -normals, normals)
