"""Pictures of meshes without a screen or a graphics driver: ray casting on the CPU (Embree, through `embreex`).

Embree's wheel is self-contained (14 MB, no system libraries), so that pictures come out alike on a laptop, in a
container and in the worker processes of `training/prepare_data.py`. Rasterisers from wheels (VTK, pyrender) need the
system's EGL or OSMesa.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image, ImageFilter

from .mesh import NORMALIZED_SCALE, MeshLike


SENSOR_WIDTH = 36.0  # mm, so that focal lengths are the usual 35 mm equivalents
BASE_COLOR = (0.72, 0.72, 0.74)  # sRGB, of meshes without a material
GAMMA = 2.2
EXPOSURE = 1.5
SUBPIXELS = 2  # rays per pixel and axis
MAX_TEXTURE_SIZE = 1024
MAX_LAYERS = 8  # of transparent surfaces along a ray
CORNER_CHUNK = 1 << 18  # corners of triangles in one pass over their neighbours
RAY_OFFSET = 1e-3  # of secondary rays, against hitting the surface that they start from

# Turns a mesh whose named axis points up into one with y up (glTF).
UP_ROTATIONS = {
    "x": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "y": np.eye(3),
    "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]),
}


@dataclass
class Surface:
    """Triangles with what is needed to shade them.

    Attributes:
        triangles (`np.ndarray` [F, 3, 3] float32): corner positions in model space.
        normals (`np.ndarray` [F, 3, 3] float32): unit corner normals, of either orientation.
        colors (`np.ndarray` [F, 3, 4] float32): linear RGB and opacity of the corners.
        uvs (`np.ndarray` [F, 3, 2] float32): texture coordinates of the corners.
        texture_index (`np.ndarray` [F] int32): row in `textures`, -1 for none.
        textures (`list` of `np.ndarray` [H, W, 4] float32): linear RGB and opacity.
    """

    triangles: np.ndarray
    normals: np.ndarray
    colors: np.ndarray
    uvs: np.ndarray
    texture_index: np.ndarray
    textures: list[np.ndarray] = field(default_factory=list)


def corner_normals(triangles: np.ndarray, max_angle: float = 40.0) -> np.ndarray:
    """Unit normals of triangle corners, smooth over edges that bend by less than `max_angle` degrees.

    A corner's normal is the area-weighted mean over the faces that meet at its position and lie within `max_angle` of
    its own face. Faces of opposite orientation count with the sign turned, so that inconsistent winding does no harm.

    Args:
        triangles (`np.ndarray` [F, 3, 3]): corner positions; longest side of the mesh about 2.
        max_angle (`float`): in degrees.

    Returns:
        `np.ndarray` [F, 3, 3] float32.
    """
    areas = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]).astype(np.float32)
    faces = areas / np.maximum(np.linalg.norm(areas, axis=1, keepdims=True), 1e-20)
    grid = np.round((triangles.reshape(-1, 3) + 2) * 2**17).astype(np.int64)
    _, group, counts = np.unique(
        (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2], return_inverse=True, return_counts=True
    )
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(counts) - counts
    # All pairs of corners at one position, except at the hubs of large fans, where pairs would be too many.
    size = np.where(counts <= 64, counts, 0)[group]
    normals = np.repeat(areas, 3, axis=0) * (size == 0)[:, None]
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


def _texture_array(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    image.thumbnail((MAX_TEXTURE_SIZE, MAX_TEXTURE_SIZE))
    texture = np.asarray(image, dtype=np.float32) / 255
    return np.concatenate([texture[..., :3] ** GAMMA, texture[..., 3:]], axis=-1)


def _material_opacity(material: trimesh.visual.material.Material) -> float:
    """Opacity of an OBJ material (`d`), never so low that the thing could not be seen."""
    opacity = getattr(material, "kwargs", {}).get("d", 1.0)
    return max(float(opacity[0] if isinstance(opacity, list) else opacity), 0.35)


def load_surface(
    mesh: MeshLike,
    up_axis: str = "y",
    base_color: Sequence[float] = BASE_COLOR,
) -> Surface:
    """Reads the triangles and materials of a mesh and normalises them: bounding box centred, longest side 1.9, y up.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load.
        up_axis (`str`): the axis of the mesh that points up: "x", "y" or "z".
        base_color (`Sequence[float]`): sRGB in [0, 1] of parts without a material.

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
        faces = part.faces
        color = np.array([*base_color, 1.0], dtype=np.float32)
        uvs = np.zeros((len(faces), 3, 2), dtype=np.float32)
        texture_index = np.full(len(faces), -1, dtype=np.int32)
        if part.visual.kind == "texture":
            material = part.visual.material
            color[3] = _material_opacity(material)
            if isinstance(material, trimesh.visual.material.SimpleMaterial):
                material = material.to_pbr()
            if material.baseColorTexture is not None and part.visual.uv is not None:
                image = material.baseColorTexture
                if id(image) not in texture_rows:
                    texture_rows[id(image)] = len(textures)
                    textures.append(_texture_array(image))
                color[:3] = 1.0
                uvs = np.asarray(part.visual.uv, dtype=np.float32)[faces]
                texture_index[:] = texture_rows[id(image)]
            elif material.baseColorFactor is not None:
                factor = np.asarray(material.baseColorFactor, dtype=np.float32)
                color[:3] = factor[:3] / 255 if factor.max() > 1 else factor[:3]
        colors = np.broadcast_to(color, (len(faces), 3, 4))
        if part.visual.kind == "vertex":
            colors = part.visual.vertex_colors[faces].astype(np.float32) / 255
        elif part.visual.kind == "face":
            colors = np.repeat(part.visual.face_colors[:, None].astype(np.float32) / 255, 3, axis=1)
        surface["triangles"].append(np.asarray(part.vertices)[faces])
        surface["colors"].append(np.concatenate([colors[..., :3] ** GAMMA, colors[..., 3:]], axis=-1))
        surface["uvs"].append(uvs)
        surface["texture_index"].append(texture_index)
    if not surface["triangles"]:
        raise ValueError("`mesh` has no triangles.")
    arrays = {name: np.concatenate(values) for name, values in surface.items()}
    # As in `load_mesh`: what has no area counts neither for the picture nor for the bounding box.
    edges = arrays["triangles"][:, 1:] - arrays["triangles"][:, :1]
    usable = np.isfinite(edges).all(axis=(1, 2)) & (np.cross(edges[:, 0], edges[:, 1]) != 0).any(axis=1)
    if not usable.any():
        raise ValueError("`mesh` has no triangle with a positive area and finite vertices.")
    arrays = {name: values[usable] for name, values in arrays.items()}
    triangles = arrays.pop("triangles") @ UP_ROTATIONS[up_axis].T
    low, high = triangles.min(axis=(0, 1)), triangles.max(axis=(0, 1))
    triangles = ((triangles - (low + high) / 2) * (2 * NORMALIZED_SCALE / (high - low).max())).astype(np.float32)
    return Surface(triangles=triangles, normals=corner_normals(triangles), textures=textures, **arrays)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.maximum(np.einsum("...d,...d", vectors, vectors), 1e-38))[..., None]


