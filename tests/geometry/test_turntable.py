"""Turntables: one whole turn, in all formats."""

import importlib.util

import numpy as np
import pytest
import trimesh
from PIL import Image

from diffusers_sparse3d.geometry.turntable import check_video_support, render_turntable, write_turntable


@pytest.fixture
def bar():
    """Wide along x, thin along z."""
    return trimesh.creation.box(extents=(2, 0.5, 0.2))


def width(frame):
    return int((np.asarray(frame.convert("L")) < 250).any(axis=0).sum())


def test_one_turn_without_a_repeated_frame(bar):
    frames = render_turntable(bar, num_frames=8, size=48, elevation=0)
    widths = [width(frame) for frame in frames]
    assert widths[0] == max(widths) and widths[2] == min(widths) < widths[0] / 3
    # Half a turn later a bar looks the same from the other side, and the first frame does not come again at the end.
    assert widths[:4] == pytest.approx(widths[4:], abs=1) and widths[7] < widths[0] - 3
    with pytest.raises(ValueError, match="`num_frames`"):
        render_turntable(bar, num_frames=1)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_loop_in_the_time_asked_for(bar, tmp_path, suffix):
    path = write_turntable(bar, tmp_path / "new" / f"turn{suffix}", num_frames=4, size=32, seconds=2.0)
    with Image.open(path) as animation:
        assert animation.n_frames == 4 and animation.size == (32, 32) and animation.info["loop"] == 0
        animation.seek(1)
        animation.load()
        assert animation.info["duration"] == 500
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="the extra `video` is missing")
def test_videos(bar, tmp_path):
    import imageio_ffmpeg

    path = write_turntable(bar, tmp_path / "turn.mp4", num_frames=6, size=32, seconds=1.0)
    reader = imageio_ffmpeg.read_frames(str(path))
    settings = next(reader)
    frames = [np.frombuffer(frame, dtype=np.uint8).reshape(32, 32, 3) for frame in reader]
    assert settings["codec"] == "h264" and settings["fps"] == 6 and len(frames) == 6
    assert width(Image.fromarray(frames[0])) > width(Image.fromarray(frames[2])) + 5


def test_what_does_not_fit(bar, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\.avi"):
        write_turntable(bar, tmp_path / "turn.avi")
    with pytest.raises(ValueError, match="`size`"):
        write_turntable(bar, tmp_path / "turn.gif", size=33)
    monkeypatch.setattr("diffusers_sparse3d.geometry.turntable.find_spec", lambda name: None)
    check_video_support(".gif")
    with pytest.raises(ImportError, match=r"diffusers_sparse3d\[video\]"):
        check_video_support(".MP4")
