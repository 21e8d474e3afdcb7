"""The reference of mean pooling against a loop over coarse voxels."""

import pytest
import torch

from diffusers_sparse3d.ops.pooling import plan_sparse_mean_pool, sparse_mean_pool
from diffusers_sparse3d.ops.pooling.reference import sparse_mean_pool_reference
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import check_compiled
from .test_coordinates import random_coords


@pytest.mark.parametrize("exact_mean", [False, True])
def test_against_loop(exact_mean):
    coords = random_coords()
    cache = CoordinateCache(coords)
    coarse, parents = cache.downsample(2)
    feats = torch.randn(len(coords), 5, dtype=torch.float64)
    output = sparse_mean_pool(feats, cache, 2, exact_mean)
    assert len(output) == len(coarse.coords)
    for parent in range(len(coarse.coords)):
        children = feats[parents == parent]
        count = len(children) if exact_mean else len(children) + 1
        torch.testing.assert_close(output[parent], children.sum(0) / count)
    order = torch.randperm(len(coords))
    shuffled = sparse_mean_pool(feats[order], CoordinateCache(coords[order]), 2, exact_mean)
    torch.testing.assert_close(shuffled, output)


@pytest.mark.parametrize("exact_mean", [False, True])
def test_gradcheck(exact_mean):
    feats = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    parents = torch.tensor([2, 0, 2, 2, 3, 0])  # parent 1 has no child
    torch.autograd.gradcheck(lambda x: sparse_mean_pool_reference(x, parents, 4, exact_mean), feats)
    assert sparse_mean_pool_reference(feats, parents, 4, exact_mean)[1].abs().sum() == 0


def test_nothing():
    cache = CoordinateCache(torch.zeros(0, 4, dtype=torch.int32))
    assert sparse_mean_pool(torch.zeros(0, 3), cache, 2).shape == (0, 3)


def test_accumulates_in_float32():
    coords = torch.cartesian_prod(torch.arange(1), *[torch.arange(16)] * 3).int()
    feats = torch.ones(4096, 1, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    output = sparse_mean_pool(feats, CoordinateCache(coords), 16, exact_mean=True)
    assert output.dtype == torch.bfloat16 and output.item() == 1


def test_compiled_once_for_all_coordinates():
    def arguments(resolution):
        coords = random_coords(resolution)
        feats, cache = torch.randn(len(coords), 5, requires_grad=True), CoordinateCache(coords)
        plan_sparse_mean_pool(feats, cache, 2)
        return [feats], (cache, 2)

    check_compiled(sparse_mean_pool, arguments, [6, 9])
