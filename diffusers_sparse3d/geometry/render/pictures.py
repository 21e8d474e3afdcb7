"""
Pictures composed of several views: a preview of one mesh, and meshes side by side.
"""

import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..mesh import MeshLike
from .renderer import render_mesh_views


AZIMUTHS = (25.0, 115.0, 205.0, 295.0)
LABEL_HEIGHT = 28


def preview(mesh: MeshLike, image: Image.Image | None = None, size: int = 384, style: str = "shaded") -> Image.Image:
    """
    A row of pictures: a photo, if given, and a mesh from four sides.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load; y up.
        image: the photo; transparent parts become white.
        size: width and height in pixels of each picture in the row.
        style: of the mesh, see [`render_mesh_views`].

    Returns:
        An RGB picture, `size` pixels high and 4 or 5 times as wide.

    Raises:
        ValueError: if `mesh` has no triangle with a positive area and finite vertices.
        ImportError: if `embreex` is missing.
    """
    pictures = view_pictures(mesh, AZIMUTHS, size, style)
    if image is not None:
        pictures.insert(0, _fitted(image, size))
    return _row(pictures, size)


def side_by_side(
    meshes: Sequence[MeshLike],
    labels: Sequence[str] | None = None,
    image: Image.Image | None = None,
    size: int = 256,
    columns: int = 4,
    style: str = "shaded",
) -> Image.Image:
    """
    A sheet of meshes, each from the front and, smaller, from behind, with labels: to compare seeds or models.

    Args:
        meshes: meshes, scenes or files that trimesh can load; y up.
        labels: a line of text under each mesh; none if None.
        image: a photo for the first place.
        size: width and height in pixels of each place.
        columns: places in a row.
        style: of the meshes, see [`render_mesh_views`].

    Returns:
        An RGB picture.

    Raises:
        ValueError: if there is no mesh, a mesh has no usable triangle, or there is not one label a mesh.
        ImportError: if `embreex` is missing.
    """
    if not meshes:
        raise ValueError("`meshes` must hold at least one mesh, got none")
    if labels is not None and len(labels) != len(meshes):
        raise ValueError(f"`labels` must be one for each of {len(meshes)} meshes, got {len(labels)}")
    places = [] if image is None else [(_fitted(image, size), "")]
    for mesh, label in zip(meshes, labels or [""] * len(meshes)):
        front, behind = view_pictures(mesh, (AZIMUTHS[0], AZIMUTHS[2]), size, style)
        place = Image.new("RGBA", (size, size), "white")
        place.alpha_composite(front)
        corner = behind.resize((size // 3, size // 3), Image.Resampling.LANCZOS)
        place.alpha_composite(corner, (size - corner.width, 0))
        places.append((place, label))
    columns = min(columns, len(places))
    height = size + (LABEL_HEIGHT if labels else 0)
    sheet = Image.new("RGB", (columns * size, -(-len(places) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, (picture, label) in enumerate(places):
        left, top = index % columns * size, index // columns * height
        sheet.paste(picture.convert("RGB"), (left, top))
        draw.text((left + size / 2, top + size + LABEL_HEIGHT / 2), label, fill="black", font=font, anchor="mm")
    return sheet


def view_pictures(mesh: MeshLike, azimuths: Sequence[float], size: int, style: str) -> list[Image.Image]:
    """RGBA pictures of a mesh from slightly above, in good light, with a shadow on the ground where it is shaded."""
    views = [(azimuth, 20.0, 60.0) for azimuth in azimuths]
    threads = min(len(views), os.cpu_count() or 1)
    shadow = style == "shaded"
    return render_mesh_views(
        mesh, views, size, ground_shadow=shadow, sky_rays=12, margin=1.06, num_threads=threads, style=style
    )


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """A photo, scaled to fit a square, in the middle of it on white."""
    photo = image.convert("RGBA")
    scale = size / max(photo.size)
    width, height = (max(1, round(edge * scale)) for edge in photo.size)
    photo = photo.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(photo, ((size - photo.width) // 2, (size - photo.height) // 2))
    return square


def _row(pictures: Sequence[Image.Image], size: int) -> Image.Image:
    row = Image.new("RGBA", (size * len(pictures), size), "white")
    for column, picture in enumerate(pictures):
        row.alpha_composite(picture, (column * size, 0))
    return row.convert("RGB")
