"""The pictures that a command reads: files and folders, all looked at before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def find_pictures(paths: Sequence[Path], name: str = "image") -> list[Path]:
    """
    The pictures that files and folders name, those of a folder in the order of their names.

    Args:
        paths: files, or folders, of which all files count whose suffix is one of a picture.
        name: what to call the argument in errors.

    Raises:
        ValueError: if a file does not exist or is no picture, or a folder has none.
    """
    from PIL import Image

    from ..pipelines.image_loading import load_images

    suffixes = set(Image.registered_extensions()) - {".pdf", ".eps", ".ps"}
    pictures: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in suffixes)
            if not found:
                raise ValueError(f"`{name}` {str(path)!r} is a folder without pictures")
            pictures += found
        elif path.is_file():
            pictures.append(path)
        else:
            raise ValueError(f"`{name}` {str(path)!r} does not exist")
    for path in pictures:
        try:
            load_images(path, name)
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"`{name}` {str(path)!r} cannot be read as a picture: {error}") from error
    return pictures
