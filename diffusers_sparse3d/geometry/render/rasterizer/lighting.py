"""
The light on points of surfaces: a main light with shadows, one from the other side, and light from all around.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .depth_buffer import depth_buffer, nearness_of
from .fragments import Fragments
from .projection import camera_axes, dot, parallel_places, project_parallel, unit
from .views import Cameras, LightSettings


# Edges of the pictures of what a light reaches, in pixels: the main one and those of the surroundings.
KEY_SIZE, AMBIENT_SIZE = 192, 64
# How much nearer to the light something must be to cast a shadow, in radii.
KEY_BIAS, AMBIENT_BIAS = 0.02, 0.05
# Distance of the points that are looked up from the surface, which must not shade itself.
OFFSET = 0.01
# Azimuth, relative to the camera's, and elevation of the light from all around, in degrees.
AMBIENT_DIRECTIONS = ((34.0, 69.0), (155.0, 29.0), (275.0, 29.0), (214.0, 6.0), (315.0, 0.0))
FILL_STRENGTH, FILL_ELEVATION = 0.12, 11.0

# The share of light that reaches fragments: of the axes of a light, the edge of its picture, and the bias.
Visibility = Callable[[Tensor, int, float], Tensor]


def received_light(
    triangles: Tensor,
    picture: Tensor,
    radius: Tensor,
    fragments: Fragments,
    cameras: Cameras,
    lights: LightSettings,
) -> tuple[Tensor, Tensor]:
    """
    The light on fragments.

    Args:
        triangles: `[N, 3, 3]` in model space, which cast shadows.
        picture: `[N]` int64, the picture of each.
        radius: `[B]`, of the bounding spheres.
        fragments: the n points.
        cameras, lights: of the B pictures.

    Returns:
        The diffuse light, by which the colour is multiplied, and the highlight, which is added; `[n]` each.
    """
    at, normal = fragments.picture, fragments.normal

    def visible(axes: Tensor, size: int, bias: float) -> Tensor:
        screen = project_parallel(triangles, picture, radius, axes, size)
        nearness = nearness_of(depth_buffer(screen, tile_size=4))
        points = fragments.point + OFFSET * fragments.flat
        places, near = parallel_places(points, at, radius, axes, size)
        return _share_in_light(nearness, at, places, near + bias, size)

    toward = camera_axes(cameras.azimuth + lights.key[:, 0], lights.key[:, 1])
    reached = 1 - lights.shadow[at] * (1 - visible(toward, KEY_SIZE, KEY_BIAS))
    key = toward[:, 2][at]
    cosine = dot(normal, key).clamp(min=0)
    halfway = dot(normal, unit(key + fragments.to_eye)).clamp(min=0)
    highlight = lights.specular[at] * halfway ** lights.gloss[at] * reached * (cosine > 0)
    fill = camera_axes(cameras.azimuth - lights.key[:, 0], torch.full_like(cameras.azimuth, FILL_ELEVATION))[:, 2]
    diffuse = lights.ambient[at] * _ambient_light(normal, at, cameras, visible)
    diffuse = diffuse + lights.key_strength[at] * reached * cosine
    return diffuse + FILL_STRENGTH * dot(normal, fill[at]).clamp(min=0), highlight


def _ambient_light(normal: Tensor, at: Tensor, cameras: Cameras, visible: Visibility) -> Tensor:
    """Light `[n]` from some directions all around, brighter from above; about 1 without obstruction."""
    total = torch.zeros_like(normal[:, 0])
    for azimuth, elevation in AMBIENT_DIRECTIONS:
        axes = camera_axes(cameras.azimuth + azimuth, torch.full_like(cameras.azimuth, elevation))
        strength = 0.8 + 0.2 * math.sin(math.radians(elevation))
        cosine = (0.4 + 0.6 * dot(normal, axes[:, 2][at])).clamp(min=0)
        total = total + strength * cosine * (0.25 + 0.75 * visible(axes, AMBIENT_SIZE, AMBIENT_BIAS))
    return (0.35 + 0.65 * total / (0.55 * len(AMBIENT_DIRECTIONS))) * (0.75 + 0.25 * normal[:, 1])


def _share_in_light(nearness: Tensor, picture: Tensor, places: Tensor, near: Tensor, size: int) -> Tensor:
    """
    The share `[n]` of the four pixels around a place in which nothing is nearer to the light, by their distances.

    Args:
        nearness: `[B * size * size]`, of what the light reaches first.
        picture: `[n]` int64.
        places: `[n, 2]` in pixels.
        near: `[n]`, the nearness of the points.
        size: edge of the pictures.
    """
    corner = (places - 0.5).floor()
    beyond = places - 0.5 - corner
    share = torch.zeros_like(near)
    for right, down in itertools.product((0, 1), (0, 1)):
        column, line = (corner[:, axis].long().add(step).clamp(0, size - 1) for axis, step in enumerate((right, down)))
        weight = (beyond[:, 0] if right else 1 - beyond[:, 0]) * (beyond[:, 1] if down else 1 - beyond[:, 1])
        share = share + weight * (nearness[(picture * size + line) * size + column] <= near)
    return share
