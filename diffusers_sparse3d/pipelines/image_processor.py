"""Preprocessing of images for the image encoder: the object cropped, centred and on white, and its mask."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from typing import IO, Any

import numpy as np
import torch
from diffusers.utils import load_image
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


ImageInput = Image.Image | str | os.PathLike | bytes | IO[bytes] | np.ndarray | Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _to_pil(array: np.ndarray, name: str) -> Image.Image:
    """PIL image of an array `[H, W]` or `[H, W, 1 | 3 | 4]`, uint8 or floating point in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"`{name}` must have 1, 3 or 4 channels, as [H, W, C] (arrays) or [C, H, W] (tensors)")
    if array.dtype == bool:
        array = array.astype(np.float32)
    if array.dtype != np.uint8:
        # The comparisons are written so that NaN fails too.
        if not (np.issubdtype(array.dtype, np.floating) and (array >= 0).all() and (array <= 1).all()):
            raise ValueError(f"`{name}` must be uint8 or floating point with values in [0, 1]")
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def load_images(
    images: ImageInput | list[ImageInput] | list[list[ImageInput]], name: str = "image"
) -> list[Image.Image]:
    """One PIL image for each image given, as it is (any mode), upright according to its EXIF tag.

    Args:
        images: an image or a list of images: PIL image, path, URL, bytes of an image file, a file opened for reading
            bytes, array `[H, W]`, `[H, W, C]` or `[B, H, W, C]`, tensor `[H, W]`, `[C, H, W]` or `[B, C, H, W]`; C is
            1, 3 or 4, uint8 or floating point in [0, 1].
        name: what to call the argument in errors.

    Raises:
        ValueError: if it is none of these, the list is empty, or what it names or holds is no image.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"`{name}` must hold at least one image, got an empty list")
        return [loaded for image in images for loaded in load_images(image, name)]
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images
        images = (images.movedim(-3, -1) if images.ndim > 2 else images).numpy()
    if isinstance(images, np.ndarray):
        return [_to_pil(image, name) for image in (images if images.ndim == 4 else images[None])]
    if not isinstance(images, Image.Image):
        images = _open_image(images, name)
    return [ImageOps.exif_transpose(images)]


def _open_image(source: Any, name: str) -> Image.Image:
    """The image at a path or a URL, in bytes or in an open file."""
    is_url = isinstance(source, str) and source.startswith(("http://", "https://"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = BytesIO(source)
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise ValueError(
            f"`{name}` must be a PIL image, path, URL, bytes, file, array, tensor or list of these, got {type(source)}"
        )
    try:
        return load_image(source, convert_method=lambda image: image) if is_url else Image.open(source)
    except UnidentifiedImageError as error:
        raise ValueError(f"`{name}` must be an image in a format that PIL reads: {error}") from error


def plain_background_mask(image: Image.Image, tolerance: int = 16, border_share: float = 0.9) -> Image.Image | None:
    """The foreground in front of a plain background: a flood fill from the border of the image.

    Simple on purpose: cast shadows, and background that shows through a closed loop, count as foreground.

    Args:
        image: RGB image.
        tolerance: largest difference of a channel, of 255, from the median colour of the border.
        border_share: share of the border's pixels that must be within the tolerance.

    Returns:
        Mode "L" mask, 255 on the foreground; None if the border is not nearly of one colour.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).short()
    border = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    similar = (pixels - border.median(dim=0).values).abs().amax(dim=-1) <= tolerance
    on_border = torch.ones_like(similar)
    on_border[1:-1, 1:-1] = False
    if similar[on_border].float().mean() < border_share:
        return None

    # The fill sweeps along rows and columns, both ways. A pixel is reached if the last reached pixel behind it comes
    # after the last obstacle. A few rounds are enough for everyday shapes.
    reached, count = similar & on_border, 0
    while count != (count := int(reached.sum())):
        for axis in (0, 1):
            for backwards in (False, True):
                sources, obstacles = (t.flip(axis) if backwards else t for t in (reached, ~similar))
                position = torch.arange(1, sources.shape[axis] + 1)
                position = position[:, None] if axis == 0 else position
                last_source = (sources * position).cummax(axis).values
                last_obstacle = (obstacles * position).cummax(axis).values
                swept = last_source > last_obstacle
                reached = reached | (swept.flip(axis) if backwards else swept)
    return Image.fromarray((~reached).byte().mul(255).numpy())


