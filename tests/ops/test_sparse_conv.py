"""The reference of the sparse convolution against a dense convolution, and what callers of the operator rely on."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_sparse3d.ops.sparse_conv import reference, sparse_conv3d, sparse_subdivide_conv3d
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .test_coordinates import random_coords


def dense_conv(feats: torch.Tensor, coords: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resolution: int):
    """The oracle: scatter to a grid, torch's convolution, gather at the same voxels."""
    batch, x, y, z = coords.long().unbind(1)
    grid = feats.new_zeros(int(batch.max()) + 1, *(resolution,) * 3, feats.shape[1])
    grid = grid.index_put((batch, x, y, z), feats)
    # Offset k has x fastest: [z, y, x, in, out] -> torch's [out, in, x, y, z].
    kernel = weight.view(3, 3, 3, *weight.shape[1:]).permute(4, 3, 2, 1, 0)
    output = F.conv3d(grid.movedim(-1, 1), kernel, bias, padding=1)
    return output.movedim(1, -1)[batch, x, y, z]


def random_case(in_channels: int, out_channels: int, dtype: torch.dtype = torch.float64, **kwargs):
    coords = random_coords(**kwargs)
    generator = torch.Generator().manual_seed(1)
    feats, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((len(coords), in_channels), (27, in_channels, out_channels), (out_channels,))
    )
    return coords, feats, weight, bias


@pytest.mark.parametrize("in_channels, out_channels", [(1, 3), (5, 2), (4, 4)])
def test_against_dense_convolution(in_channels, out_channels):
    coords, feats, weight, bias = random_case(in_channels, out_channels)
    expected = dense_conv(feats, coords, weight, bias, 6)
    output = sparse_conv3d(feats, weight, bias, CoordinateCache(coords))
    torch.testing.assert_close(output, expected)
    grad_output = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (feats, weight, bias), grad_output)
    grads = torch.autograd.grad(output, (feats, weight, bias), grad_output)
    torch.testing.assert_close(grads, expected_grads)


def test_chunks_do_not_matter(monkeypatch):
    coords, feats, weight, bias = random_case(3, 4)
    cache = CoordinateCache(coords)
    expected = sparse_conv3d(feats, weight, bias, cache)
    expected_grads = torch.autograd.grad(expected.sin().sum(), (feats, weight))
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS_CPU", 27 * 3 * 50)
    output = sparse_conv3d(feats, weight, bias, cache)
    assert len(coords) % 50 != 0
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sin().sum(), (feats, weight)), expected_grads)


def test_row_order():
    coords, feats, weight, bias = random_case(3, 4)
    order = torch.randperm(len(coords))
    expected = sparse_conv3d(feats, weight, bias, CoordinateCache(coords))
    output = sparse_conv3d(feats[order], weight, bias, CoordinateCache(coords[order]))
    torch.testing.assert_close(output, expected[order])


def test_gradcheck():
    coords, feats, weight, bias = random_case(2, 1, resolution=2, rows=8, batch_size=2)
    cache = CoordinateCache(coords)
    torch.autograd.gradcheck(lambda *args: sparse_conv3d(*args, cache), (feats, weight, bias))
    torch.autograd.gradcheck(lambda *args: sparse_subdivide_conv3d(*args, cache), (feats, weight, bias))


def test_kernel_size_one():
    feats, weight, bias = torch.randn(7, 3), torch.randn(3, 5), torch.randn(5)
    torch.testing.assert_close(sparse_conv3d(feats, weight, bias), feats @ weight + bias)
    torch.testing.assert_close(sparse_conv3d(feats, weight), feats @ weight)


def test_single_voxels_and_nothing():
    weight, bias = torch.randn(27, 3, 4), torch.randn(4)
    for rows in ([], [[0, 0, 0, 0]], [[0, 2047, 2047, 2047]], [[0, 0, 0, 2047], [0, 0, 1, 0], [1, 0, 0, 2046]]):
        coords = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
        feats = torch.randn(len(coords), 3)  # no two of the voxels are neighbours
        torch.testing.assert_close(
            sparse_conv3d(feats, weight, bias, CoordinateCache(coords)), feats @ weight[13] + bias
        )


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_subdivide_then_convolve(rows):
    coords, feats, weight, bias = random_case(3, 4, rows=rows)
    cache = CoordinateCache(coords)
    expected = sparse_conv3d(feats.repeat_interleave(8, 0), weight, bias, CoordinateCache(cache.subdivide().coords))
    output = sparse_subdivide_conv3d(feats, weight, bias, cache)
    torch.testing.assert_close(output, expected)
    grad_output = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, (feats, weight, bias), grad_output),
        torch.autograd.grad(expected, (feats, weight, bias), grad_output),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    coords, feats, weight, bias = random_case(16, 16, dtype)
    cache = CoordinateCache(coords)
    expected = sparse_conv3d(feats.double(), weight.double(), bias.double(), cache)
    output = sparse_conv3d(feats, weight, bias, cache)
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (output.double() - expected).norm() < tolerance * expected.norm()


def test_autocast():
    coords, feats, weight, bias = random_case(16, 16, torch.float32)
    cache = CoordinateCache(coords)
    with torch.autocast("cpu", torch.bfloat16):
        output = sparse_conv3d(feats, weight, bias, cache)
        assert output.dtype == sparse_conv3d(feats, weight[0], bias).dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert feats.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    expected = torch.autograd.grad(sparse_conv3d(feats, weight, bias, cache).square().mean(), (feats, weight))
    for grad, reference_grad in zip((feats.grad, weight.grad), expected):
        assert (grad - reference_grad).norm() < 1e-2 * reference_grad.norm()


def test_cache_has_to_fit():
    coords, feats, weight, bias = random_case(2, 3)
    with pytest.raises(ValueError, match=r"`cache` must be of .* got missing"):
        sparse_conv3d(feats, weight, bias)
    for convolve in (sparse_conv3d, sparse_subdivide_conv3d):
        with pytest.raises(ValueError, match=r"`cache` must be of .* got one of 5 voxels"):
            convolve(feats, weight, bias, CoordinateCache(coords[:5]))


def test_operators_are_registered_right():
    feats, weight = (torch.randn(shape, requires_grad=True) for shape in ((5, 3), (27, 3, 2)))
    neighbours = torch.randint(0, 6, (27, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    torch.library.opcheck(reference._convolve.registered, (feats, weight, neighbours))
    torch.library.opcheck(reference._weight_gradient.registered, (feats.detach(), torch.randn(5, 2), neighbours))
