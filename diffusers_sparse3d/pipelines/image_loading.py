"""Pictures of every kind as PIL images of 8 bits a channel: files, URLs, bytes, arrays, tensors, all modes of PIL."""

from __future__ import annotations

import os
from io import BytesIO
from typing import IO, Any

import numpy as np
from diffusers.utils import load_image
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


ImageInput = Image.Image | str | os.PathLike | bytes | IO[bytes] | np.ndarray | Tensor

# Modes of PIL whose values are no bytes.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
ORIENTATION_TAG = 0x0112
# Rows of an array in one pass.
CHUNK_ROWS = 256


def load_images(
    images: ImageInput | list[ImageInput] | list[list[ImageInput]], name: str = "image"
) -> list[Image.Image]:
    """One PIL image for each image given, of any mode, upright according to its EXIF tag.

    Args:
        images: an image or a list of images: PIL image, path, URL, bytes of an image file, a file opened for reading
            bytes, array `[H, W]`, `[H, W, C]` or `[B, H, W, C]`, tensor `[H, W]`, `[C, H, W]` or `[B, C, H, W]`; C is
            1, 3 or 4, uint8, uint16 or floating point in [0, 1]. An animation counts as its first picture.
        name: what to call the argument in errors.

    Raises:
        ValueError: if it is none of these, the list is empty, or what it names or holds is no image, is damaged, or
            has no pixels.
        OSError: if there is no such file, or it may not be read.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"`{name}` must hold at least one image, got an empty list")
        return [loaded for image in images for loaded in load_images(image, name)]
    if isinstance(images, Tensor):
        images = _to_array(images, name)
    if isinstance(images, np.ndarray):
        if images.size == 0:
            raise ValueError(f"`{name}` must have pixels, got the shape {list(images.shape)}")
        return [_to_pil(image, name) for image in (images if images.ndim == 4 else images[None])]
    if not isinstance(images, Image.Image):
        images = _open_image(images, name)
    if 0 in images.size:
        raise ValueError(f"`{name}` must have pixels, got {images.size[0]} x {images.size[1]}")
    return [_upright(images, name)]


def _to_array(tensor: Tensor, name: str) -> np.ndarray:
    """The array `[H, W]`, `[H, W, C]` or `[B, H, W, C]` of a tensor whose channels come before the rows."""
    if tensor.is_meta or tensor.is_sparse:
        raise ValueError(f"`{name}` must be a dense tensor with data, got one of layout {tensor.layout}")
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16.
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return (tensor.movedim(-3, -1) if tensor.ndim > 2 else tensor).numpy()


def _to_pil(array: np.ndarray, name: str) -> Image.Image:
    """PIL image of an array `[H, W]` or `[H, W, 1 | 3 | 4]`, uint8, uint16 or floating point in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"`{name}` must have 1, 3 or 4 channels, as [H, W, C] (arrays) or [C, H, W] (tensors), got the shape"
            f" {list(array.shape)}"
        )
    if array.dtype != np.uint8:
        largest = 65535 if array.dtype == np.uint16 else 1 if array.dtype.kind in "bf" else None
        array = _to_bytes(array, largest, name)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_bytes(array: np.ndarray, largest: float | None, name: str) -> np.ndarray:
    """The values of an array as bytes: 0 remains 0, and `largest` becomes 255."""
    message = f"`{name}` must be uint8, uint16 or floating point with values in [0, 1], got {array.dtype}"
    if largest is None:
        raise ValueError(message)
    result = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), CHUNK_ROWS):
        rows = array[start : start + CHUNK_ROWS].astype(np.float32)
        # The comparison is written so that NaN fails too.
        if not ((rows >= 0) & (rows <= largest)).all():
            values = "NaN" if np.isnan(rows).any() else f"values from {rows.min():.4g} to {rows.max():.4g}"
            raise ValueError(f"{message} with {values}")
        result[start : start + CHUNK_ROWS] = np.round(rows * (255 / largest))
    return result


def _open_image(source: Any, name: str) -> Image.Image:
    """The image at a path or a URL, in bytes or in an open file, with all its pixels read."""
    is_url = isinstance(source, str) and source.startswith(("http://", "https://"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = BytesIO(source)
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise ValueError(
            f"`{name}` must be a PIL image, path, URL, bytes, file, array, tensor or list of these, got {type(source)}"
        )
    try:
        image = load_image(source, convert_method=lambda image: image) if is_url else Image.open(source)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"`{name}` must be an image in a format that PIL reads: {error}") from error
    except Exception as error:
        # The file system's errors have a number. PIL meets damaged files with errors of many classes.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if is_url and isinstance(error, OSError):
            raise ValueError(f"`{name}` cannot be read from its URL: {error}") from error
        raise ValueError(f"`{name}` cannot be read, the file is damaged or too large: {error}") from error
    return image


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The image, turned as its EXIF tag says; itself if there is nothing to turn."""
    try:
        if image.getexif().get(ORIENTATION_TAG, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise ValueError(f"`{name}` has EXIF data that cannot be read: {error}") from error


def to_eight_bits(image: Image.Image, name: str = "image") -> Image.Image:
    """
    The image as "RGBA" if it has alpha of any kind (a channel, also premultiplied, a palette's or one transparent
    colour), else as "RGB". Itself if it is that already.

    16 bits become 8. Values of the modes "I" and "F" are taken for bytes if they fit; otherwise for 16 bits in "I",
    and as 0 to 1 in "F".

    Args:
        image: of any mode.
        name: what to call the argument in errors.

    Raises:
        ValueError: if values are out of range, or PIL does not convert the mode.
    """
    if image.mode in ("RGB", "RGBA") and "transparency" not in image.info:
        return image
    transparent = image.info.get("transparency")
    if image.mode in DEEP_MODES:
        values = np.asarray(image)
        gray = Image.fromarray(_to_bytes(values, _largest_of(values, image.mode), name))
        if not isinstance(transparent, int):
            return gray.convert("RGB")
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return gray.convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    palette = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "PA") or transparent is not None or palette.endswith("A")
    try:
        return image.convert("RGBA" if has_alpha else "RGB")
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}` must be of a mode that PIL converts to RGB, got {image.mode}: {error}") from error


def _largest_of(values: np.ndarray, mode: str) -> float:
    """The value that stands for white in an image of one of `DEEP_MODES`."""
    if mode == "F":
        return 1 if values.max() <= 1 else 255
    return 255 if mode == "I" and values.max() <= 255 else 65535