class Sparse3DImageProcessor:
    r"""
    Preprocessing of the conditioning images, on PIL and torch alone.

    Crops to the bounding box of the alpha, composites on white, pads to a square, resizes to `image_size`, pads by
    `padding` (white), resizes to `image_size` again; the mask goes the same way with nearest neighbour.

    Args:
        image_size (`int`, defaults to `518`): Edge of the result in pixels, a multiple of `patch_size`.
        patch_size (`int`, defaults to `14`): Edge of the image encoder's patches.
        padding (`int`, *optional*): Margin in pixels; if not given, 16 at 518 pixels and in proportion at other sizes.
        alpha_threshold (`float`, defaults to `0.04`):
            A pixel is foreground where alpha, from 0 to 1, is greater: faint haze of a matting model is not.

    Raises:
        ValueError: if `image_size` is not a multiple of `patch_size`.
    """

    def __init__(
        self, image_size: int = 518, patch_size: int = 14, padding: int | None = None, alpha_threshold: float = 0.04
    ):
        if image_size % patch_size:
            raise ValueError(f"`image_size` must be a multiple of `patch_size` {patch_size}, got {image_size}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.padding = round(16 * image_size / 518) if padding is None else padding
        self.alpha_threshold = alpha_threshold

    def preprocess(
        self,
        image: ImageInput | list[ImageInput],
        mask_image: ImageInput | list[ImageInput] | list[list[ImageInput]] | None = None,
        background_remover: Callable[[Image.Image], Image.Image] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Preprocess images.

        The foreground comes, in this order, from `mask_image`, from the image's alpha (RGBA, LA or with a transparent
        palette; an alpha that is opaque everywhere does not count), from `background_remover`, or from a flood fill if
        the background is plain.

        Args:
            image: PIL image, path, URL, bytes, file, array, tensor, or a list of these: see `load_images`.
            mask_image: one mask per image, white on the foreground, of the size of its image.
            background_remover: maps an RGB image to an RGBA image or an "L" mask of the same size, for example
                `rembg.remove`.

        Returns:
            `pixel_values [B, 3, S, S]` float32 with ImageNet's mean and deviation, and `mask [B, 1, S, S]` float32, 1
            on the foreground.

        Raises:
            ValueError: if an image has no foreground, if its foreground is not known, or for input of another kind.
        """
        images = load_images(image)
        masks: list[Image.Image | None] = [None] * len(images)
        if mask_image is not None:
            masks = [*load_images(mask_image, "mask_image")]
        if len(masks) != len(images):
            raise ValueError(f"`mask_image` must hold a mask for each of {len(images)} images, got {len(masks)} masks")
        prepared = [
            self._prepare(self._with_alpha(image, mask, background_remover, index), index)
            for index, (image, mask) in enumerate(zip(images, masks))
        ]
        rgb = torch.stack([image_tensor for image_tensor, _ in prepared])
        foreground = torch.stack([mask_tensor for _, mask_tensor in prepared])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (rgb - mean) / std, foreground

    def _with_alpha(
        self,
        image: Image.Image,
        mask: Image.Image | None,
        background_remover: Callable[[Image.Image], Image.Image] | None,
        index: int,
    ) -> Image.Image:
        """The image as RGBA with its foreground as alpha; see `preprocess` for the order of the sources."""
        rgba = image.convert("RGBA")
        if mask is not None:
            if mask.size != image.size:
                raise ValueError(
                    f"`mask_image` {index} must have the size of its image, {image.size} pixels, got {mask.size}"
                )
        elif np.asarray(rgba.getchannel("A")).min() < 255:
            mask = rgba.getchannel("A")
        elif background_remover is not None:
            mask = background_remover(image.convert("RGB"))
            mask = mask.getchannel("A") if mask.mode == "RGBA" else mask
        else:
            mask = plain_background_mask(image)
            if mask is None:
                raise ValueError(
                    f"`image` {index} has no alpha and no plain background, so that its object cannot be told apart."
                    " Give an RGBA image, or pass the object's mask as `mask_image`, or set a background remover (for"
                    " example `pipe.background_remover = rembg.remove`)."
                )
        rgba.putalpha(mask.convert("L"))
        return rgba

    def _prepare(self, image: Image.Image, index: int) -> tuple[Tensor, Tensor]:
        """`[3, S, S]` in [0, 1] and `[1, S, S]` of 0 and 1, from an RGBA image."""
        mask = image.getchannel("A").point(lambda alpha: 255 if alpha > self.alpha_threshold * 255 else 0)
        box = mask.getbbox()
        if box is None:
            raise ValueError(f"`image` {index} has no foreground: its alpha or mask is zero everywhere")
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image).convert("RGB")
        return (
            self._frame(rgb.crop(box), "white", Image.Resampling.BICUBIC),
            self._frame(mask.crop(box), 0, Image.Resampling.NEAREST),
        )

    def _frame(self, picture: Image.Image, fill: str | int, resample: Image.Resampling) -> Tensor:
        """`[C, S, S]` float32 in [0, 1]: the picture padded to a square, resized, with a margin, resized again."""
        edge = max(picture.size)
        square = Image.new(picture.mode, (edge, edge), fill)
        square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
        square = square.resize((self.image_size, self.image_size), resample)
        square = ImageOps.expand(square, self.padding, fill)
        square = square.resize((self.image_size, self.image_size), resample)
        array = np.array(square, dtype=np.float32).reshape(self.image_size, self.image_size, -1) / 255
        return torch.from_numpy(array).permute(2, 0, 1)
