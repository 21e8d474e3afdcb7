"""
Triangles with normals, colours and textures: what a picture of a mesh is made from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals

from ..mesh import NORMALIZED_SCALE, MeshLike


# sRGB in [0, 1] of parts without a material.
BASE_COLOR = (0.72, 0.72, 0.74)
# Colours are raised to this power to make them linear.
GAMMA = 2.2
# Textures are reduced to this many pixels per side.
MAX_TEXTURE_SIZE = 1024
# Corners of triangles in one pass over their neighbours.
CORNER_CHUNK = 1 << 18

# Rotations that turn a mesh whose named axis points up into one with y up, as in glTF.
UP_ROTATIONS = {
    "x": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "y": np.eye(3),
    "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]),
}


@dataclass
class Surface:
    """
    Triangles and the data needed to shade them.

    Attributes:
        triangles: `[F, 3, 3]` float32, corner positions in model space.
        normals: `[F, 3, 3]` float32, unit normals of the corners, of either orientation.
        colors: `[F, 3, 4]` float32, linear RGB and opacity of the corners.
        uvs: `[F, 3, 2]` float32, texture coordinates of the corners.
        texture_index: `[F]` int32, index in `textures`, -1 for none.
        textures: `[H, W, 4]` float32 each, linear RGB and opacity.
    """

    triangles: np.ndarray
    normals: np.ndarray
    colors: np.ndarray
    uvs: np.ndarray
    texture_index: np.ndarray
    textures: list[np.ndarray] = field(default_factory=list)


def corner_normals(triangles: np.ndarray, max_angle: float = 40.0) -> np.ndarray:
    """
    Unit normals of triangle corners, smooth across edges that bend by less than `max_angle`.

    A corner's normal is the area-weighted mean over those faces at its position that lie within `max_angle` of its own
    face. Faces of opposite orientation count with the opposite sign, so that inconsistent winding does no harm.

    Args:
        triangles: `[F, 3, 3]`, corner positions in model space.
        max_angle: in degrees.

    Returns:
        `[F, 3, 3]` float32.
    """
    areas = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]).astype(np.float32)
    faces = areas / np.maximum(np.linalg.norm(areas, axis=1, keepdims=True), 1e-20)
    grid = np.round((triangles.reshape(-1, 3) + 2) * 2**17).astype(np.int64)
    keys = (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    counts = np.diff(np.append(starts, len(keys)))
    group = np.empty_like(order)
    group[order] = np.repeat(np.arange(len(starts)), counts)

    # Where all faces are near their mean, all of them count for each corner.
    mean = _sums_over_corners(faces, group)
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-20)
    cosine = np.einsum("fd,fcd->fc", faces, mean[group.reshape(-1, 3)].astype(np.float32)).reshape(-1)
    smooth = np.minimum.reduceat(cosine[order], starts) > np.cos(np.deg2rad(max_angle / 2))
    normals = np.where(smooth[group, None], _sums_over_corners(areas, group)[group], np.repeat(areas, 3, axis=0))
    # Elsewhere, all pairs of corners at one position. The hub of a large fan would have too many; its corners keep the
    # normals of their faces.
    size = np.where((counts <= 64) & ~smooth, counts, 0)[group]
    normals[size > 0] = 0
    for start in range(0, len(group), CORNER_CHUNK):
        part = slice(start, start + CORNER_CHUNK)
        rows = np.repeat(np.arange(len(size[part])), size[part])
        within = np.arange(len(rows)) - np.repeat(np.cumsum(size[part]) - size[part], size[part])
        own, other = (start + rows) // 3, order[starts[group[part]][rows] + within] // 3
        cosine = np.einsum("ij,ij->i", faces[own], faces[other])
        weight = np.sign(cosine) * (np.abs(cosine) > np.cos(np.deg2rad(max_angle)))
        for axis in range(3):
            normals[part, axis] += np.bincount(rows, weight * areas[other, axis], minlength=len(size[part]))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    return normals.reshape(-1, 3, 3).astype(np.float32)


def _sums_over_corners(vectors: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sums `[G, 3]` over the corners of each group `[3 F]`, of the `vectors [F, 3]` of their faces."""
    return np.stack([np.bincount(group, np.repeat(axis, 3)) for axis in vectors.T], axis=1)


def _texture_array(image: Image.Image) -> np.ndarray:
    """A texture as linear RGB and opacity, `[H, W, 4]` float32, of at most `MAX_TEXTURE_SIZE` pixels per side."""
    image = image.convert("RGBA")
    image.thumbnail((MAX_TEXTURE_SIZE, MAX_TEXTURE_SIZE))
    return _linear(np.asarray(image, dtype=np.float32) / 255)


