"""Image tokens and their coordinates."""

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_sparse3d.pipelines.conditioning import encode_image, sparse_conditioning
from tests.golden import relative_error


@pytest.fixture(scope="module")
def image_encoder():
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        initializer_range=1.0,  # tokens of everyday size, so that epsilon does not matter
    )
    return Dinov2WithRegistersModel(config).eval()


@torch.no_grad()
def test_tokens_come_from_before_the_final_norm(image_encoder):
    pixel_values = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    tokens = encode_image(image_encoder, pixel_values)
    assert tokens.shape == (2, 1 + 4 + 16, 16)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 21), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 21), atol=1e-3, rtol=0)
    # An affine final norm that destroys everything must not matter.
    expected, image_encoder.layernorm.weight.data[:] = tokens.clone(), 0
    assert torch.equal(encode_image(image_encoder, pixel_values), expected)
    image_encoder.layernorm.weight.data[:] = 1
    # Without affine the final norm of the encoder and ours are the same up to epsilon.
    torch.testing.assert_close(image_encoder(pixel_values).last_hidden_state, tokens, atol=1e-2, rtol=0)


@torch.no_grad()
def test_half_precision(image_encoder):
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = encode_image(image_encoder, pixel_values)
    tokens = encode_image(image_encoder.to(torch.bfloat16), pixel_values)
    image_encoder.float()
    assert tokens.dtype == torch.bfloat16
    assert relative_error(tokens, expected) < 0.03


def test_sparse_conditioning_keeps_prefix_and_foreground():
    tokens = torch.arange(2 * (2 + 9)).view(2, 11, 1).float()
    mask = torch.zeros(2, 1, 12, 12)
    mask[0, 0, 3, 11] = 1  # row 0, column 2: one pixel is enough
    mask[0, 0, 9, 0] = 1  # row 2, column 0
    mask[1] = 1
    packed, coords = sparse_conditioning(tokens, mask, patch_size=4, num_prefix_tokens=2)
    assert coords.dtype == torch.int32
    assert packed[:4, 0].tolist() == [0, 1, 2 + 2, 2 + 6]
    assert coords[:4].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 2, 0]]
    assert torch.equal(packed[4:], tokens[1])
    assert coords[4:6].tolist() == [[1, 0, 0, 1]] * 2
    assert coords[6:].tolist() == [[1, column, row, 0] for row in range(3) for column in range(3)]


def test_sparse_conditioning_passes_gradients():
    tokens = torch.randn(1, 5, 3, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]
    packed, _ = sparse_conditioning(tokens, mask, patch_size=1, num_prefix_tokens=1)
    packed.sum().backward()
    assert tokens.grad[0, :, 0].tolist() == [1, 1, 0, 0, 0]


def test_empty_foreground_names_the_image():
    mask = torch.ones(3, 1, 4, 4)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"`image` has no foreground \(index \[1\]\)"):
        sparse_conditioning(torch.zeros(3, 5, 2), mask, patch_size=2, num_prefix_tokens=1)
