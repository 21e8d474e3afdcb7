"""
Pictures of meshes without a screen or a graphics driver, by ray casting on the CPU (Embree, through `embreex`).

Embree's wheel is self-contained (14 MB, no system libraries), so that pictures are alike on a laptop, in a container
and in the worker processes of data preparation. Rasterisers from wheels (VTK, pyrender) need EGL or OSMesa from the
system.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageFilter

from ...checks import check_integer, check_number, check_packages, check_positive
from ..mesh import MeshLike
from .lights import SUBPIXELS, Lights, camera_axes, unit_vectors
from .styles import LINE_COLOR, STYLES, normal_light, on_edge
from .surface import BASE_COLOR, GAMMA, Surface, load_surface


# Width of the sensor in mm, with which focal lengths are the usual 35 mm equivalents.
SENSOR_WIDTH = 36.0
EXPOSURE = 1.5
# Most transparent surfaces along a ray that are followed.
MAX_LAYERS = 8
# Distance of the origins of secondary rays from the surface that they start from, which they must not hit.
RAY_OFFSET = 1e-3
# Width and height at which the rays of a picture take some 40 GB.
MOST_PIXELS = 8192


class MeshRenderer:
    """
    Renders views of one mesh.

    Args:
        mesh: a mesh, or a surface in model space, which has its up axis and colours already.
        up_axis, base_color: see [`render_mesh_views`].

    Raises:
        ValueError: if `mesh` has no triangle with a positive area and finite vertices.
        ImportError: if `embreex` is missing.
    """

    def __init__(self, mesh: MeshLike | Surface, up_axis: str = "y", base_color: Sequence[float] = BASE_COLOR):
        check_packages("rendering", "embreex")
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self.surface = mesh if isinstance(mesh, Surface) else load_surface(mesh, up_axis, base_color)
        sides = self.surface.triangles[:, 1:] - self.surface.triangles[:, :1]
        self.face_normals = unit_vectors(np.cross(sides[:, 0], sides[:, 1]))
        self.radius = float(np.linalg.norm(self.surface.triangles, axis=-1).max())
        self.ground = float(self.surface.triangles[..., 1].min())
        self.scene = EmbreeScene()
        TriangleMesh(self.scene, self.surface.triangles)

    def _occluded(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """`[P]` bool: whether the mesh blocks the rays from `origins [P, 3]` along `directions [P, 3]`."""
        return self.scene.run(origins, np.ascontiguousarray(directions), query="OCCLUDED") >= 0

    def _sky(self, points: np.ndarray, normals: np.ndarray, sky: np.ndarray) -> np.ndarray:
        """
        Ambient light, from a bright dome and a darker floor, that reaches points.

        Without obstruction a wall receives 0.7 and a floor 0.9.

        Args:
            points: `[P, 3]`.
            normals: `[P, 3]`, unit normals at the points.
            sky: `[P, K, 3]`, the directions from which light comes.

        Returns:
            `[P]` float32.
        """
        light = np.zeros(len(points), dtype=np.float32)
        cosines = np.einsum("pd,pkd->kp", normals, sky)
        for k, cosine in enumerate(cosines):
            seen = np.flatnonzero(cosine > 0)
            directions = sky[seen, k]
            blocked = self._occluded(points[seen], directions)
            light[seen] += (0.7 + 0.3 * directions[:, 1]) * cosine[seen] * np.where(blocked, 0.15, 1.0)
        # The mean cosine over the sphere is 1/4.
        return light * (4 / len(cosines))

    def _base_color(self, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Linear RGB and opacity `[P, 4]` at barycentric `weights [P, 3]` of `faces [P]`; textures repeat."""
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

    def _facing_normals(
        self, faces: np.ndarray, weights: np.ndarray, directions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The smooth normals and those of the faces, `[P, 3]` each, at points that rays in `directions` hit."""
        normals = unit_vectors(np.einsum("pc,pcd->pd", weights, self.surface.normals[faces]))
        flat = self.face_normals[faces]
        # Both sides of a face are shaded alike, so normals are turned towards the viewer.
        flat *= -np.sign(np.einsum("pd,pd->p", flat, directions))[:, None]
        normals *= np.where(np.einsum("pd,pd->p", normals, flat) < 0, np.float32(-1), np.float32(1))[:, None]
        return normals, flat

    def _shade(
        self, faces: np.ndarray, weights: np.ndarray, directions: np.ndarray, subpixel: np.ndarray, lights: Lights
    ) -> np.ndarray:
        """
        Linear RGB and opacity of surface points as seen by camera rays.

        Args:
            faces: `[P]`, the face of each point.
            weights: `[P, 3]`, its barycentric coordinates.
            directions: `[P, 3]`, the direction of each camera ray.
            subpixel: `[P]`, the index of the ray in its pixel.
            lights: the lights.

        Returns:
            `[P, 4]`.
        """
        points = np.einsum("pc,pcd->pd", weights, self.surface.triangles[faces])
        normals, flat = self._facing_normals(faces, weights, directions)
        colors = self._base_color(faces, weights)
        origins = points + RAY_OFFSET * flat

        key = lights.key[subpixel]
        cosine = np.maximum(np.einsum("pd,pd->p", normals, key), 0)
        lit = np.flatnonzero(cosine > 0)
        cosine[lit] *= ~self._occluded(origins[lit], key[lit])
        halfway = unit_vectors(key - directions)
        highlight = 0.12 * np.maximum(np.einsum("pd,pd->p", normals, halfway), 0) ** 40 * (cosine > 0)
        diffuse = 0.45 * self._sky(origins, normals, lights.sky[subpixel])
        diffuse += 1.0 * cosine + 0.12 * np.maximum(normals @ lights.fill, 0)
        colors[:, :3] = colors[:, :3] * diffuse[:, None] + highlight[:, None]
        return colors

    def _ground_shadow(self, rays: np.ndarray, eye: np.ndarray, directions: np.ndarray, lights: Lights) -> np.ndarray:
        """
        The opacity of the soft shadow on the ground, for camera rays that miss the object.

        Light on the ground is smooth, so it is computed for one ray of a pixel and blurred over the picture.

        Args:
            rays: `[P]`, the indices of these rays among all of the picture.
            eye: `[3]`, the position of the camera.
            directions: `[N, 3]`, the directions of all rays of the picture.
            lights: the lights.

        Returns:
            `[P]`.
        """
        count = round(len(directions) ** 0.5)
        size = count // SUBPIXELS
        down = np.minimum(directions[rays, 1], -1e-6)
        points = eye + ((self.ground - 4 * RAY_OFFSET - eye[1]) / down)[:, None] * directions[rays]
        from_center = np.linalg.norm(points[:, [0, 2]], axis=1) / self.radius
        rows, columns = rays // count // SUBPIXELS, rays % count // SUBPIXELS
        pixels = rows * size + columns
        near = np.flatnonzero((directions[rays, 1] < 0) & (from_center < 1.6))
        near = near[np.unique(pixels[near], return_index=True)[1]]
        # The blur mixes pixels that get light from different directions.
        sets = rows[near] % SUBPIXELS * SUBPIXELS + columns[near] % SUBPIXELS
        up = np.tile(np.array([[0.0, 1.0, 0.0]], dtype=np.float32), (len(near), 1))
        shadow = np.zeros((2, size * size), dtype=np.float32)
        light = self._sky(points[near].astype(np.float32), up, lights.sky[sets])
        shadow[0, pixels[near]] = 1 - light / 0.9
        shadow[1, pixels[near]] = 1
        blur = ImageFilter.GaussianBlur(size / 36)
        blurred, share = (
            np.asarray(Image.fromarray(np.uint8(np.clip(channel, 0, 1) * 255).reshape(size, size)).filter(blur))
            for channel in shadow
        )
        shadow = blurred.reshape(-1)[pixels] / np.maximum(share.reshape(-1)[pixels], 1.0)
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
        style: str = "shaded",
    ) -> Image.Image:
        """One view as an RGBA picture; for the arguments see [`render_mesh_views`]."""
        angles = {"azimuth": azimuth, "elevation": elevation}
        for name, value in angles.items():
            check_number(name, value)
        check_positive("focal_mm", focal_mm)
        check_positive("margin", margin)
        size, sky_rays = check_integer("size", size, 1, MOST_PIXELS), check_integer("sky_rays", sky_rays, 1)
        if style not in STYLES:
            raise ValueError(f"`style` must be one of {', '.join(STYLES)}, got {style!r}")
        azimuth, elevation = np.deg2rad(azimuth), np.deg2rad(elevation)
        right, up, back = camera_axes(azimuth, elevation)
        # At this distance the bounding sphere just fits the sensor.
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
        directions = unit_vectors((lines[:, None] + columns[None]).reshape(-1, 3))
        index = np.arange(count) % SUBPIXELS
        subpixel = (index[:, None] * SUBPIXELS + index[None]).reshape(-1)

        lights = Lights.around(azimuth, key_light, sky_rays)
        color = np.zeros((count * count, 3), dtype=np.float32)
        # The share of each ray that the layers so far let pass.
        through = np.ones(count * count, dtype=np.float32)
        rays = np.arange(count * count)
        origins = np.tile(eye, (len(rays), 1))
        for layer in range(MAX_LAYERS):
            result = self.scene.run(origins, directions[rays], output=True)
            hit = np.flatnonzero(result["primID"] >= 0)
            if ground_shadow and layer == 0:
                missed = np.flatnonzero(result["primID"] < 0)
                through[missed] -= self._ground_shadow(missed, eye, directions, lights)
            if len(hit) == 0:
                break
            rays, faces, u, v = rays[hit], result["primID"][hit], result["u"][hit], result["v"][hit]
            weights = np.stack([1 - u - v, u, v], axis=1)
            if style == "normals":
                facing = self._facing_normals(faces, weights, directions[rays])[0]
                shaded = np.ones((len(rays), 4), dtype=np.float32)
                shaded[:, :3] = normal_light(facing, (right, up, back), EXPOSURE)
            else:
                shaded = self._shade(faces, weights, directions[rays], subpixel[rays], lights)
            if style == "wireframe":
                pixel_size = 2 * half / size * result["tfar"][hit]
                shaded[on_edge(self.surface.triangles[faces], weights, pixel_size), :3] = LINE_COLOR
            color[rays] += (through[rays] * shaded[:, 3])[:, None] * shaded[:, :3]
            through[rays] *= 1 - shaded[:, 3]
            onward = np.flatnonzero(through[rays] > 0.02)
            rays, hit = rays[onward], hit[onward]
            origins = origins[hit] + (result["tfar"][hit] + RAY_OFFSET)[:, None] * directions[rays]

        pixels = np.concatenate([color, 1 - through[:, None]], axis=1).reshape(size, SUBPIXELS, size, SUBPIXELS, 4)
        pixels = pixels.sum(axis=1).sum(axis=2) / SUBPIXELS**2
        light = pixels[..., :3] / np.maximum(pixels[..., 3:], 1e-6)
        # An exponential response, as of film, keeps the shading of white surfaces.
        pixels[..., :3] = (1 - np.exp(-EXPOSURE * light)) ** (1 / GAMMA)
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8), "RGBA")


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
    num_threads: int = 1,
    style: str = "shaded",
) -> list[Image.Image]:
    """
    Pictures of a mesh, with its textures and materials, from several directions.

    The mesh is normalised as for `mesh_to_sparse_sdf`: bounding box centred, longest side 1.9, y up.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load.
        views: azimuth, elevation and focal length of each view. Angles are in degrees: azimuth 0 looks at the front
            (from +z), azimuth 90 from +x, positive elevation from above. The focal length, in mm, is for a sensor 36
            mm wide; the camera is so far away that the bounding sphere fills the picture.
        size: width and height in pixels.
        crop: whether the picture shows the square around the object instead of the whole sensor.
        ground_shadow: whether the object casts a soft shadow on the ground, which then has opacity too.
        sky_rays: ambient light rays per camera ray; a pixel has four camera rays. More are smoother and slower.
        margin: width of the picture divided by the width of the square that must fit into it.
        key_light: azimuth and elevation of the main light in degrees, the azimuth relative to the camera's.
        up_axis: the axis of `mesh` that points up: "x", "y" or "z".
        base_color: sRGB in [0, 1] of parts without a material.
        num_threads: views that are rendered at a time; the pictures do not depend on it.
        style: "shaded" with soft light; "normals", a normal map in camera space without light (red to the right, green
            up, blue to the viewer); or "wireframe", shaded with the edges of the triangles.

    Returns:
        One RGBA picture for each view, with the object's coverage as alpha.

    Raises:
        ValueError: if `mesh` has no triangle with a positive area and finite vertices, there is no such `style`, or
            another argument is out of range.
        ImportError: if `embreex` is missing.
    """
    try:
        views = [(azimuth, elevation, focal_mm) for azimuth, elevation, focal_mm in views]
    except (TypeError, ValueError):
        raise ValueError(
            f"`views` must be triples of azimuth, elevation and focal length, got {views!r:.100}"
        ) from None
    num_threads = check_integer("num_threads", num_threads, 1)
    renderer = MeshRenderer(mesh, up_axis, base_color)

    def render(view: tuple[float, float, float]) -> Image.Image:
        return renderer.render(
            *view,
            size,
            crop=crop,
            ground_shadow=ground_shadow,
            sky_rays=sky_rays,
            margin=margin,
            key_light=key_light,
            style=style,
        )

    # Embree and most of NumPy release the interpreter's lock.
    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(render, views))
