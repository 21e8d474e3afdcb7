"""
Silhouettes of meshes from many directions, without a renderer, and how well one of them fits the mask of a picture.

Points on the surface are projected and mark their pixels. Both outlines are framed before they are compared: cropped
to their bounding box, centred, and scaled so that the longer side fills the square. So neither the place of the object
in the picture nor its size matters. The direction and the perspective do, and are searched.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from torch import Tensor

from ..checks import check_integer, check_number
from ..ops.checks import check_shape
from .mesh import check_mesh


# Edge of a framed silhouette in pixels: chair legs are seen, the stairs of a picture's outline are not.
SIZE = 64
# A pixel of the frame is of the object from this share of its area on, as one in which points of a surface are found.
COVERED = 0.15
# Points on the surface of a mesh, at least ten for a pixel that it covers.
NUM_POINTS = 20_000
# The first search takes a frame and points that are coarser by these factors.
COARSER_FRAME, COARSER_POINTS = 2, 4
# Views projected at a time.
VIEW_CHUNK = 16
# Width of the sensor in mm, as in `geometry.render`.
SENSOR_WIDTH = 36.0

# The directions and focal lengths that are tried first.
AZIMUTH_STEP = 15.0
ELEVATIONS = (-5.0, 10.0, 25.0, 40.0, 55.0)
FOCAL_LENGTHS = (35.0, 80.0)
# Then those around the best one, at ever smaller distances: degrees, and the ratio of focal lengths.
REFINEMENTS = ((7.5, 1.4), (4.0, 1.2))


class View(NamedTuple):
    """
    A direction from which an object is seen, in the terms of `geometry.render`.

    Attributes:
        azimuth: in degrees; 0 sees the front (from +z), 90 from +x.
        elevation: in degrees, positive from above.
        focal_mm: focal length for a sensor 36 mm wide, at the distance at which the bounding sphere fits it.
    """

    azimuth: float
    elevation: float
    focal_mm: float


def frame_mask(mask: np.ndarray, size: int = SIZE) -> Tensor:
    """
    The silhouette of a mask, framed.

    Args:
        mask: `[H, W]`, nonzero on the object.
        size: edge of the result.

    Returns:
        `[size, size]` bool.

    Raises:
        ValueError: if the mask has another shape or is zero everywhere, or `size` is not positive.
    """
    if not isinstance(mask, np.ndarray) or mask.ndim != 2:
        raise ValueError(f"`mask` must be an array [H, W], got {getattr(mask, 'shape', type(mask).__name__)}")
    size = check_integer("size", size, 1)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        raise ValueError("`mask` must be nonzero somewhere, it is zero everywhere")
    object_ = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] != 0
    picture = Image.fromarray(np.where(object_, 255, 0).astype(np.uint8))
    edge = max(picture.size)
    square = Image.new("L", (edge, edge))
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    coverage = np.asarray(square.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(coverage >= COVERED * 255)


def surface_points(mesh: trimesh.Trimesh, num_points: int = NUM_POINTS) -> Tensor:
    """
    Points spread evenly over a surface, the same ones for the same mesh, centred.

    Args:
        mesh: a mesh with a surface.
        num_points: how many.

    Returns:
        `[num_points, 3]` float32, relative to the middle of the bounding box.

    Raises:
        ValueError: if the mesh has no triangle with an area, or `num_points` is not positive.
    """
    vertices, faces = check_mesh(mesh)
    num_points = check_integer("num_points", num_points, 1)
    corners = vertices[faces]
    sides = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    if not areas.sum() > 0:
        raise ValueError("`mesh` must have a surface, it has no triangle with an area")
    generator = np.random.default_rng(0)
    # Stratified: as many points on every part of the area.
    places = (np.arange(num_points) + generator.random(num_points)) / num_points * areas.sum()
    face = np.searchsorted(areas.cumsum(), places).clip(max=len(faces) - 1)
    u, v = generator.random((2, num_points, 1))
    flip = u + v > 1
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    points = corners[face, 0] + u * sides[face, 0] + v * sides[face, 1]
    used = vertices[np.unique(faces)]
    return torch.from_numpy(points - (used.min(axis=0) + used.max(axis=0)) / 2).float()


def silhouettes(points: Tensor, views: Sequence[View], size: int = SIZE) -> Tensor:
    """
    Framed silhouettes of points on a surface, `[K, size, size]` bool, one for each view.

    Args:
        points: `[P, 3]`, relative to the point that the cameras look at.
        views: K views.
        size: edge of the results in pixels.
    """
    angles = torch.deg2rad(torch.tensor([view[:2] for view in views], dtype=points.dtype))
    sin, cos = angles.sin(), angles.cos()
    zero = torch.zeros(len(views), dtype=points.dtype)
    back = torch.stack([sin[:, 0] * cos[:, 1], sin[:, 1], cos[:, 0] * cos[:, 1]], dim=1)
    right = torch.stack([cos[:, 0], zero, -sin[:, 0]], dim=1)
    up = torch.linalg.cross(back, right)
    focal = torch.tensor([view.focal_mm for view in views], dtype=points.dtype)
    distance = points.norm(dim=1).max() * (1 + (2 * focal / SENSOR_WIDTH) ** 2).sqrt()
    result = []
    for part in range(0, len(views), VIEW_CHUNK):
        rows = slice(part, part + VIEW_CHUNK)
        # [3, K, P]: to the right, down, and along the view.
        x, y, z = torch.stack([right[rows], -up[rows], -back[rows]]) @ points.T
        depth = distance[rows, None] + z
        result.append(_frame(torch.stack([x / depth, y / depth], dim=1), size))
    return torch.cat(result)


def _frame(places: Tensor, size: int) -> Tensor:
    """The pixels that places `[K, 2, P]` (right, down) touch once framed, `[K, size, size]` bool."""
    low, high = places.amin(dim=2), places.amax(dim=2)
    extent = (high - low).amax(dim=1).clamp(min=1e-12)
    scaled = (places - ((low + high) / 2)[:, :, None]) * ((size - 1e-3) / extent)[:, None, None] + size / 2
    x, y = scaled.long().clamp(0, size - 1).unbind(dim=1)
    picture = torch.zeros(len(places), size * size, dtype=torch.bool)
    picture.scatter_(1, y * size + x, torch.ones_like(x, dtype=torch.bool))
    return picture.view(-1, size, size)


def best_view(points: Tensor, mask: Tensor, max_azimuth: float = 180.0) -> tuple[float, View]:
    """
    The view of a surface whose silhouette fits a mask best, among a grid of them and finer ones around its best.

    Args:
        points: `[P, 3]`, of `surface_points`.
        mask: `[S, S]` bool, of `frame_mask`.
        max_azimuth: largest azimuth to either side that is tried first, in degrees; 180 for all around.

    Returns:
        The intersection over union of silhouette and mask, 0 to 1, and the view.

    Raises:
        ValueError: if a shape or dtype is another one, or `max_azimuth` is not from 0 to 180.
    """
    check_shape("points", points, "P", 3)
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool or len(mask) < COARSER_FRAME:
        raise ValueError(f"`mask` must be bool of shape [S, S], got {mask.dtype} {list(mask.shape)}")
    max_azimuth = check_number("max_azimuth", max_azimuth, 0, 180)
    # The number of steps that stay within the limit, and once around no direction twice.
    steps = int(max_azimuth / AZIMUTH_STEP)
    azimuths = [AZIMUTH_STEP * step for step in range(-steps, steps + 1)][: round(360 / AZIMUTH_STEP)]
    coarse = F.max_pool2d(mask[None].float(), COARSER_FRAME)[0].bool()
    views = [View(*values) for values in itertools.product(azimuths, ELEVATIONS, FOCAL_LENGTHS)]
    best = _best(points[::COARSER_POINTS], coarse, views)
    for degrees, ratio in REFINEMENTS:
        azimuth, elevation, focal_mm = best[1]
        turns, ratios = (-degrees, 0.0, degrees), (1 / ratio, 1.0, ratio)
        finer = itertools.product(turns, turns, ratios)
        best = _best(points, mask, [View(azimuth + a, elevation + e, focal_mm * f) for a, e, f in finer])
    return best


def _best(points: Tensor, mask: Tensor, views: Sequence[View]) -> tuple[float, View]:
    """The highest intersection over union among views, and the first view that has it."""
    found = silhouettes(points, views, len(mask))
    overlap, union = (found & mask).sum((1, 2)), (found | mask).sum((1, 2))
    quality = overlap / union
    index = int(quality.argmax())
    return float(quality[index]), views[index]
