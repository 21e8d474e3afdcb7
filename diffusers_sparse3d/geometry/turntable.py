"""A mesh that turns once around its vertical axis, as a video or an animated picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ..checks import check_integer, check_number
from ..files import written_beside
from .mesh import MeshLike
from .render import render_mesh_views


# Formats that Pillow writes, and videos, which take the extra `video`.
ANIMATIONS = (".gif", ".webp")
VIDEOS = (".mp4",)
MOST_FRAMES = 3600


def check_video_support(suffix: str) -> None:
    """
    Check that a turntable of this format can be written.

    Raises:
        ValueError: if `suffix` is none of .gif, .webp and .mp4.
        ImportError: if it is a video, and the package that brings the encoder is missing.
    """
    if suffix.lower() not in ANIMATIONS + VIDEOS:
        raise ValueError(f"a turntable must end in one of {', '.join(ANIMATIONS + VIDEOS)}, got {suffix!r}")
    if suffix.lower() in VIDEOS and find_spec("imageio_ffmpeg") is None:
        raise ImportError(
            "a turntable as .mp4 needs imageio-ffmpeg: `pip install 'diffusers_sparse3d[video]'` installs it; .gif and"
            " .webp need nothing more"
        )


def render_turntable(
    mesh: MeshLike, num_frames: int = 36, size: int = 320, elevation: float = 20.0, style: str = "shaded"
) -> list[Image.Image]:
    """
    Pictures of one turn of a mesh, evenly spaced, the first of its front; RGB on white.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load; y up.
        num_frames: pictures of the turn, at least 2.
        size: width and height in pixels.
        elevation: of the camera in degrees.
        style: as [`render_mesh_views`] takes it.

    Raises:
        ValueError: if a number is out of range or the mesh has no usable triangle.
        ImportError: if `embreex` is missing.
    """
    num_frames = check_integer("num_frames", num_frames, 2, MOST_FRAMES)
    views = [(360.0 * frame / num_frames, elevation, 60.0) for frame in range(num_frames)]
    pictures = render_mesh_views(mesh, views, size, sky_rays=3, style=style, num_threads=os.cpu_count() or 1)
    frames = []
    for picture in pictures:
        frame = Image.new("RGBA", picture.size, "white")
        frame.alpha_composite(picture)
        frames.append(frame.convert("RGB"))
    return frames


def write_turntable(
    mesh: MeshLike,
    path: str | Path,
    num_frames: int = 36,
    size: int = 320,
    seconds: float = 4.0,
    style: str = "shaded",
) -> Path:
    """
    Writes a turntable, `.gif`, `.webp` or `.mp4` (H.264), and returns its path.

    Args:
        mesh: a mesh, a scene, or a file that trimesh can load; y up.
        path: the file; its suffix selects the format. Missing folders are made.
        num_frames, style: see [`render_turntable`].
        size: width and height in pixels; even, as videos must be.
        seconds: length of the turn; 0.01 to 60 for each frame.

    Raises:
        ValueError: if the suffix is none of these, a number is out of range, or `size` is odd.
        ImportError: if `embreex`, or for a video `imageio-ffmpeg`, is missing.
    """
    path = Path(path)
    check_video_support(path.suffix)
    size = check_integer("size", size, 16)
    if size % 2:
        raise ValueError(f"`size` must be an even number of pixels, got {size}")
    num_frames = check_integer("num_frames", num_frames, 2, MOST_FRAMES)
    # The formats have 16 bits for the milliseconds, or hundredths of a second, of a frame.
    seconds = check_number("seconds", seconds, 0.01 * num_frames, 60.0 * num_frames)
    frames = render_turntable(mesh, num_frames, size, style=style)
    with written_beside(path) as partial:
        if path.suffix.lower() in VIDEOS:
            _write_video(frames, partial, num_frames / seconds)
        else:
            duration = round(1000 * seconds / num_frames)
            frames[0].save(partial, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return path


def _write_video(frames: Sequence[Image.Image], path: Path, frame_rate: float) -> None:
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(str(path), frames[0].size, fps=frame_rate, macro_block_size=2)
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.asarray(frame).tobytes())
    finally:
        writer.close()
