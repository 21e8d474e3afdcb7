"""Uploaded photos, checked, without their backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from ..pipelines.background import BackgroundRemover, cut_out
from ..pipelines.image_loading import load_images


class PhotoReader:
    """
    Makes the pictures for a generation of uploaded photos.

    Args:
        remover: tells objects from backgrounds.
        max_pixels: of a photo.
        max_photos: at a time.
    """

    def __init__(self, remover: BackgroundRemover, max_pixels: int, max_photos: int):
        self.remover = remover
        self.max_pixels = max_pixels
        self.max_photos = max_photos

    def read(self, photo: Image.Image | None, more: Sequence[str] | None, keep: bool) -> list[Image.Image]:
        """The photos without their backgrounds: `photo`, if there is one, and then those of the files `more`.

        Raises:
            gr.Error: with a sentence for the user.
        """
        files = list(more or [])
        if photo is None and not files:
            raise gr.Error("Give a photo first.", print_exception=False)
        if len(files) + (photo is not None) > self.max_photos:
            raise gr.Error(f"At most {self.max_photos} photos at a time.", print_exception=False)
        pictures = [] if photo is None else [self._cut_out(photo, keep)]
        return pictures + [self._cut_out(self._open(path), keep) for path in files]

    def _open(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as opened:
                self._check_size(opened)
            return load_images(path)[0]
        except gr.Error:  # a ValueError, too
            raise
        except (ValueError, OSError) as error:
            raise gr.Error(f"{Path(path).name} is no picture that can be read.", print_exception=False) from error

    def _check_size(self, photo: Image.Image) -> None:
        if photo.width * photo.height > self.max_pixels:
            limit = self.max_pixels // 1_000_000
            raise gr.Error(f"The photo is too large: at most {limit} million pixels.", print_exception=False)

    def _cut_out(self, photo: Image.Image, keep: bool) -> Image.Image:
        self._check_size(photo)
        try:
            return cut_out(photo, None, self.remover, keep)
        except (ValueError, ImportError) as error:
            raise gr.Error(str(error), print_exception=False) from error
