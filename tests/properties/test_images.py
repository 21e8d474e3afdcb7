"""Any picture: pixels and a mask, or a sentence that names the argument."""

import io

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusers_sparse3d.pipelines.image_loading import load_images, to_eight_bits
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor


PROCESSOR = Sparse3DImageProcessor(image_size=28, patch_size=14)
NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
DTYPES = (np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64, bool, np.complex64)
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "PA", "La", "RGBa", "I;16")


@given(
    st.lists(st.integers(0, 6), min_size=0, max_size=5),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 2.0, float("nan")]),
)
def test_arrays_and_tensors(shape, dtype, is_tensor, seed, largest):
    with np.errstate(invalid="ignore"):
        array = (np.random.default_rng(seed).random(shape) * largest).astype(dtype)
    try:
        images = load_images(torch.from_numpy(np.asarray(array)) if is_tensor else np.asarray(array))
        for image in images:
            assert to_eight_bits(image).mode in ("RGB", "RGBA") and 0 not in image.size
    except ValueError as error:
        assert "`image`" in str(error)


@given(st.sampled_from(MODES), st.integers(1, 40), st.integers(1, 40), st.binary(min_size=1, max_size=300))
def test_pictures_of_every_mode(mode, width, height, data):
    count = len(Image.new(mode, (width, height)).tobytes())
    image = Image.frombytes(mode, (width, height), (data * (count // len(data) + 1))[:count])
    try:
        pixel_values, mask = PROCESSOR.preprocess(image)
    except ValueError as error:
        assert "`image`" in str(error)
    else:
        assert pixel_values.shape == (1, 3, 28, 28) and torch.isfinite(pixel_values).all()
        assert mask.shape == (1, 1, 28, 28) and mask.any() and set(mask.unique().tolist()) <= {0.0, 1.0}


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.tuples(*[st.integers(0, 12)] * 4),
    st.tuples(*[st.integers(0, 255)] * 3),
    st.integers(11, 255),
)
def test_where_an_object_lies_does_not_matter(width, height, margins, color, alpha):
    left, top, right, bottom = margins
    picture = Image.new("RGBA", (width, height), (*color, alpha))
    framed = Image.new("RGBA", (left + width + right, top + height + bottom), (9, 99, 199, 0))
    framed.paste(picture, (left, top))
    # Opaque pictures without a margin have no foreground of their own.
    mask = picture.getchannel("A")
    expected = PROCESSOR.preprocess(picture, mask)
    found = PROCESSOR.preprocess(framed, framed.getchannel("A"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_files(kind, data):
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        (image,) = load_images(content)
        to_eight_bits(image)
    except ValueError as error:
        assert "`image`" in str(error)