class MeshRenderer:
    """Renders views of one mesh. See [`render_mesh_views`] for the arguments."""

    def __init__(self, mesh: MeshLike, **load_options):
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError as error:
            raise ImportError("Rendering needs embreex: pip install embreex") from error
        self.surface = load_surface(mesh, **load_options)
        sides = self.surface.triangles[:, 1:] - self.surface.triangles[:, :1]
        self.face_normals = _unit(np.cross(sides[:, 0], sides[:, 1]))
        self.radius = float(np.linalg.norm(self.surface.triangles, axis=-1).max())
        self.ground = float(self.surface.triangles[..., 1].min())
        self.scene = EmbreeScene()
        TriangleMesh(self.scene, self.surface.triangles)

    def _occluded(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        return self.scene.run(origins, np.ascontiguousarray(directions), query="OCCLUDED") >= 0

    def _sky(self, points: np.ndarray, normals: np.ndarray, sky: np.ndarray) -> np.ndarray:
        """Light [P] that reaches `points` from the directions `sky` [P, K, 3] of a bright dome and a darker floor.

        Unobstructed light from all around would be 0.7 for a wall and 0.9 for a floor.
        """
        light = np.zeros(len(points), dtype=np.float32)
        cosines = np.einsum("pd,pkd->kp", normals, sky)
        for k, cosine in enumerate(cosines):
            seen = np.flatnonzero(cosine > 0)
            directions = sky[seen, k]
            blocked = self._occluded(points[seen], directions)
            light[seen] += (0.7 + 0.3 * directions[:, 1]) * cosine[seen] * np.where(blocked, 0.15, 1.0)
        return light * (4 / len(cosines))  # the mean cosine over the sphere is 1/4

    def _base_color(self, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Linear RGB and opacity [P, 4] at barycentric `weights` [P, 3] of `faces` [P]; textures repeat."""
        surface = self.surface
        colors = np.einsum("pc,pcd->pd", weights, surface.colors[faces])
        uvs = np.einsum("pc,pcd->pd", weights, surface.uvs[faces])
        for row in np.unique(surface.texture_index[faces]):
            if row < 0:
                continue
            texture = surface.textures[row]
            height, width = texture.shape[:2]
            used = np.flatnonzero(surface.texture_index[faces] == row)
            x, y = uvs[used, 0] * width - 0.5, (1 - uvs[used, 1]) * height - 0.5
            left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
            sample = np.zeros((len(used), 4), dtype=np.float32)
            for column, x_share in ((left, left + 1 - x), (left + 1, x - left)):
                for line, y_share in ((top, top + 1 - y), (top + 1, y - top)):
                    sample += texture[line % height, column % width] * (x_share * y_share)[:, None]
            colors[used] *= sample
        return colors

    def _shade(
        self, faces: np.ndarray, weights: np.ndarray, directions: np.ndarray, subpixel: np.ndarray, lights: "Lights"
    ) -> np.ndarray:
        """Linear RGB and opacity [P, 4] of surface points, seen along `directions`."""
        surface = self.surface
        corners = surface.triangles[faces]
        points = np.einsum("pc,pcd->pd", weights, corners)
        normals = _unit(np.einsum("pc,pcd->pd", weights, surface.normals[faces]))
        flat = self.face_normals[faces]
        # Both sides of a face are shaded alike: whatever is seen is turned to the viewer.
        flat *= -np.sign(np.einsum("pd,pd->p", flat, directions))[:, None]
        normals *= np.where(np.einsum("pd,pd->p", normals, flat) < 0, np.float32(-1), np.float32(1))[:, None]
        colors = self._base_color(faces, weights)
        origins = points + RAY_OFFSET * flat

        key = lights.key[subpixel]
        cosine = np.maximum(np.einsum("pd,pd->p", normals, key), 0)
        lit = np.flatnonzero(cosine > 0)
        cosine[lit] *= ~self._occluded(origins[lit], key[lit])
        halfway = _unit(key - directions)
        highlight = 0.12 * np.maximum(np.einsum("pd,pd->p", normals, halfway), 0) ** 40 * (cosine > 0)
        diffuse = 0.45 * self._sky(origins, normals, lights.sky[subpixel])
        diffuse += 1.0 * cosine + 0.12 * np.maximum(normals @ lights.fill, 0)
        colors[:, :3] = colors[:, :3] * diffuse[:, None] + highlight[:, None]
        return colors

    def _ground_shadow(
        self, rays: np.ndarray, eye: np.ndarray, directions: np.ndarray, subpixel: np.ndarray, lights: "Lights"
    ) -> np.ndarray:
        """Opacity of the soft shadow on the ground, for the camera rays [P] that miss the object.

        The ground is smooth, so that the light there may be blurred over the picture to do with few rays.
        """
        count = round(len(directions) ** 0.5)
        down = np.minimum(directions[rays, 1], -1e-6)
        points = eye + ((self.ground - 4 * RAY_OFFSET - eye[1]) / down)[:, None] * directions[rays]
        from_center = np.linalg.norm(points[:, [0, 2]], axis=1) / self.radius
        near = np.flatnonzero((directions[rays, 1] < 0) & (from_center < 1.6))
        up = np.tile(np.array([[0.0, 1.0, 0.0]], dtype=np.float32), (len(near), 1))
        shadow = np.zeros((2, count * count), dtype=np.float32)
        shadow[0, rays[near]] = (
            1 - self._sky(points[near].astype(np.float32), up, lights.sky[subpixel[rays[near]]]) / 0.9
        )
        shadow[1, rays[near]] = 1
        blur = ImageFilter.GaussianBlur(count / 36)
        blurred, share = (
            np.asarray(Image.fromarray(np.uint8(np.clip(channel, 0, 1) * 255).reshape(count, count)).filter(blur))
            for channel in shadow
        )
        shadow = blurred.reshape(-1)[rays] / np.maximum(share.reshape(-1)[rays], 1.0)
        return 0.7 * shadow * np.clip(2 - 1.25 * from_center, 0, 1) * (directions[rays, 1] < 0)

    def render(
        self,
        azimuth: float,
        elevation: float,
        focal_mm: float,
        size: int = 512,
        *,
        crop: bool = False,
        ground_shadow: bool = False,
        sky_rays: int = 8,
        margin: float = 1.08,
        key_light: tuple[float, float] = (-35.0, 45.0),
    ) -> Image.Image:
        """One view; see [`render_mesh_views`]."""
        azimuth, elevation = np.deg2rad(azimuth), np.deg2rad(elevation)
        right, up, back = _camera_axes(azimuth, elevation)
        # The bounding sphere fits the sensor.
        distance = self.radius * math.hypot(1.0, 2 * focal_mm / SENSOR_WIDTH)
        eye = distance * back
        half = SENSOR_WIDTH / (2 * focal_mm)
        center = np.zeros(2, dtype=np.float32)
        if crop:
            corners = self.surface.triangles.reshape(-1, 3)
            projected = corners @ np.stack([right, up], axis=1) / (distance - corners @ back)[:, None]
            low, high = projected.min(axis=0), projected.max(axis=0)
            center, half = (low + high) / 2, (high - low).max() / 2
        half *= margin
        count = size * SUBPIXELS
        steps = (((np.arange(count) + 0.5) / count * 2 - 1) * half).astype(np.float32)
        columns, lines = (center[0] + steps)[:, None] * right, (center[1] - steps)[:, None] * up - back
        directions = _unit((lines[:, None] + columns[None]).reshape(-1, 3))
        index = np.arange(count) % SUBPIXELS
        subpixel = (index[:, None] * SUBPIXELS + index[None]).reshape(-1)

        lights = Lights.around(azimuth, key_light, sky_rays)
        color = np.zeros((count * count, 3), dtype=np.float32)
        through = np.ones(count * count, dtype=np.float32)  # what the layers so far let pass
        rays = np.arange(count * count)
        origins = np.tile(eye, (len(rays), 1))
        for layer in range(MAX_LAYERS):
            result = self.scene.run(origins, directions[rays], output=True)
            hit = np.flatnonzero(result["primID"] >= 0)
            if ground_shadow and layer == 0:
                missed = np.flatnonzero(result["primID"] < 0)
                through[missed] -= self._ground_shadow(missed, eye, directions, subpixel, lights)
            if len(hit) == 0:
                break
            rays, faces, u, v = rays[hit], result["primID"][hit], result["u"][hit], result["v"][hit]
            weights = np.stack([1 - u - v, u, v], axis=1)
            shaded = self._shade(faces, weights, directions[rays], subpixel[rays], lights)
            color[rays] += (through[rays] * shaded[:, 3])[:, None] * shaded[:, :3]
            through[rays] *= 1 - shaded[:, 3]
            onward = np.flatnonzero(through[rays] > 0.02)
            rays, hit = rays[onward], hit[onward]
            origins = origins[hit] + (result["tfar"][hit] + RAY_OFFSET)[:, None] * directions[rays]

        pixels = np.concatenate([color, 1 - through[:, None]], axis=1).reshape(size, SUBPIXELS, size, SUBPIXELS, 4)
        pixels = pixels.sum(axis=1).sum(axis=2) / SUBPIXELS**2
        light = pixels[..., :3] / np.maximum(pixels[..., 3:], 1e-6)
        # Exposure as on film: white surfaces keep their shading.
        pixels[..., :3] = (1 - np.exp(-EXPOSURE * light)) ** (1 / GAMMA)
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8), "RGBA")


def _camera_axes(azimuth: float, elevation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, up and backward unit vectors of a camera that looks at the origin; angles in radians."""
    back = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)], dtype=np.float32)
    back = np.array(back, dtype=np.float32)
    return right, np.cross(back, right), back


