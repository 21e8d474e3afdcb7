"""Photos without alpha: plain backgrounds, the small network of the extra `background`, and masks."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffusers_sparse3d.pipelines.background import BackgroundRemover, cut_out
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor
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
    """A `rembg` of two networks: "half" takes the left half for the object, "speck" one pixel of a picture."""
    asked = []

    def new_session(name):
        if name not in ("half", "speck"):
            raise ValueError("No session class found")
        return name

    def remove(image, session, only_mask):
        asked.append(image)
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, image.width // 2, image.height) if session == "half" else (0, 0, 1, 1))
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


def pale_disc(difference: int = 12) -> tuple[Image.Image, np.ndarray]:
    """A disc of nearly the colour of its background, and the true mask."""
    rows, columns = np.mgrid[:256, :256]
    truth = (rows - 130) ** 2 + (columns - 130) ** 2 <= 70**2
    return Image.fromarray(np.where(truth[..., None], 250 - difference, 250).repeat(3, axis=2).astype(np.uint8)), truth


@needs_rembg
@pytest.mark.filterwarnings("ignore::DeprecationWarning:rembg")
def test_an_object_of_nearly_the_colour_of_the_background_is_found_by_the_network():
    photo, truth = pale_disc()
    found = np.asarray(BackgroundRemover()(photo)) > 127
    assert (found & truth).sum() / (found | truth).sum() > 0.94
    with pytest.raises(ValueError, match="no object"):
        cut_out(Image.new("RGB", (64, 64), "white"))


def test_the_network_is_asked_where_hardly_anything_stands_out_of_a_plain_background(fake_rembg, monkeypatch):
    photo, _ = pale_disc()
    photo.paste("black", (40, 40, 44, 48))  # 32 of 65,536 pixels
    half = [255] * 128 + [0] * 128
    assert np.asarray(BackgroundRemover("half")(photo))[0].tolist() == half and len(fake_rembg) == 1
    # What stood out remains where the network finds no more, or there is none.
    speck = np.zeros((256, 256), dtype=np.uint8)
    speck[40:48, 40:44] = 255
    np.testing.assert_array_equal(np.asarray(BackgroundRemover("speck")(photo)), speck)
    monkeypatch.setattr("diffusers_sparse3d.pipelines.background.find_spec", lambda name: None)
    np.testing.assert_array_equal(np.asarray(BackgroundRemover("half")(photo)), speck)


@pytest.mark.parametrize("pixels, counts", [(1, False), (64, False), (66, True)])
def test_alpha_counts_if_more_than_a_thousandth_is_transparent(fake_rembg, pixels, counts):
    """Of 65,536 pixels; for the cut-out and for the image processor."""
    photo = Image.new("RGB", (256, 256), "white")
    photo.paste("red", (64, 64, 192, 128))
    opaque, alpha = photo.copy(), np.full(256 * 256, 255, dtype=np.uint8)
    alpha[:pixels] = 10
    photo.putalpha(Image.fromarray(alpha.reshape(256, 256)))
    processor = Sparse3DImageProcessor(image_size=56)
    expected = np.asarray(photo.getchannel("A") if counts else cut_out(opaque).getchannel("A"))
    np.testing.assert_array_equal(np.asarray(cut_out(photo).getchannel("A")), expected)
    same = processor.preprocess(photo)[1] == processor.preprocess(opaque)[1]
    assert same.all() == (not counts)


def test_a_few_translucent_pixels_are_no_cut_out(fake_rembg):
    photo = Image.new("RGBA", (80, 60), "white")
    photo.paste("red", (20, 10, 50, 30))
    expected = np.asarray(cut_out(photo.convert("RGB")).getchannel("A"))
    photo.putpixel((0, 0), (255, 255, 255, 254))
    assert expected.mean() == 255 * 0.125
    np.testing.assert_array_equal(np.asarray(cut_out(photo).getchannel("A")), expected)


def masks_of_all_kinds() -> dict[str, tuple[Image.Image, int]]:
    """Masks of the middle of 64 x 64 pixels, and their value on it."""
    truth = np.zeros((64, 64), dtype=bool)
    truth[16:48, 16:48] = True
    palette = Image.fromarray(truth.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    dark = np.zeros((64, 64, 4), dtype=np.uint8)
    dark[truth] = (10, 10, 10, 255)
    opaque = Image.fromarray(np.where(truth, 255, 0).astype(np.uint8)).convert("RGBA")
    opaque.putpixel((0, 0), (0, 0, 0, 254))
    return {
        "F": (Image.fromarray(truth.astype(np.float32)), 255),
        "I": (Image.fromarray(truth.astype(np.int32) * 65535), 255),
        "I;16": (Image.fromarray(truth.astype(np.uint16) * 40000), 156),
        "1": (Image.fromarray(truth), 255),
        "P": (palette, 255),
        "dark cut-out": (Image.fromarray(dark), 255),
        "dark cut-out LA": (Image.fromarray(dark).convert("LA"), 255),
        "opaque alpha": (opaque, 255),
    }


@pytest.mark.parametrize("kind", masks_of_all_kinds())
def test_masks_are_read_as_the_pipeline_reads_them(kind):
    mask, value = masks_of_all_kinds()[kind]
    picture = Image.new("RGB", mask.size, "red")
    expected = np.zeros((64, 64), dtype=np.uint8)
    expected[16:48, 16:48] = value
    np.testing.assert_array_equal(np.asarray(cut_out(picture, mask).getchannel("A")), expected)
    processor = Sparse3DImageProcessor(image_size=56)
    found, wanted = (processor.preprocess(picture, given) for given in (mask, Image.fromarray(expected)))
    assert all(torch.equal(*parts) for parts in zip(found, wanted))


def test_masks_out_of_range_are_refused():
    picture, values = Image.new("RGB", (8, 8)), Image.fromarray(np.full((8, 8), -1.0, dtype=np.float32))
    with pytest.raises(ValueError, match="`mask`"):
        cut_out(picture, values)


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
        cut_out(empty, None, BackgroundRemover("speck"))
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