def _linear(colors: np.ndarray) -> np.ndarray:
    """Linear RGB and opacity `[..., 4]` of sRGB and opacity, in [0, 1]."""
    return np.concatenate([colors[..., :3] ** GAMMA, colors[..., 3:]], axis=-1)


def _material_opacity(material: trimesh.visual.material.Material) -> float:
    """The opacity of an OBJ material (`d`), but at least 0.35, so that the part stays visible."""
    opacity = getattr(material, "kwargs", {}).get("d", 1.0)
    return max(float(opacity[0] if isinstance(opacity, list) else opacity), 0.35)


def load_surface(
    mesh: MeshLike,
    up_axis: str = "y",
    base_color: Sequence[float] = BASE_COLOR,
) -> Surface:
    """
    Triangles and materials of a mesh, normalised: bounding box centred, longest side 1.9, y up.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load.
        up_axis: the axis of the mesh that points up: "x", "y" or "z".
        base_color: sRGB in [0, 1] of parts without a material.

    Raises:
        ValueError: if `mesh` has no triangle with a positive area and finite vertices.
    """
    if isinstance(mesh, str | Path):
        mesh = trimesh.load_scene(mesh, process=False)
    parts = mesh.dump() if isinstance(mesh, trimesh.Scene) else [mesh]
    surface: dict[str, list[np.ndarray]] = {"triangles": [], "colors": [], "uvs": [], "texture_index": []}
    textures: list[np.ndarray] = []
    texture_rows: dict[int, int] = {}
    for part in parts:
        if not isinstance(part, trimesh.Trimesh) or len(part.faces) == 0:
            continue
        faces, visual = part.faces, part.visual
        color = np.array([*base_color, 1.0], dtype=np.float32)
        uvs = np.zeros((len(faces), 3, 2), dtype=np.float32)
        texture_index = np.full(len(faces), -1, dtype=np.int32)
        if isinstance(visual, TextureVisuals):
            material = visual.material
            color[3] = _material_opacity(material)
            if isinstance(material, trimesh.visual.material.SimpleMaterial):
                material = material.to_pbr()
            if material.baseColorTexture is not None and visual.uv is not None:
                image = material.baseColorTexture
                if id(image) not in texture_rows:
                    texture_rows[id(image)] = len(textures)
                    textures.append(_texture_array(image))
                color[:3] = 1.0
                uvs = np.asarray(visual.uv, dtype=np.float32)[faces]
                texture_index[:] = texture_rows[id(image)]
            elif material.baseColorFactor is not None:
                factor = np.asarray(material.baseColorFactor, dtype=np.float32)
                color[:3] = factor[:3] / 255 if factor.max() > 1 else factor[:3]
        colors: np.ndarray = np.broadcast_to(_linear(color), (len(faces), 3, 4))
        if isinstance(visual, ColorVisuals) and visual.kind == "vertex":
            colors = _linear(np.asarray(visual.vertex_colors, dtype=np.float32) / 255)[faces]
        elif isinstance(visual, ColorVisuals) and visual.kind == "face":
            colors = np.repeat(_linear(np.asarray(visual.face_colors, dtype=np.float32) / 255)[:, None], 3, axis=1)
        surface["triangles"].append(np.asarray(part.vertices)[faces])
        surface["colors"].append(colors)
        surface["uvs"].append(uvs)
        surface["texture_index"].append(texture_index)
    if not surface["triangles"]:
        raise ValueError("`mesh` has no triangles.")
    arrays = {name: np.concatenate(values) for name, values in surface.items()}
    # As in `load_mesh`, triangles without area count neither for the picture nor for the bounding box.
    edges = arrays["triangles"][:, 1:] - arrays["triangles"][:, :1]
    usable = np.isfinite(edges).all(axis=(1, 2)) & (np.cross(edges[:, 0], edges[:, 1]) != 0).any(axis=1)
    if not usable.any():
        raise ValueError("`mesh` has no triangle with a positive area and finite vertices.")
    if not usable.all():
        arrays = {name: values[usable] for name, values in arrays.items()}
    triangles = arrays.pop("triangles") @ UP_ROTATIONS[up_axis].T
    # An axis at a time: NumPy takes the extremes of three numbers at once ten times as long.
    low, high = (np.array([extreme(axis) for axis in np.moveaxis(triangles, 2, 0)]) for extreme in (np.min, np.max))
    triangles = ((triangles - (low + high) / 2) * (2 * NORMALIZED_SCALE / (high - low).max())).astype(np.float32)
    return Surface(triangles=triangles, normals=corner_normals(triangles), textures=textures, **arrays)
