"""Pictures of every mode, depth and kind of file: the same disc comes out of all, and damaged ones are named."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw

from diffusers_sparse3d.pipelines.image_loading import load_images, to_eight_bits
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor


COLOR = (200, 30, 60)
# What remains of it in shades of gray: 0.299 R + 0.587 G + 0.114 B.
GRAY = 84
BACKGROUND = (230, 232, 229)


@pytest.fixture
def processor():
    return Sparse3DImageProcessor(image_size=56, patch_size=14)


def disc(scale=1):
    image = Image.new("RGBA", (90 * scale, 60 * scale), (*COLOR, 0))
    ImageDraw.Draw(image).ellipse([edge * scale for edge in (10, 5, 40, 35)], fill=(*COLOR, 255))
    return image


def opaque_disc(scale=1):
    transparent = disc(scale)
    return Image.alpha_composite(Image.new("RGBA", transparent.size, BACKGROUND), transparent).convert("RGB")


def sixteen_bits():
    return np.array(opaque_disc().convert("L")).astype(np.uint16) * 257


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette_with(transparency):
    image = opaque_disc().quantize(8)
    corner = image.getpixel((0, 0))
    image.info["transparency"] = (
        corner if transparency == "index" else bytes(0 if i == corner else 255 for i in range(8))
    )
    return image


def one_transparent_color(mode):
    image = opaque_disc().convert(mode)
    return stored(image, "PNG", transparency=image.getpixel((0, 0)))


def lab():
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.applyTransform(opaque_disc(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))


COLORED = {
    "CMYK": lambda: opaque_disc().convert("CMYK"),
    "YCbCr": lambda: opaque_disc().convert("YCbCr"),
    "HSV": lambda: opaque_disc().convert("HSV"),
    "LAB": lab,
    "premultiplied": lambda: disc().convert("RGBa"),
    "palette and alpha": lambda: disc().convert("PA"),
    "palette of RGBA": lambda: disc().convert("P"),
    "transparent index": lambda: palette_with("index"),
    "transparent bytes": lambda: palette_with("bytes"),
    "transparent colour": lambda: one_transparent_color("RGB"),
    "GIF": lambda: stored(disc(), "GIF"),
    "WebP": lambda: stored(disc(), "WEBP", lossless=True),
    "TIFF": lambda: stored(disc(), "TIFF"),
    "animation": lambda: stored(disc(), "PNG", save_all=True, append_images=[Image.new("RGBA", (90, 60))]),
}
GRAYS = {
    "L": lambda: opaque_disc().convert("L"),
    "LA": lambda: disc().convert("LA"),
    "La": lambda: disc().convert("LA").convert("La"),
    "I;16": lambda: Image.fromarray(sixteen_bits()),
    "I;16B": lambda: Image.frombytes("I;16B", (90, 60), sixteen_bits().astype(">u2").tobytes()),
    "16 bits in PNG": lambda: stored(Image.fromarray(sixteen_bits()), "PNG"),
    "16 bits in TIFF": lambda: stored(Image.fromarray(sixteen_bits()), "TIFF"),
    "16 bits, a transparent shade": lambda: stored(
        Image.fromarray(sixteen_bits()), "PNG", transparency=int(sixteen_bits()[0, 0])
    ),
    "I of 16 bits": lambda: Image.fromarray(sixteen_bits().astype(np.int32)),
    "I of bytes": lambda: Image.fromarray(sixteen_bits().astype(np.int32) // 257),
    "F up to 1": lambda: Image.fromarray((sixteen_bits() / 65535).astype(np.float32)),
    "F up to 255": lambda: Image.fromarray((sixteen_bits() / 257).astype(np.float32)),
    "transparent shade": lambda: one_transparent_color("L"),
    "array of uint16": sixteen_bits,
    "tensor of bfloat16": lambda: torch.from_numpy(sixteen_bits() / 65535).bfloat16(),
}


@pytest.mark.parametrize("kind", [*COLORED, *GRAYS])
def test_every_kind_of_picture(processor, kind):
    source = {**COLORED, **GRAYS}[kind]()
    _, expected_mask = processor.preprocess(disc())
    (image,) = load_images(source)
    _, mask = processor.preprocess(image)
    assert (mask != expected_mask).float().mean() < 0.01
    color = np.array(to_eight_bits(image).convert("RGB"))[20, 25]
    assert np.abs(color - np.array(COLOR if kind in COLORED else [GRAY] * 3)).max() <= 2


def test_pictures_are_not_modified(processor):
    for image in (disc(), opaque_disc(), palette_with("index")):
        before = image.mode, image.tobytes(), dict(image.info)
        processor.preprocess(image, background_remover=lambda picture: Image.new("L", picture.size, 255))
        assert (image.mode, image.tobytes(), dict(image.info)) == before


def text_file(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("no picture")
    return path


DAMAGED = {
    "empty": lambda _: b"",
    "text": text_file,
    "cut PNG": lambda _: stored(disc(3), "PNG")[:300],
    "cut JPEG": lambda _: stored(opaque_disc(3), "JPEG")[:900],
    "chunk of PNG": lambda _: stored(disc(3), "PNG").replace(b"IDAT", b"IDXT"),
    "file of text": lambda _: io.StringIO("picture"),
    "bomb": lambda _: stored(Image.new("1", (20_000, 20_000)), "PNG"),
    "no width": lambda _: Image.new("RGB", (0, 5)),
    "no rows": lambda _: np.zeros((0, 5, 3), np.uint8),
    "no pictures": lambda _: np.zeros((0, 5, 5, 3), np.uint8),
    "integers": lambda _: np.zeros((5, 5, 3), np.int64),
    "complex": lambda _: np.zeros((5, 5, 3), np.complex64),
    "five axes": lambda _: np.zeros((1, 1, 5, 5, 3), np.uint8),
    "no data": lambda _: torch.zeros(3, 5, 5, device="meta"),
    "negative": lambda _: Image.fromarray(np.full((5, 5), -1, np.int32)),
    "infinite": lambda _: Image.fromarray(np.full((5, 5), np.inf, np.float32)),
    "none": lambda _: None,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_pictures_are_named(processor, kind, tmp_path):
    with pytest.raises(ValueError, match="`image`"):
        processor.preprocess(DAMAGED[kind](tmp_path))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((Image.new("RGBA", (9, 9), (1, 2, 3, 0)),), "alpha is zero everywhere"),
        ((Image.new("RGBA", (9, 9), (1, 2, 3, 5)),), "nowhere more opaque than 5 of 255"),
        ((Image.new("RGB", (9, 9)),), "of one colour"),
        ((disc(), Image.new("L", (90, 60))), "`mask_image` is black everywhere"),
        ((opaque_disc(), None, lambda image: Image.new("L", image.size)), "background remover found none"),
        ((Image.new("RGB", (2, 3000)), Image.new("L", (2, 3000), 128)), "2 x 3000 pixels, too narrow"),
    ],
)
def test_no_foreground_says_which_case_it_is(processor, arguments, reason):
    with pytest.raises(ValueError, match=f"`image` 0 has no foreground.*{reason}"):
        processor.preprocess(*arguments)


@pytest.mark.parametrize("returned", [None, np.zeros((60, 90)), Image.new("L", (5, 5))])
def test_what_a_background_remover_returns_is_checked(processor, returned):
    with pytest.raises(ValueError, match="`background_remover`"):
        processor.preprocess(opaque_disc(), background_remover=lambda image: returned)


@pytest.mark.parametrize("source", ["alpha", "background", "mask"])
def test_large_pictures_agree_with_small_ones(processor, source):
    """3,600 pixels wide: the background is searched in a smaller picture, and the object is reduced before framing."""
    image = disc(40) if source == "alpha" else opaque_disc(40)
    mask = disc(40).getchannel("A") if source == "mask" else None
    expected, expected_mask = processor.preprocess(disc(4))
    pixel_values, found = processor.preprocess(image, mask)
    assert (found != expected_mask).float().mean() < 0.01
    assert (pixel_values - expected).abs().mean() < 0.05


def test_a_photo_of_36_megapixels_takes_a_second():
    start = time.process_time()
    Sparse3DImageProcessor().preprocess(opaque_disc(100).crop((0, 0, 6000, 6000)))
    # A second on an idle machine; the search in the whole picture took forty.
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_size", 0), ("image_size", 56.0), ("patch_size", 0), ("padding", -1), ("alpha_threshold", float("nan"))],
)
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Sparse3DImageProcessor(**{name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda pixels: 255 * pixels, "values from 0 to 255"), (lambda pixels: pixels / 0, "NaN")],
)
def test_values_out_of_range_are_said(change, reason):
    pixels = np.zeros((4, 4, 3))
    pixels[1] = 1
    with np.errstate(invalid="ignore", divide="ignore"), pytest.raises(ValueError, match=f"got float64 with {reason}"):
        load_images(change(pixels))


def test_an_address_without_an_answer_is_no_damaged_file():
    with pytest.raises(ValueError, match="`image` cannot be read from its URL: "):
        load_images("http://127.0.0.1:9/picture.png")