@dataclass
class Lights:
    """Directions towards the lights, different for each ray of a pixel and alike for all pixels: no noise.

    Attributes:
        key (`np.ndarray` [P, 3]): the main light, slightly different from ray to ray, so that its shadows are soft.
        fill (`np.ndarray` [3]): from the other side, without shadows.
        sky (`np.ndarray` [P, K, 3]): all around, evenly.
    """

    key: np.ndarray
    fill: np.ndarray
    sky: np.ndarray

    @classmethod
    def around(cls, azimuth: float, key_light: tuple[float, float], sky_rays: int) -> "Lights":
        """Lights that stand with the camera; `azimuth` in radians, `key_light` in degrees, relative to it."""
        rays = SUBPIXELS**2
        key_azimuth, key_elevation = np.deg2rad(key_light)
        right, up, key = _camera_axes(azimuth + key_azimuth, key_elevation)
        angle = 2 * np.pi * (np.arange(rays)[:, None] + 0.4) / rays
        key = _unit(key + 0.06 * (np.cos(angle) * right + np.sin(angle) * up)).astype(np.float32)
        fill = _camera_axes(azimuth - key_azimuth, 0.2)[2].astype(np.float32)
        # A Fibonacci sphere, of which each ray gets every P-th point: evenly spread again.
        index = np.arange(rays * sky_rays) + 0.5
        height, angle = 1 - 2 * index / len(index), np.pi * (1 + 5**0.5) * index
        radius = np.sqrt(1 - height**2)
        sphere = np.stack([radius * np.cos(angle), height, radius * np.sin(angle)], axis=1).astype(np.float32)
        return cls(key=key, fill=fill, sky=sphere.reshape(sky_rays, rays, 3).transpose(1, 0, 2))


