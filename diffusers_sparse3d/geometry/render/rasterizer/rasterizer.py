"""
Pictures of surfaces by a z-buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....checks import check_integer, check_number
from ..surface import GAMMA
from .depth_buffer import depth_buffer
from .fragments import visible_fragments
from .lighting import received_light
from .materials import is_solid, surface_color
from .packed_surfaces import PackedSurfaces
from .projection import project
from .views import Views


# Samples per pixel and axis.
SUBPIXELS = 2


def rasterize_views(
    surfaces: PackedSurfaces, surface: Tensor, views: Views, size: int = 224, margin: float = 1.08
) -> Tensor:
    """
    Pictures of surfaces with soft light and shadows, framed around the object as `render_mesh_views(crop=True)` does.

    The picture of a view does not depend on the others. On a CPU the same input gives the same bytes with any number
    of threads but for rounding of elementary functions, which libraries compute in groups; with one thread, always.
    Memory grows with the triangles and the pixels of all views together.

    Args:
        surfaces: the surfaces, in model space, on the device that computes.
        surface: `[B]` int64, the surface that each picture shows.
        views: cameras, lights and materials of the B pictures.
        size: edge of the pictures in pixels.
        margin: width of a picture divided by the longer side of its object. 1 + 32/518 is the margin of the pipeline's
            image processor.

    Returns:
        `[B, 4, size, size]` uint8 on the device of the surfaces: RGB, and the object's coverage as alpha.

    Raises:
        ValueError: if `surface` has another length than the views, or one that is not there, or `size` or `margin` is
            too small.
    """
    size, margin = check_integer("size", size, 1), check_number("margin", margin, 1)
    if surface.shape != (len(views),) or (len(surface) and not 0 <= surface.min() <= surface.max() < len(surfaces)):
        raise ValueError(
            f"`surface` must hold one of {len(surfaces)} surfaces for each of {len(views)} views, got"
            f" {surface.tolist()!r:.100}"
        )
    if len(views) == 0:
        return torch.zeros(0, 4, size, size, dtype=torch.uint8, device=surfaces.device)
    surface, views = surface.to(surfaces.device), views.to(surfaces.device)
    picture, instance = surfaces.instances(surface)
    triangles, radius = surfaces.triangles[instance], surfaces.radius[surface]
    screen, eyes = project(triangles, picture, radius, views.cameras, size * SUBPIXELS, margin)

    def solid(row: Tensor, places: Tensor) -> Tensor:
        return is_solid(surfaces, instance[row], screen.barycentric(row, places))

    buffer = depth_buffer(screen, is_solid=solid if surfaces.has_holes.any() else None)
    fragments = visible_fragments(surfaces, instance, screen, eyes, buffer)
    diffuse, highlight = received_light(triangles, picture, radius, fragments, views.cameras, views.lights)
    color = surface_color(surfaces, fragments, views.materials)
    light = torch.zeros(len(buffer), 4, device=surfaces.device)
    light[fragments.pixel, :3] = color * diffuse[:, None] + highlight[:, None]
    light[fragments.pixel, 3] = 1
    return _developed(light.view(len(views), size, SUBPIXELS, size, SUBPIXELS, 4), views.lights.exposure)


def _developed(light: Tensor, exposure: Tensor) -> Tensor:
    """Pictures `[B, 4, S, S]` uint8 of linear RGB and coverage at subpixels, `[B, S, s, S, s, 4]`."""
    total = sum(light[:, :, line, :, column] for line in range(SUBPIXELS) for column in range(SUBPIXELS))
    assert isinstance(total, Tensor)
    coverage = total[..., 3:] / SUBPIXELS**2
    # An exponential response, as of film, keeps the shading of white surfaces.
    mean = total[..., :3] / total[..., 3:].clamp(min=1)
    shown = (1 - (-exposure[:, None, None, None] * mean).exp()).clamp(0, 1) ** (1 / GAMMA)
    return torch.cat([shown, coverage], 3).mul(255).round().byte().permute(0, 3, 1, 2).contiguous()
