"""
Triangles on the screens of cameras and of parallel lights.

Sums are written out, not left to matrix products, whose rounding depends on the library and the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..renderer import SENSOR_WIDTH
from .views import Cameras


class Screen(NamedTuple):
    """
    N triangles on the screens of B pictures.

    Attributes:
        corners: `[N, 3, 2]`, right and down in pixels; the centre of the first pixel is (0.5, 0.5).
        nearness: `[N, 3]`, positive, linear on the screen, larger for what is nearer.
        weight: `[N, 3]`, by which barycentric coordinates on the screen are multiplied to become those in space: the
            inverse depth.
        picture: `[N]` int64.
        num_pictures: B.
        size: edge of the pictures in pixels.
    """

    corners: Tensor
    nearness: Tensor
    weight: Tensor
    picture: Tensor
    num_pictures: int
    size: int

    def barycentric(self, triangle: Tensor, places: Tensor) -> Tensor:
        """
        Barycentric coordinates in space, `[n, 3]`, of the points of triangles that are seen at places of the screen.

        Args:
            triangle: `[n]` int64.
            places: `[n, 2]`, right and down in pixels; places outside of their triangle count as its border.
        """
        a, b, c = self.corners[triangle].unbind(1)
        along_b, along_c, offset = b - a, c - a, places - a
        area = cross(along_b, along_c)
        second, third = cross(offset, along_c) / area, cross(along_b, offset) / area
        weights = torch.stack([1 - second - third, second, third], 1).clamp(0, 1) * self.weight[triangle]
        return weights / sum_last(weights)[:, None]


def cross(first: Tensor, second: Tensor) -> Tensor:
    """The cross product `[...]` of vectors `[..., 2]` of the plane."""
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def sum_last(values: Tensor) -> Tensor:
    """The sum over a last axis of a few, from the first to the last."""
    total = values[..., 0]
    for index in range(1, values.shape[-1]):
        total = total + values[..., index]
    return total


def dot(first: Tensor, second: Tensor) -> Tensor:
    """The scalar product over the last axis."""
    return sum_last(first * second)


def unit(vectors: Tensor) -> Tensor:
    """`vectors [..., 3]`, scaled to length 1; those of length 0 stay."""
    return vectors / dot(vectors, vectors).sqrt().clamp(min=1e-20)[..., None]


def camera_axes(azimuth: Tensor, elevation: Tensor, roll: Tensor | None = None) -> Tensor:
    """The right, up and backward unit vectors, `[B, 3, 3]`, of cameras that look at the origin; angles in degrees."""
    azimuth, elevation = azimuth.deg2rad(), elevation.deg2rad()
    zero = torch.zeros_like(azimuth)
    right = torch.stack([azimuth.cos(), zero, -azimuth.sin()], 1)
    level = elevation.cos()
    back = torch.stack([azimuth.sin() * level, elevation.sin(), azimuth.cos() * level], 1)
    up = torch.linalg.cross(back, right)
    if roll is not None:
        cos, sin = roll.deg2rad().cos()[:, None], roll.deg2rad().sin()[:, None]
        right, up = cos * right + sin * up, cos * up - sin * right
    return torch.stack([right, up, back], 1)


def camera_distance(radius: Tensor, focal_mm: Tensor) -> Tensor:
    """The distance `[B]` from which a sphere of `radius [B]` around the origin just fits the sensor."""
    return radius * (1 + (2 * focal_mm / SENSOR_WIDTH).square()).sqrt()


def project(
    triangles: Tensor, picture: Tensor, radius: Tensor, cameras: Cameras, size: int, margin: float
) -> tuple[Screen, Tensor]:
    """
    Triangles as cameras see them, framed: the longer side of each picture's object is centred and as long as the
    picture, but for the margin.

    Args:
        triangles: `[N, 3, 3]` in model space.
        picture: `[N]` int64, the picture of each.
        radius: `[B]`, of the bounding spheres.
        cameras: of the B pictures.
        size: edge of the pictures in pixels.
        margin: width of a picture divided by the longer side of its object.

    Returns:
        The screen, and the positions `[B, 3]` of the cameras.
    """
    axes = camera_axes(cameras.azimuth, cameras.elevation, cameras.roll)
    distance = camera_distance(radius, cameras.focal_mm)
    right, up, back = _coordinates(triangles, axes, picture)
    weight = 1 / (distance[picture, None] - back)
    places = torch.stack([right * weight, -up * weight], 2)
    count = len(radius)
    low, high = _extremes(places, picture, count)
    scale = size / margin / (high - low).amax(1)
    corners = (places - ((low + high) / 2)[picture, None]) * scale[picture, None, None] + size / 2
    screen = Screen(corners, weight * distance[picture, None], weight, picture, count, size)
    return screen, distance[:, None] * axes[:, 2]


def project_parallel(triangles: Tensor, picture: Tensor, radius: Tensor, axes: Tensor, size: int) -> Screen:
    """
    Triangles as distant lights see them, in pictures that the bounding spheres fill.

    Args:
        triangles: `[N, 3, 3]` in model space.
        picture: `[N]` int64, the picture of each.
        radius: `[B]`, of the bounding spheres.
        axes: `[B, 3, 3]`, of `camera_axes`.
        size: edge of the pictures in pixels.
    """
    corners, nearness = parallel_places(triangles, picture, radius, axes, size)
    return Screen(corners, nearness, torch.ones_like(nearness), picture, len(radius), size)


def parallel_places(points: Tensor, picture: Tensor, radius: Tensor, axes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The places `[..., 2]` in pixels and the nearness `[...]`, from 1 to 3, of points: see `project_parallel`."""
    span = 1.02 * radius[picture].reshape(-1, *(1,) * (points.dim() - 2))
    right, up, back = _coordinates(points, axes, picture)
    places = torch.stack([right / span, -up / span], -1)
    return (places + 1) * (size / 2), back / span + 2


def _coordinates(points: Tensor, axes: Tensor, picture: Tensor) -> list[Tensor]:
    """The coordinates `[...]` of `points [..., 3]` along each of three axes of their pictures."""
    shape = (-1, *(1,) * (points.dim() - 2), 3)
    return [dot(points, axes[:, index][picture].reshape(shape)) for index in range(3)]


def _extremes(places: Tensor, picture: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest of `places [N, 3, 2]` in each picture, `[B, 2]` each."""
    index = picture.repeat_interleave(3)[:, None].expand(-1, 2)
    flat = places.reshape(-1, 2)
    low = flat.new_full((count, 2), torch.inf).scatter_reduce(0, index, flat, "amin")
    return low, flat.new_full((count, 2), -torch.inf).scatter_reduce(0, index, flat, "amax")
