import pytest
import torch

from diffusers_sparse3d.ops.coordinates import downsample_coords
from diffusers_sparse3d.ops.pooling import sparse_mean_pool

from .test_coordinates import random_coords


@pytest.mark.parametrize("exact_mean", [False, True])
def test_against_loop(exact_mean):
    coords = random_coords()
    feats = torch.randn(len(coords), 5, dtype=torch.float64)
    coarse, parents = downsample_coords(coords, 2)
    output = sparse_mean_pool(feats, parents, len(coarse), exact_mean)
    for parent in range(len(coarse)):
        children = feats[parents == parent]
        count = len(children) if exact_mean else len(children) + 1
        torch.testing.assert_close(output[parent], children.sum(0) / count)
    order = torch.randperm(len(coords))
    torch.testing.assert_close(sparse_mean_pool(feats[order], parents[order], len(coarse), exact_mean), output)


@pytest.mark.parametrize("exact_mean", [False, True])
def test_gradcheck(exact_mean):
    feats = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    parents = torch.tensor([2, 0, 2, 2, 3, 0])  # parent 1 has no child
    torch.autograd.gradcheck(lambda x: sparse_mean_pool(x, parents, 4, exact_mean), feats)
    assert sparse_mean_pool(feats, parents, 4, exact_mean)[1].abs().sum() == 0


def test_nothing():
    assert sparse_mean_pool(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 0).shape == (0, 3)


def test_accumulates_in_float32():
    feats = torch.ones(4096, 1, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    output = sparse_mean_pool(feats, torch.zeros(4096, dtype=torch.int64), 1, exact_mean=True)
    assert output.dtype == torch.bfloat16 and output.item() == 1