def render_mesh_views(
    mesh: MeshLike,
    views: Sequence[tuple[float, float, float]],
    size: int = 512,
    *,
    crop: bool = False,
    ground_shadow: bool = False,
    sky_rays: int = 8,
    margin: float = 1.08,
    key_light: tuple[float, float] = (-35.0, 45.0),
    up_axis: str = "y",
    base_color: Sequence[float] = BASE_COLOR,
) -> list[Image.Image]:
    """Renders a mesh with its textures and materials from several directions.

    The mesh is normalised as for `mesh_to_sparse_sdf`: bounding box centred, longest side 1.9, y up.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load.
        views: (azimuth, elevation, focal_mm) of each view. Angles in degrees: azimuth 0 looks at the front (from +z),
            azimuth 90 from +x, positive elevation from above. The focal length is for a 36 mm sensor; the distance is
            such that the bounding sphere fills the picture.
        size (`int`): width and height in pixels.
        crop (`bool`): whether the picture shows the square around the object instead of the whole sensor.
        ground_shadow (`bool`): whether the object casts a soft shadow on the ground, which then has opacity too.
        sky_rays (`int`): rays towards the ambient light per camera ray, of which a pixel has four; more are smoother
            and slower.
        margin (`float`): width of the picture over what has to fit into it.
        key_light (`tuple`): azimuth and elevation of the main light in degrees, relative to the camera's azimuth.
        up_axis (`str`): the axis of `mesh` that points up: "x", "y" or "z".
        base_color (`Sequence[float]`): sRGB in [0, 1] of parts without a material.

    Returns:
        `list[PIL.Image.Image]`: RGBA, with the object's coverage as alpha.

    Raises:
        ValueError: if `mesh` has no triangle with a positive area and finite vertices.
        ImportError: if `embreex` is not installed.
    """
    renderer = MeshRenderer(mesh, up_axis=up_axis, base_color=base_color)
    options = {
        "crop": crop,
        "ground_shadow": ground_shadow,
        "sky_rays": sky_rays,
        "margin": margin,
        "key_light": key_light,
    }
    return [renderer.render(*view, size, **options) for view in views]


def preview(mesh: MeshLike, image: Image.Image | None = None, size: int = 384) -> Image.Image:
    """A picture to look at: the photo, if given, and the mesh from four sides, in one row.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load; y up.
        image (`PIL.Image.Image`, *optional*): the photo; transparent parts become white.
        size (`int`): width and height in pixels of each picture in the row.

    Returns:
        `PIL.Image.Image`: RGB, `size` high, 4 or 5 times as wide.
    """
    views = [(azimuth, 20.0, 60.0) for azimuth in (25.0, 115.0, 205.0, 295.0)]
    pictures = render_mesh_views(mesh, views, size, ground_shadow=True, sky_rays=12, margin=1.06)
    if image is not None:
        photo = image.convert("RGBA")
        photo.thumbnail((size, size), Image.Resampling.LANCZOS)
        scale = min(size / photo.width, size / photo.height)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        pictures.insert(0, photo)
    row = Image.new("RGBA", (size * len(pictures), size), "white")
    for column, picture in enumerate(pictures):
        left, top = (size - picture.width) // 2, (size - picture.height) // 2
        row.alpha_composite(picture, (column * size + left, top))
    return row.convert("RGB")
