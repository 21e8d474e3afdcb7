"""Sparse3DImageProcessor: sources of the foreground, and its place in the result."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusers_sparse3d.pipelines.image_processor import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Sparse3DImageProcessor,
    plain_background_mask,
)


def rgba_disc(size=(90, 60), box=(10, 5, 40, 35), color=(200, 30, 60)):
    image = Image.new("RGBA", size, (*color, 0))
    ImageDraw.Draw(image).ellipse(box, fill=(*color, 255))
    return image


def rgb_disc(background=(230, 232, 229), **kwargs):
    disc = rgba_disc(**kwargs)
    return Image.alpha_composite(Image.new("RGBA", disc.size, background), disc).convert("RGB")


def to_rgb(pixel_values):
    return pixel_values * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


@pytest.fixture
def processor():
    return Sparse3DImageProcessor(image_size=56, patch_size=14)


def test_values_are_normalised_with_the_published_statistics(processor):
    """(value - mean) / std with the statistics of ImageNet: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225."""
    values = {
        "white": [2.2489083, 2.4285714, 2.64],
        "black": [-2.1179039, -2.0357143, -1.8044444],
        "red": [2.2489083, -2.0357143, -1.8044444],
    }
    for color, expected in values.items():
        pixel_values, _ = processor.preprocess(Image.new("RGB", (40, 40), color), Image.new("L", (40, 40), 255))
        torch.testing.assert_close(pixel_values[0, :, 28, 28], torch.tensor(expected))


@pytest.mark.parametrize(("step", "foreground"), [(16, 0), (17, 255)])
def test_a_background_differs_by_the_tolerance_at_most(step, foreground):
    """In any channel, from the median of the border."""
    for channel in range(3):
        pixels = np.full((12, 12, 3), 100, dtype=np.uint8)
        pixels[4:8, 4:8, channel] += step
        mask = np.asarray(plain_background_mask(Image.fromarray(pixels)))
        assert (mask[4:8, 4:8] == foreground).all() and mask[:4].max() == 0


def test_shapes_ranges_and_padding(processor):
    pixel_values, mask = processor.preprocess(rgba_disc())
    assert pixel_values.shape == (1, 3, 56, 56) and pixel_values.dtype == torch.float32
    assert mask.shape == (1, 1, 56, 56) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert processor.padding == 2 and Sparse3DImageProcessor().padding == 16
    rows, columns = mask[0, 0].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 53, 2, 53)
    rgb = to_rgb(pixel_values[0])
    torch.testing.assert_close(rgb[:, 0, 0], torch.ones(3))
    torch.testing.assert_close(rgb[:, 28, 28], torch.tensor([200, 30, 60]) / 255)


def test_wide_object_is_centred(processor):
    _, mask = processor.preprocess(rgba_disc(size=(100, 60), box=(10, 10, 90, 30)))
    rows, columns = mask[0, 0].nonzero().unbind(1)
    assert (columns.min(), columns.max()) == (2, 53)
    assert abs((rows.min() + rows.max()).item() - 55) <= 1 and rows.max() - rows.min() < 20


def test_crop_makes_position_and_size_irrelevant(processor):
    first, _ = processor.preprocess(rgba_disc(size=(90, 60), box=(10, 5, 40, 35)))
    second, _ = processor.preprocess(rgba_disc(size=(200, 100), box=(140, 40, 170, 70)))
    assert torch.equal(first, second)


def test_kinds_of_input_agree(processor, tmp_path):
    image = rgba_disc()
    image.save(tmp_path / "disc.png")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [tmp_path / "disc.png", str(tmp_path / "disc.png"), array, array / 255, tensor, tensor / 255, tensor[None]]
    expected, expected_mask = processor.preprocess(image)
    for kind in kinds:
        pixel_values, mask = processor.preprocess(kind)
        assert torch.equal(pixel_values, expected) and torch.equal(mask, expected_mask)
    pixel_values, _ = processor.preprocess([*kinds, np.stack([array, array])])
    assert pixel_values.shape[0] == len(kinds) + 2 and torch.equal(pixel_values[-1:], expected)


def test_exif_orientation_is_applied(processor, tmp_path):
    image = rgb_disc(box=(10, 5, 40, 15))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    _, mask = processor.preprocess(tmp_path / "photo.jpg")
    rows, columns = mask[0, 0].nonzero().unbind(1)
    assert columns.max() - columns.min() > 2 * (rows.max() - rows.min())


def test_plain_background_is_filled_from_the_border(processor):
    _, expected = processor.preprocess(rgba_disc())
    _, mask = processor.preprocess(rgb_disc())
    assert (mask != expected).float().mean() < 0.01


def test_flood_fill_keeps_what_it_cannot_reach():
    image = Image.new("RGB", (80, 80), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 10, 70, 70), outline="black", width=3)
    draw.line((10, 40, 14, 40), fill="white", width=9)
    draw.rectangle((30, 30, 50, 50), fill="black")
    draw.rectangle((35, 35, 45, 45), fill="white")
    mask = np.array(plain_background_mask(image)) > 0
    assert not mask[20, 20], "the frame has a gap at its left, through which the fill goes"
    assert mask[40, 40], "the inner square is closed"
    assert mask[10, 40] and not mask[2, 2]


def test_flood_fill_follows_a_winding_passage():
    image = np.zeros((41, 41, 3), dtype=np.uint8)
    image[[0, -1]] = image[:, [0, -1]] = 255
    for row in range(1, 40, 2):
        image[row, 1:40] = 255
        image[row + 1, 1 if row % 4 == 1 else 39] = 255
    assert (np.array(plain_background_mask(Image.fromarray(image))) > 0).sum() == (image[..., 0] == 0).sum()


def test_busy_background_says_what_to_do(processor):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"`image` 1 .*`mask_image`.*background remover"):
        processor.preprocess([rgba_disc(), noise])


def test_mask_image_and_background_remover(processor):
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    alpha = rgba_disc().getchannel("A")
    _, expected = processor.preprocess(rgba_disc())
    _, mask = processor.preprocess(noise, mask_image=alpha)
    assert torch.equal(mask, expected)
    for result in (alpha, rgba_disc()):
        _, mask = processor.preprocess(noise, background_remover=lambda image, result=result: result)
        assert torch.equal(mask, expected)
    with pytest.raises(ValueError, match="`mask_image`"):
        processor.preprocess([noise, noise], mask_image=alpha)
    with pytest.raises(ValueError, match="`mask_image`"):
        processor.preprocess(noise, mask_image=alpha.resize((10, 10)))


def test_faint_haze_is_background(processor):
    haze = np.array(rgba_disc())
    haze[..., 3] = np.maximum(haze[..., 3], 5)
    _, expected = processor.preprocess(rgba_disc())
    assert torch.equal(processor.preprocess(haze)[1], expected)


def test_opaque_alpha_is_no_mask(processor):
    _, expected = processor.preprocess(rgb_disc())
    assert torch.equal(processor.preprocess(rgb_disc().convert("RGBA"))[1], expected)


@pytest.mark.parametrize("image", [Image.new("RGBA", (20, 20)), Image.new("RGB", (20, 20), "white")])
def test_no_foreground(processor, image):
    with pytest.raises(ValueError, match="`image` 0 has no foreground"):
        processor.preprocess(image)


@pytest.mark.parametrize(
    "image", [3, [], np.zeros((4, 4, 2)), np.full((4, 4, 3), 2.0), np.full((4, 4), np.nan), torch.zeros(4)]
)
def test_bad_input_names_the_argument(processor, image):
    with pytest.raises(ValueError, match="`image`"):
        processor.preprocess(image)


def test_image_size_must_hold_whole_patches():
    with pytest.raises(ValueError, match="`image_size`"):
        Sparse3DImageProcessor(image_size=50, patch_size=14)
