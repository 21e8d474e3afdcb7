"""Preprocessing of images for the image encoder: the object cropped, centred and on white, and its mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checks import check_integer, check_number
from .image_loading import ImageInput, load_images, to_eight_bits


# The edge of an image, in pixels, in which a mask is searched. Larger ones are reduced for it.
SEARCHED_EDGE = 2048
# An object with more pixels along an edge, relative to the result, is reduced before it is framed.
FRAMED_EDGES = 4
# A pixel is foreground where alpha, from 0 to 1, is greater.
ALPHA_THRESHOLD = 0.04
# Alpha with a smaller share of transparent pixels outlines no object: editors and resampling leave a few.
TRANSPARENT_SHARE = 0.001

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    # Imported here, because few calls need it and it takes a tenth of a second.
    from scipy import ndimage

    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    middle = (len(border) - 1) // 2
    similar = (np.abs(pixels - np.partition(border, middle, axis=0)[middle]) <= tolerance).all(axis=-1)
    on_border = np.ones_like(similar)
    on_border[1:-1, 1:-1] = False
    if similar[on_border].mean() < border_share:
        return None
    regions, count = ndimage.label(similar)
    is_background = np.zeros(count + 1, dtype=bool)
    is_background[regions[on_border]] = True
    is_background[0] = False
    return Image.fromarray(np.where(is_background[regions], 0, 255).astype(np.uint8))


def alpha_of_object(image: Image.Image, alpha_threshold: float = ALPHA_THRESHOLD) -> Image.Image | None:
    """
    The alpha of a picture, of mode "L", if it tells an object from a background; None if the picture is opaque.

    It is opaque without an alpha channel, and with one in which at most a thousandth of the pixels is transparent.

    Args:
        image: of mode "RGB" or "RGBA".
        alpha_threshold: a pixel is transparent where alpha, from 0 to 1, is not greater.
    """
    if image.mode != "RGBA":
        return None
    alpha = image.getchannel("A")
    transparent = sum(alpha.histogram()[: int(alpha_threshold * 255) + 1])
    return alpha if transparent > TRANSPARENT_SHARE * image.width * image.height else None


def read_mask(mask: Image.Image, name: str = "mask_image", alpha_threshold: float = ALPHA_THRESHOLD) -> Image.Image:
    """
    The mask that a picture of any mode stands for, of mode "L": its alpha if it is a cut-out, else its brightness.

    Args:
        mask: the picture.
        name: what to call the argument in errors.
        alpha_threshold: see `alpha_of_object`.

    Raises:
        ValueError: if values are out of range, or PIL does not convert the mode.
    """
    mask = to_eight_bits(mask, name)
    alpha = alpha_of_object(mask, alpha_threshold)
    return mask.convert("L") if alpha is None else alpha


class Sparse3DImageProcessor:
    r"""
    Preprocessing of the conditioning images.

    Crops to the bounding box of the alpha, composites on white, pads to a square, resizes to `image_size`, pads by
    `padding` (white), resizes to `image_size` again; the mask goes the same way with nearest neighbour. An object of
    more than four times `image_size` is reduced first, and backgrounds are searched at up to 2048 pixels.

    Args:
        image_size (`int`, defaults to `518`): Edge of the result in pixels, a multiple of `patch_size`.
        patch_size (`int`, defaults to `14`): Edge of the image encoder's patches.
        padding (`int`, *optional*): Margin in pixels; if not given, 16 at 518 pixels and in proportion at other sizes.
        alpha_threshold (`float`, defaults to `0.04`):
            A pixel is foreground where alpha, from 0 to 1, is greater: faint haze of a matting model is not.

    Raises:
        ValueError: if `image_size` is not a multiple of `patch_size`, or an argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 518,
        patch_size: int = 14,
        padding: int | None = None,
        alpha_threshold: float = ALPHA_THRESHOLD,
    ):
        self.image_size = check_integer("image_size", image_size, 1)
        self.patch_size = check_integer("patch_size", patch_size, 1)
        if image_size % patch_size:
            raise ValueError(f"`image_size` must be a multiple of `patch_size` {patch_size}, got {image_size}")
        self.padding = round(16 * image_size / 518) if padding is None else check_integer("padding", padding, 0)
        self.alpha_threshold = check_number("alpha_threshold", alpha_threshold, 0, 1)

    def preprocess(
        self,
        image: ImageInput | list[ImageInput],
        mask_image: ImageInput | list[ImageInput] | list[list[ImageInput]] | None = None,
        background_remover: Callable[[Image.Image], Image.Image] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Preprocess images.

        The foreground comes, in this order, from `mask_image`, from the image's alpha (RGBA, LA or with a transparent
        palette; an alpha of which at most a thousandth is transparent does not count), from `background_remover`, or
        from a flood fill if the background is plain.

        Args:
            image: PIL image, path, URL, bytes, file, array, tensor, or a list of these: see `load_images`.
            mask_image: one mask per image, white on the foreground or a cut-out whose alpha counts, of the size of its
                image.
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
            self._prepare(to_eight_bits(image), mask, background_remover, index)
            for index, (image, mask) in enumerate(zip(images, masks))
        ]
        rgb = torch.stack([image_tensor for image_tensor, _ in prepared])
        foreground = torch.stack([mask_tensor for _, mask_tensor in prepared])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (rgb - mean) / std, foreground

    def _prepare(
        self,
        image: Image.Image,
        mask: Image.Image | None,
        background_remover: Callable[[Image.Image], Image.Image] | None,
        index: int,
    ) -> tuple[Tensor, Tensor]:
        """`[3, S, S]` in [0, 1] and `[1, S, S]` of 0 and 1, from an RGB or RGBA image."""
        image, alpha, missing = _foreground(image, mask, background_remover, self.alpha_threshold, index)
        box = self._is_foreground(alpha).getbbox()
        if box is None:
            raise ValueError(f"`image` {index} has no foreground: {missing}")
        factor = -(-max(box[2] - box[0], box[3] - box[1]) // (FRAMED_EDGES * self.image_size))
        picture, alpha = (part.reduce(factor, box) if factor > 1 else part.crop(box) for part in (image, alpha))
        if picture.mode == "RGB":
            picture = picture.convert("RGBA")
            picture.putalpha(alpha)
        white = Image.new("RGBA", picture.size, "white")
        rgb = Image.alpha_composite(white, picture).convert("RGB")
        framed = self._frame(self._is_foreground(picture.getchannel("A")), 0, Image.Resampling.NEAREST)
        if not framed.any():
            raise ValueError(
                f"`image` {index} has no foreground at {self.image_size} pixels: its object is {box[2] - box[0]} x"
                f" {box[3] - box[1]} pixels, too narrow for its length"
            )
        return self._frame(rgb, "white", Image.Resampling.BICUBIC), framed

    def _is_foreground(self, alpha: Image.Image) -> Image.Image:
        """Mask of mode "L", 255 where alpha is above the threshold."""
        return alpha.point([255 if value > self.alpha_threshold * 255 else 0 for value in range(256)])

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


def _foreground(
    image: Image.Image,
    mask: Image.Image | None,
    background_remover: Callable[[Image.Image], Image.Image] | None,
    alpha_threshold: float,
    index: int,
) -> tuple[Image.Image, Image.Image, str]:
    """
    The foreground of an RGB or RGBA image, see `Sparse3DImageProcessor.preprocess` for the order of its sources.

    Returns:
        The image, RGBA only if the foreground is its own alpha; the alpha, of mode "L" and the size of the image; and
        what is the matter if the alpha is zero everywhere.
    """
    if mask is not None:
        if mask.size != image.size:
            raise ValueError(
                f"`mask_image` {index} must have the size of its image, {image.size} pixels, got {mask.size}"
            )
        alpha = read_mask(mask, "mask_image", alpha_threshold)
        return image.convert("RGB"), alpha, "its `mask_image` is black everywhere"
    own_alpha = alpha_of_object(image, alpha_threshold)
    if own_alpha is not None:
        highest = own_alpha.getextrema()[1]
        faint = f"nowhere more opaque than {highest} of 255" if highest else "zero everywhere"
        return image, own_alpha, f"its alpha is {faint}"
    image = image.convert("RGB")
    factor = -(-max(image.size) // SEARCHED_EDGE)
    searched = image.reduce(factor) if factor > 1 else image
    if background_remover is None:
        missing = "it is of one colour, or its object has that of the background"
        found = plain_background_mask(searched)
    else:
        missing = "the background remover found none"
        found = _removed_background(background_remover, searched)
    if found is None:
        raise ValueError(
            f"`image` {index} has no alpha and no plain background, so that its object cannot be told apart. Give an"
            " RGBA image, or pass the object's mask as `mask_image`, or set a background remover (for example"
            " `pipe.background_remover = rembg.remove`)."
        )
    return image, found.resize(image.size, Image.Resampling.NEAREST), missing


def _removed_background(background_remover: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    """The mask, of mode "L", that a background remover makes of an RGB image."""
    found = background_remover(image)
    if not isinstance(found, Image.Image) or found.size != image.size:
        got = f"one of {found.size}" if isinstance(found, Image.Image) else type(found).__name__
        raise ValueError(f"`background_remover` must return a PIL image of {image.size} pixels, got {got}")
    return found.getchannel("A") if found.mode in ("RGBA", "LA") else found.convert("L")
