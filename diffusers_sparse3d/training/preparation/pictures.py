"""The conditioning pictures of a mesh: renders from random views, or those of a folder, and the one it came with."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from ...geometry.render import BASE_COLOR, MeshRenderer, Surface
from ...geometry.render.rasterizer import PackedSurfaces, random_views, rasterize_views
from ...geometry.render.rasterizer.projection import camera_axes, camera_distance
from ...pipelines.image_processor import alpha_of_object, plain_background_mask
from ..files import complete_folder
from .deformation import Deformation
from .index import MeshEntry
from .mesh_file import MeshFile
from .settings import Settings
from .shapes import generator_of


# The cameras of a folder of pictures, and what had their azimuths alone before.
CAMERAS_FILE, AZIMUTHS_FILE = "cameras.csv", "azimuths.txt"
# sRGB colours in which plastic things are often made, for meshes that have no colours of their own.
PLASTIC_COLORS = [
    (0.79, 0.10, 0.04), (0.00, 0.33, 0.75), (0.95, 0.80, 0.20), (0.14, 0.47, 0.25), (0.95, 0.95, 0.93),
    (0.63, 0.65, 0.66), (0.42, 0.43, 0.41), (0.13, 0.14, 0.15), (1.00, 0.50, 0.08), (0.35, 0.20, 0.12),
    (0.87, 0.78, 0.61), (0.58, 0.73, 0.24), (0.27, 0.65, 0.83), (0.98, 0.68, 0.75), (0.36, 0.18, 0.55),
    (0.45, 0.10, 0.13), (0.04, 0.20, 0.36), (0.10, 0.56, 0.53), (0.75, 0.62, 0.45), (0.84, 0.86, 0.88),
]  # fmt: skip


class Camera(NamedTuple):
    """The camera of a render, at the distance at which the bounding sphere of the object fits its sensor.

    Attributes:
        azimuth: In degrees, 0 at the front and 90 from +x.
        elevation: In degrees, positive from above.
        focal_length: In mm, for a sensor 36 mm wide.
        roll: Turn about its axis in degrees; positive ones turn the picture clockwise.
        distance: From the centre of the model cube, in model space.
        scale: Of a unit of length there, in halves of the square around the projected object.
        right_shift: Of the middle of that square from the projected centre, in its halves.
        down_shift: The same, down.
    """

    azimuth: float
    elevation: float = float("nan")
    focal_length: float = float("nan")
    roll: float = float("nan")
    distance: float = float("nan")
    scale: float = float("nan")
    right_shift: float = float("nan")
    down_shift: float = float("nan")

    def around(self, surface: Surface) -> "Camera":
        """Returns this camera with the distance, the scale and the shifts that it has for a surface in model space."""
        angles = (torch.tensor([value], dtype=torch.float64) for value in (self.azimuth, self.elevation, self.roll))
        axes = camera_axes(*angles)[0].numpy().astype(np.float32)
        x, y, z = np.moveaxis(surface.triangles, -1, 0)
        # Written out, as sums of matrix products depend on the library and the number of threads.
        right, up, depth = (x * axis[0] + y * axis[1] + z * axis[2] for axis in axes)
        radius, focal_mm = torch.tensor(float(np.sqrt(x * x + y * y + z * z).max())), torch.tensor(self.focal_length)
        distance = float(camera_distance(radius, focal_mm))
        sides = [side / (distance - depth) for side in (right, -up)]
        low, high = (np.array([float(extreme(side)) for side in sides]) for extreme in (np.min, np.max))
        half = (high - low).max() / 2
        right_shift, down_shift = ((low + high) / 2 / half).tolist()
        scale = float(1 / (half * distance))
        return self._replace(distance=distance, scale=scale, right_shift=right_shift, down_shift=down_shift)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a mesh.

    Attributes:
        files: A WebP or PNG file with alpha each; renders come first, a given picture comes last.
        cameras: Cameras of the renders; fewer than there are pictures where they are not known.
        given: Number of pictures that came with the mesh.
    """

    files: list[bytes]
    cameras: list[Camera]
    given: int

    def camera_columns(self) -> dict[str, list[float]]:
        """Returns the columns of a record that say what the cameras are: `azimuths`, `elevations`, and so on."""
        return {f"{name}s": [getattr(camera, name) for camera in self.cameras] for name in Camera._fields}


def make_pictures(
    entry: MeshEntry,
    settings: Settings,
    device: torch.device | str = "cpu",
    file: MeshFile | None = None,
    deformation: Deformation | None = None,
) -> Pictures:
    """Renders a shape from random directions, which its id and the seed decide, and adds the picture it came with.

    Args:
        entry: The mesh, or the shape of it.
        settings: Views and renderer.
        device: Device of the rasteriser.
        file: The file of the mesh, if it is read already.
        deformation: What makes the shape of the mesh. It faces cameras at azimuth 0, which are taken then.

    Raises:
        ValueError: if the mesh or its picture cannot be used, or nothing of the mesh is to be seen.
    """
    generator = generator_of(f"{settings.seed} {entry.id}")
    base_color = BASE_COLOR
    if entry.random_color:
        color = np.array(PLASTIC_COLORS[generator.integers(len(PLASTIC_COLORS))])
        red, green, blue = np.clip(color + generator.uniform(-0.04, 0.04, 3), 0.02, 0.98).tolist()
        base_color = (red, green, blue)
    images: list[Image.Image] = []
    cameras: list[Camera] = []
    if settings.num_views:
        surface = (file or MeshFile(entry)).surface(base_color)
        azimuth_range = settings.azimuth_range
        if deformation is not None:
            surface, azimuth_range = deformation.surface(surface), (0.0, 0.0)
        if settings.renderer == "raster":
            images, cameras = _rasterized(surface, azimuth_range, settings, generator, device)
        else:
            images, cameras = _ray_cast(surface, azimuth_range, settings, generator)
        cameras = [camera.around(surface) for camera in cameras]
    if entry.image is not None:
        with Image.open(entry.image) as given:
            images.append(square_image(given, settings.image_size))
    files = []
    for number, image in enumerate(images):
        if not image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox():
            raise ValueError(f"Image {number} must show something of the mesh, got one that is transparent everywhere")
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=settings.webp_quality, method=4)
        files.append(buffer.getvalue())
    return Pictures(files, cameras, int(entry.image is not None))


