"""The conditioning pictures of a mesh: renders from random views, or those of a folder, and the one it came with."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ...geometry.render import BASE_COLOR, MeshRenderer
from ...pipelines.image_processor import plain_background_mask
from ..files import complete_folder
from .index import MeshEntry
from .settings import Settings


AZIMUTHS_FILE = "azimuths.txt"
# sRGB colours in which plastic things are often made, for meshes that have no colours of their own.
PLASTIC_COLORS = [
    (0.79, 0.10, 0.04), (0.00, 0.33, 0.75), (0.95, 0.80, 0.20), (0.14, 0.47, 0.25), (0.95, 0.95, 0.93),
    (0.63, 0.65, 0.66), (0.42, 0.43, 0.41), (0.13, 0.14, 0.15), (1.00, 0.50, 0.08), (0.35, 0.20, 0.12),
    (0.87, 0.78, 0.61), (0.58, 0.73, 0.24), (0.27, 0.65, 0.83), (0.98, 0.68, 0.75), (0.36, 0.18, 0.55),
    (0.45, 0.10, 0.13), (0.04, 0.20, 0.36), (0.10, 0.56, 0.53), (0.75, 0.62, 0.45), (0.84, 0.86, 0.88),
]  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """The pictures of a mesh.

    Attributes:
        files: A WebP or PNG file with alpha each; renders come first, a given picture comes last.
        azimuths: Azimuths of the renders in degrees; fewer than there are pictures where they are not known.
        given: Number of pictures that came with the mesh.
    """

    files: list[bytes]
    azimuths: list[float]
    given: int


def make_pictures(entry: MeshEntry, settings: Settings) -> Pictures:
    """Renders a mesh from random directions, which its id and the seed decide, and adds the picture it came with.

    Raises:
        ValueError: if the mesh or its picture cannot be used, or nothing of the mesh is to be seen.
    """
    digest = hashlib.sha1(f"{settings.seed} {entry.id}".encode()).digest()
    generator = np.random.default_rng(list(digest))
    base_color = BASE_COLOR
    if entry.random_color:
        color = np.array(PLASTIC_COLORS[generator.integers(len(PLASTIC_COLORS))])
        red, green, blue = np.clip(color + generator.uniform(-0.04, 0.04, 3), 0.02, 0.98).tolist()
        base_color = (red, green, blue)
    images, azimuths = [], []
    if settings.num_views:
        renderer = MeshRenderer(entry.mesh, up_axis=entry.up_axis, base_color=base_color)
    for _ in range(settings.num_views):
        ranges = (settings.azimuth_range, settings.elevation_range, settings.focal_range)
        azimuth, elevation, focal_length = [generator.uniform(*limits) for limits in ranges]
        key_light = (generator.uniform(-70, 70), generator.uniform(25, 70))
        azimuths.append(round(azimuth, 1))
        view = (azimuth, elevation, focal_length, settings.image_size)
        images.append(renderer.render(*view, crop=True, sky_rays=4, key_light=key_light))
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
    return Pictures(files, azimuths, int(entry.image is not None))


def square_image(image: Image.Image, size: int) -> Image.Image:
    """Crops the square around an image's foreground, framed like a render, to `size` pixels; RGBA.

    Raises:
        ValueError: if the image has neither alpha nor a plain background.
    """
    image = ImageOps.exif_transpose(image).convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
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
    """Writes pictures into a folder as 0.webp, 1.webp, ..., with their azimuths; it is complete or absent."""
    with complete_folder(folder) as partial:
        for number, file in enumerate(pictures.files):
            (partial / f"{number}.webp").write_bytes(file)
        text = " ".join(f"{azimuth:.1f}" for azimuth in pictures.azimuths)
        (partial / AZIMUTHS_FILE).write_text(text + "\n", encoding="utf-8")


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
    azimuths = folder / entry.id / AZIMUTHS_FILE
    text = azimuths.read_text(encoding="utf-8") if azimuths.exists() else ""
    files = [path.read_bytes() for path in paths]
    return Pictures(files, [float(word) for word in text.split()], int(entry.image is not None))
