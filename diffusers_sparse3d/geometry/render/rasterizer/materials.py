"""
The colours of points on surfaces: their own, from corners and textures, or made ones.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .fragments import Fragments, interpolate
from .packed_surfaces import CUTOUT_OPACITY, PackedSurfaces
from .projection import sum_last
from .views import CHECKER, NOISE, OWN_COLORS, Materials


# Odd numbers of a hash of lattice points; integers are alike on all devices.
HASH_FACTORS = (0x8DA6B343, 0xD8163841, 0xCB1AB31F)
HASH_MIXER = 0x2C1B3C6D


def own_color(surfaces: PackedSurfaces, triangle: Tensor, weights: Tensor) -> Tensor:
    """Linear RGB and opacity `[n, 4]` at barycentric `weights [n, 3]` of triangles `[n]`; textures repeat."""
    color = interpolate(weights, surfaces.colors[triangle])
    row = surfaces.texture[triangle]
    textured = (row >= 0).nonzero()[:, 0]
    if len(textured):
        uv = interpolate(weights[textured], surfaces.uvs[triangle[textured]])
        color[textured] = color[textured] * _texture_color(surfaces, row[textured], uv)
    return color


def _texture_color(surfaces: PackedSurfaces, row: Tensor, uv: Tensor) -> Tensor:
    """Linear RGB and opacity `[n, 4]` of textures `[n]` at coordinates `[n, 2]`, between four pixels."""
    size, start = surfaces.texture_size[row], surfaces.texture_start[row]
    place = torch.stack([uv[:, 0], 1 - uv[:, 1]], 1) * size - 0.5
    corner = place.floor()
    beyond = place - corner
    color = torch.zeros(len(row), 4, device=uv.device)
    for right, down in itertools.product((0, 1), (0, 1)):
        column, line = ((corner.long() + corner.new_tensor([right, down]).long()) % size).unbind(1)
        share = (beyond[:, 0] if right else 1 - beyond[:, 0]) * (beyond[:, 1] if down else 1 - beyond[:, 1])
        color = color + share[:, None] * surfaces.texels[start + line * size[:, 0] + column]
    return color


def is_solid(surfaces: PackedSurfaces, triangle: Tensor, weights: Tensor) -> Tensor:
    """Whether triangles `[n]` are there at barycentric `weights [n, 3]`, `[n]` bool; see `CUTOUT_OPACITY`."""
    solid = torch.ones(len(triangle), dtype=torch.bool, device=triangle.device)
    checked = surfaces.has_holes[triangle].nonzero()[:, 0]
    if len(checked):
        solid[checked] = own_color(surfaces, triangle[checked], weights[checked])[:, 3] >= CUTOUT_OPACITY
    return solid


def surface_color(surfaces: PackedSurfaces, fragments: Fragments, materials: Materials) -> Tensor:
    """The linear RGB `[n, 3]` of fragments."""
    picture = fragments.picture
    style = materials.style[picture]
    own = own_color(surfaces, fragments.triangle, fragments.weights)[:, :3] * materials.tint[picture]
    first, second = materials.color[picture].unbind(1)
    place = fragments.point * materials.frequency[picture, None]
    mixture = torch.zeros_like(place[:, 0])
    noisy = (style == NOISE).nonzero()[:, 0]
    mixture[noisy] = ((value_noise(place[noisy], materials.seed[picture[noisy]]) - 0.35) * 3).clamp(0, 1)
    mixture = torch.where(style == CHECKER, sum_last(place.floor()) % 2, mixture)
    made = first + (second - first) * mixture[:, None]
    return torch.where((style == OWN_COLORS)[:, None], own.clamp(0, 1), made)


def value_noise(points: Tensor, seed: Tensor) -> Tensor:
    """
    Smooth noise, from 0 to 1 `[n]`: random values at the points of the integer lattice and cubics between them.

    Args:
        points: `[n, 3]`.
        seed: `[n]` int64.
    """
    corner = points.floor()
    beyond = points - corner
    smooth = beyond * beyond * (3 - 2 * beyond)
    noise = torch.zeros_like(points[:, 0])
    for step in itertools.product((0, 1), repeat=3):
        hashed = seed
        share = torch.ones_like(noise)
        for axis in range(3):
            hashed = hashed ^ ((corner[:, axis].long() + step[axis]) * HASH_FACTORS[axis])
            share = share * (smooth[:, axis] if step[axis] else 1 - smooth[:, axis])
        for _ in range(2):
            hashed = hashed & 0xFFFFFFFF
            hashed = (hashed ^ (hashed >> 15)) * HASH_MIXER
        noise = noise + share * ((hashed >> 8 & 0xFFFFFF).float() / 0xFFFFFF)
    return noise