def _ray_cast(
    surface: Surface, azimuth_range: tuple[float, float], settings: Settings, generator: np.random.Generator
) -> tuple[list[Image.Image], list[Camera]]:
    """Random views by the ray caster, from uniform directions and focal lengths."""
    renderer = MeshRenderer(surface)
    images, cameras = [], []
    for _ in range(settings.num_views):
        ranges = (azimuth_range, settings.elevation_range, settings.focal_range)
        azimuth, elevation, focal_length = [generator.uniform(*limits) for limits in ranges]
        camera = Camera(azimuth, elevation, focal_length, 0.0)
        key_light = (generator.uniform(-70, 70), generator.uniform(25, 70))
        images.append(renderer.render(*camera[:3], settings.image_size, crop=True, sky_rays=4, key_light=key_light))
        cameras.append(camera)
    return images, cameras


def _rasterized(
    surface: Surface,
    azimuth_range: tuple[float, float],
    settings: Settings,
    generator: np.random.Generator,
    device: torch.device | str,
) -> tuple[list[Image.Image], list[Camera]]:
    """Random views by the rasteriser, with random materials and light, see `random_views`."""
    ranges = (azimuth_range, settings.elevation_range, settings.focal_range)
    packed = PackedSurfaces.pack([surface], device)
    views = random_views(settings.num_views, generator, *ranges, own_colors=not bool(packed.is_plain[0]))
    with _one_thread():
        pixels = rasterize_views(packed, torch.zeros(len(views), dtype=torch.long), views, settings.image_size)
    images = [Image.fromarray(image, "RGBA") for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    shown = views.cameras
    values = torch.stack([shown.azimuth, shown.elevation, shown.focal_mm, shown.roll], 1)
    return images, [Camera(*row) for row in values.tolist()]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of PyTorch in a `with` block: elementary functions are rounded by the shares that threads have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def square_image(image: Image.Image, size: int) -> Image.Image:
    """Crops the square around an image's foreground, framed like a render, to `size` pixels; RGBA.

    Raises:
        ValueError: if the image has neither alpha nor a plain background.
    """
    image = ImageOps.exif_transpose(image).convert("RGBA")
    if alpha_of_object(image) is None:
        mask = plain_background_mask(image)
        if mask is None:
            raise ValueError("A picture of a mesh must have alpha or a plain background, got one without")
        image.putalpha(mask)
    box = image.getchannel("A").getbbox() or (0, 0, *image.size)
    half = 0.54 * max(box[2] - box[0], box[3] - box[1])
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    window = (round(x - half), round(y - half), round(x + half), round(y + half))
    # Premultiplied alpha keeps the colour of transparent pixels out of the interpolation.
    return image.crop(window).convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def write_pictures(pictures: Pictures, folder: Path) -> None:
    """Writes pictures into a folder as 0.webp, 1.webp, ..., with their cameras; it is complete or absent."""
    with complete_folder(folder) as partial:
        for number, file in enumerate(pictures.files):
            (partial / f"{number}.webp").write_bytes(file)
        with (partial / CAMERAS_FILE).open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerows([Camera._fields, *pictures.cameras])


def read_pictures(entry: MeshEntry, folder: Path) -> Pictures:
    """Reads the pictures of a mesh from the subfolder with its id: 0.webp, 1.webp, ...; the given one is the last.

    Raises:
        ValueError: if there are none, or their names are no numbers.
    """
    paths = list((folder / entry.id).glob("*.webp"))
    if not paths or not all(path.stem.isdecimal() for path in paths):
        raise ValueError(
            f"`images_dir` must have pictures 0.webp, 1.webp, ... of each mesh, {folder / entry.id} has none"
        )
    paths.sort(key=lambda path: int(path.stem))
    return Pictures(
        [path.read_bytes() for path in paths], _read_cameras(folder / entry.id), int(entry.image is not None)
    )


def _read_cameras(folder: Path) -> list[Camera]:
    """The cameras of a folder of pictures, or their azimuths alone, or none, as it has them."""
    if (folder / CAMERAS_FILE).exists():
        with (folder / CAMERAS_FILE).open(newline="", encoding="utf-8") as table:
            rows: list[dict[str, Any]] = list(csv.DictReader(table))
        return [Camera(*(float(row.get(name, "nan")) for name in Camera._fields)) for row in rows]
    if (folder / AZIMUTHS_FILE).exists():
        return [Camera(float(word)) for word in (folder / AZIMUTHS_FILE).read_text(encoding="utf-8").split()]
    return []
