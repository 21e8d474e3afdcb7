"""Photos without alpha: plain backgrounds, the small network of the extra `background`, and masks."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffusers_sparse3d.pipelines.background import BackgroundRemover, cut_out
from tests.pipelines.tiny import tiny_image, tiny_pipeline


needs_rembg = pytest.mark.skipif(importlib.util.find_spec("rembg") is None, reason="the extra `background` is missing")


def on_noise(name: str = "armchair", size: int = 256) -> tuple[Image.Image, np.ndarray]:
    """An example on a blurred noise of many colours, and the true mask."""
    noise = np.random.default_rng(0).integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
    item = Image.open(f"examples/{name}.png").convert("RGBA").resize((size * 3 // 4,) * 2, Image.Resampling.LANCZOS)
    photo.paste(item, (size // 8, size // 8), item)
    truth = Image.new("L", photo.size)
    truth.paste(item.getchannel("A"), (size // 8, size // 8))
    return photo, np.asarray(truth) > 127


@pytest.fixture
def fake_rembg(monkeypatch):
    """A `rembg` whose only network, "half", takes the left half for the object."""
    asked = []

    def new_session(name):
        if name != "half":
            raise ValueError("No session class found")
        return name

    def remove(image, session, only_mask):
        asked.append(image)
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, image.width // 2, image.height))
        return mask

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=new_session, remove=remove, __spec__="set"))
    return asked


@needs_rembg
@pytest.mark.filterwarnings("ignore::DeprecationWarning:rembg")
def test_the_small_network_finds_the_object():
    photo, truth = on_noise()
    found = np.asarray(BackgroundRemover()(photo)) > 127
    # Measured 0.97; a mask that is inverted, shifted by a tenth or full is below 0.75.
    assert (found & truth).sum() / (found | truth).sum() > 0.94


def test_a_plain_background_needs_no_network(fake_rembg):
    photo = Image.new("RGB", (60, 40), "white")
    photo.paste("red", (20, 10, 50, 30))
    mask = BackgroundRemover("half")(photo)
    expected = np.zeros((40, 60), dtype=np.uint8)
    expected[10:30, 20:50] = 255
    np.testing.assert_array_equal(np.asarray(mask), expected)
    assert fake_rembg == []
    BackgroundRemover("half", plain_first=False)(photo)
    assert len(fake_rembg) == 1


def test_networks_by_name(fake_rembg):
    photo, _ = on_noise(size=64)
    assert np.asarray(BackgroundRemover("half")(photo)).mean(axis=0).tolist() == [255.0] * 32 + [0.0] * 32
    with pytest.raises(ValueError, match=r"`network` .*'other'"):
        BackgroundRemover("other")(photo)


def test_without_rembg_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("diffusers_sparse3d.pipelines.background.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"diffusers_sparse3d\[background\]"):
        BackgroundRemover()(on_noise(size=64)[0])


def test_sources_of_the_cut_out_in_their_order(fake_rembg):
    photo, _ = on_noise(size=64)
    remover = BackgroundRemover("half")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 24, 48))
    translucent = tiny_image()
    opaque = np.full((64, 64), 255)
    cases = (
        (translucent, mask, False, np.asarray(mask)),
        (translucent, None, False, np.asarray(translucent.getchannel("A"))),
        (translucent, None, True, opaque),
        (photo, mask, False, np.asarray(mask)),
        (photo, None, True, opaque),
    )
    for image, given, keep, expected in cases:
        cut = cut_out(image, given, remover, keep)
        assert cut.mode == "RGBA" and fake_rembg == []
        np.testing.assert_array_equal(np.asarray(cut.getchannel("A")), expected)
    assert np.asarray(cut_out(photo, None, remover).getchannel("A"))[0].tolist() == [255] * 32 + [0] * 32


def test_cut_outs_are_reduced_and_empty_ones_refused(fake_rembg):
    photo = Image.new("RGB", (2100, 700), "white")
    photo.paste("red", (600, 210, 1500, 420))
    cut = cut_out(photo)
    assert cut.size == (1024, 341)
    box = cut.getchannel("A").point(lambda value: 255 if value > 127 else 0).getbbox()
    np.testing.assert_allclose(box, np.array([600, 210, 1500, 420]) * 1024 / 2100, atol=2)
    empty, black = Image.new("RGB", (20, 20), "white"), Image.new("L", (20, 20))
    with pytest.raises(ValueError, match=r"no object .* give a mask"):
        cut_out(empty)
    with pytest.raises(ValueError, match=r"no object .* its mask is black"):
        cut_out(empty, black)
    with pytest.raises(ValueError, match=r"no object .* its alpha is zero"):
        cut_out(Image.new("RGBA", (20, 20), (200, 0, 0, 0)))
    with pytest.raises(ValueError, match=r"`mask`.*\(20, 20\)"):
        cut_out(Image.new("RGB", (20, 20)), Image.new("L", (20, 21)))


def test_as_a_component_of_the_pipeline(fake_rembg):
    """The pipeline conditions on what the remover finds."""
    photo, _ = on_noise(size=64)
    pipe = tiny_pipeline(background_remover=BackgroundRemover("half"))
    found, _ = pipe.image_processor.preprocess([photo], None, pipe.background_remover)
    photo.putalpha(cut_out(photo, None, BackgroundRemover("half")).getchannel("A"))
    expected, _ = pipe.image_processor.preprocess([photo])
    assert len(fake_rembg) == 2 and (found == expected).all()
