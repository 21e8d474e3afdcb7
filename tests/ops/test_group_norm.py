"""The reference of the group norm against that of PyTorch, sample by sample."""

import pytest
import torch

from diffusers_sparse3d.ops.group_norm import plan_sparse_group_norm, reference, sparse_group_norm
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import check_compiled


def cache_of(batch_index: torch.Tensor, batch_size: int) -> CoordinateCache:
    """Voxels of these samples, somewhere."""
    coords = torch.zeros(len(batch_index), 4, dtype=torch.int32, device=batch_index.device)
    coords[:, 0], coords[:, 1] = batch_index, torch.arange(len(batch_index))
    return CoordinateCache(coords, batch_size)


def parameters(channels: int, dtype: torch.dtype = torch.float64):
    return 1 + 0.3 * torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)


@pytest.mark.parametrize("num_groups", [1, 3, 6])
def test_against_torch_per_sample(num_groups):
    batch_index = torch.tensor([3, 0, 0, 3, 1, 3, 0, 3, 3]).int()  # sample 2 is empty, sample 1 has one voxel
    feats = 5 + torch.randn(9, 6, dtype=torch.float64)
    weight, bias = parameters(6)
    output = sparse_group_norm(feats, cache_of(batch_index, 5), num_groups, weight, bias)
    for sample in (0, 1, 3):
        rows = batch_index == sample
        expected = torch.group_norm(feats[rows].T[None], num_groups, weight, bias, eps=1e-5)[0].T
        torch.testing.assert_close(output[rows], expected)
    activated = sparse_group_norm(feats, cache_of(batch_index, 5), num_groups, weight, bias, silu=True)
    torch.testing.assert_close(activated, output * output.sigmoid())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_gradcheck(batch_size):
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight, bias = (x.requires_grad_() for x in parameters(4))
    cache = cache_of(torch.arange(7) * 2 % batch_size, batch_size)
    torch.autograd.gradcheck(
        lambda *args: sparse_group_norm(args[0], cache, 2, args[1], args[2], silu=True), (feats, weight, bias)
    )


def test_nothing():
    weight, bias = parameters(4, torch.float32)
    for batch_size in (0, 1, 3):
        empty = cache_of(torch.zeros(0, dtype=torch.int64), batch_size)
        assert sparse_group_norm(torch.zeros(0, 4), empty, 2, weight, bias).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype):
    feats = (100 + torch.randn(20_000, 4)).to(dtype)  # the variance is lost in sums of squares, or in half precision
    cache = cache_of(torch.arange(20_000) % 2, 2)
    weight, bias = parameters(4, dtype)
    output = sparse_group_norm(feats, cache, 2, weight, bias)
    assert output.dtype == dtype
    expected = sparse_group_norm(feats.double(), cache, 2, weight.double(), bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert (output.double() - expected).norm() < tolerance * expected.norm()


def normalize(feats, weight, bias, cache):
    return sparse_group_norm(feats, cache, 2, weight, bias, silu=True)


@pytest.mark.parametrize("sizes", [[(20, 1), (31, 1)], [(20, 2), (31, 3)]], ids=["one sample", "several samples"])
def test_compiled_once_for_all_coordinates(sizes):
    def arguments(size):
        num_rows, batch_size = size
        feats, cache = torch.randn(num_rows, 6), cache_of(torch.arange(num_rows) % batch_size, batch_size)
        plan_sparse_group_norm(feats, cache)
        return [tensor.requires_grad_() for tensor in (feats, *parameters(6, torch.float32))], (cache,)

    check_compiled(normalize, arguments, sizes)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 1, 7, 1, 1)])
def test_both_ways_to_normalise_a_group_agree(shape):
    """That of a GPU and that of a CPU, whatever this machine has."""
    generator = torch.Generator().manual_seed(0)
    values = 10 + torch.randn(shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    found = reference._normalize_on_gpu(values, weight, bias, 1e-3)
    torch.testing.assert_close(found, reference._normalize_on_cpu(values, weight, bias, 1e-3), rtol=0, atol=1e-9)
