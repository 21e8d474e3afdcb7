"""One mesh of a dataset: its pictures, and a file with its SDFs and occupancy."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from ...geometry.mesh import load_mesh
from ...geometry.render import BASE_COLOR, UP_ROTATIONS, MeshRenderer
from ...geometry.sdf import mesh_to_sdf_blocks
from ...pipelines.image_processor import plain_background_mask
from .index import MeshEntry


AZIMUTHS_FILE = "azimuths.txt"
# sRGB colours in which plastic things are often made, for meshes that have no colours of their own.
PLASTIC_COLORS = [
    (0.79, 0.10, 0.04), (0.00, 0.33, 0.75), (0.95, 0.80, 0.20), (0.14, 0.47, 0.25), (0.95, 0.95, 0.93),
    (0.63, 0.65, 0.66), (0.42, 0.43, 0.41), (0.13, 0.14, 0.15), (1.00, 0.50, 0.08), (0.35, 0.20, 0.12),
    (0.87, 0.78, 0.61), (0.58, 0.73, 0.24), (0.27, 0.65, 0.83), (0.98, 0.68, 0.75), (0.36, 0.18, 0.55),
    (0.45, 0.10, 0.13), (0.04, 0.20, 0.36), (0.10, 0.56, 0.53), (0.75, 0.62, 0.45), (0.84, 0.86, 0.88),
]  # fmt: skip


@dataclass
class Options:
    """Settings of the preparation of a mesh, which are sent to the worker processes.

    Attributes:
        renders: Folder of the renders of each mesh.
        items: Folder of the files of finished meshes.
        make_renders: Whether to render the meshes; otherwise their renders must be there.
        make_sdfs: Whether to compute the SDFs.
        resolutions: Samples per axis of the SDFs.
        num_views: Renders per mesh.
        image_size: Edge of the renders in pixels.
        azimuth_range: Range of the azimuths in degrees.
        elevation_range: Range of the elevations in degrees.
        focal_range: Range of the focal lengths in mm.
        webp_quality: Quality of the WebP files, from 0 to 100.
        seed: Seed of views and colours.
        device: Device that computes the distances.
    """

    renders: Path
    items: Path
    make_renders: bool
    make_sdfs: bool
    resolutions: list[int]
    num_views: int
    image_size: int
    azimuth_range: tuple[float, float]
    elevation_range: tuple[float, float]
    focal_range: tuple[float, float]
    webp_quality: int
    seed: int
    device: str = "cpu"

    def num_images(self, entry: MeshEntry) -> int:
        """Returns the number of renders and given images that a finished mesh has."""
        return self.num_views + (entry.image is not None)

    def image_paths(self, entry: MeshEntry) -> list[Path]:
        """Returns the images that a mesh has, in order."""
        return sorted((self.renders / entry.id).glob("*.webp"), key=lambda path: int(path.stem))

    def azimuths(self, entry: MeshEntry) -> str:
        """Returns the azimuths of the renders in degrees; an empty string for renders that came from elsewhere."""
        path = self.renders / entry.id / AZIMUTHS_FILE
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def item_path(self, entry: MeshEntry) -> Path:
        """Returns the file of a mesh between its preparation and its place in a shard."""
        return self.items / f"{entry.id}.safetensors"

    def is_done(self, entry: MeshEntry) -> bool:
        """Whether nothing of a mesh is missing."""
        rendered = not self.make_renders or len(self.image_paths(entry)) == self.num_images(entry)
        return rendered and (not self.make_sdfs or self.item_path(entry).exists())


def prepare_entry(entry: MeshEntry, options: Options) -> None:
    """Makes the missing parts of one mesh: renders and SDFs."""
    if options.make_renders and len(options.image_paths(entry)) != options.num_images(entry):
        write_renders(entry, options)
    if options.make_sdfs:
        write_item(entry, options)


def write_renders(entry: MeshEntry, options: Options) -> None:
    """Renders a mesh from random directions into RENDERS/ID/0.webp, 1.webp, ...; its given image comes last. The
    azimuths of the renders go into azimuths.txt."""
    digest = hashlib.sha1(f"{options.seed} {entry.id}".encode()).digest()
    generator = np.random.default_rng(list(digest))
    base_color = BASE_COLOR
    if entry.random_color:
        color = np.array(PLASTIC_COLORS[generator.integers(len(PLASTIC_COLORS))])
        red, green, blue = np.clip(color + generator.uniform(-0.04, 0.04, 3), 0.02, 0.98).tolist()
        base_color = (red, green, blue)
    renderer = MeshRenderer(entry.mesh, up_axis=entry.up_axis, base_color=base_color)
    images, azimuths = [], []
    for _ in range(options.num_views):
        ranges = (options.azimuth_range, options.elevation_range, options.focal_range)
        azimuth, elevation, focal_length = [generator.uniform(*limits) for limits in ranges]
        key_light = (generator.uniform(-70, 70), generator.uniform(25, 70))
        azimuths.append(f"{azimuth:.1f}")
        view = (azimuth, elevation, focal_length, options.image_size)
        images.append(renderer.render(*view, crop=True, sky_rays=4, key_light=key_light))
    if entry.image is not None:
        images.append(square_image(Image.open(entry.image), options.image_size))
    temporary = options.renders / f".{entry.id}"
    temporary.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        if not image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox():
            raise ValueError(f"Image {k} must show something of the mesh, got one that is transparent everywhere")
        image.save(temporary / f"{k}.webp", quality=options.webp_quality, method=4)
    (temporary / AZIMUTHS_FILE).write_text(" ".join(azimuths) + "\n", encoding="utf-8")
    target = options.renders / entry.id
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


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


def write_item(entry: MeshEntry, options: Options) -> None:
    """Computes the SDFs of a mesh and writes them, with its images, to a file that `pack_shards` takes up."""
    images = options.image_paths(entry)
    if not images:
        raise ValueError(f"{options.renders / entry.id} must hold images, got none")
    mesh = load_mesh(entry.mesh)
    mesh.vertices = mesh.vertices @ UP_ROTATIONS[entry.up_axis].T
    tensors = {f"images/{k}": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
               for k, path in enumerate(images)}  # fmt: skip
    for resolution in options.resolutions:
        blocks = mesh_to_sdf_blocks(mesh, resolution, progress=False, device=options.device)
        coords, values = blocks.coords.to(torch.uint8), blocks.values.reshape(-1, 512)
        # Values of the band stay below 1 in absolute value: this is the largest float16 below 1.
        limit = 1 - 2**-11
        values = torch.where(values.abs() < 1, values.clamp(-limit, limit), values).half()
        sharp = np.packbits(blocks.sharp.reshape(-1, 512).numpy(), axis=1)
        tensors[f"sdf_{resolution}/coords"] = coords
        tensors[f"sdf_{resolution}/values"] = values
        tensors[f"sdf_{resolution}/sharp"] = torch.from_numpy(sharp)
        if resolution == min(options.resolutions):
            occupancy = np.zeros((resolution // 8,) * 3, dtype=bool)
            occupancy[tuple(blocks.coords.T.numpy())] = True
            tensors["occupancy"] = torch.from_numpy(np.packbits(occupancy))
    path = options.item_path(entry)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary)
    temporary.rename(path)
