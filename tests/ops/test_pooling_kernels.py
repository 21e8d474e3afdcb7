"""The Triton kernels against the reference in float64: small cases in Triton's interpreter, larger ones on a GPU."""

import pytest
import torch

from diffusers_sparse3d.ops.pooling import operator
from diffusers_sparse3d.ops.pooling.plan import plan_pooling
from diffusers_sparse3d.ops.pooling.reference import sparse_mean_pool_reference
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import (
    DEVICE,
    DTYPES,
    NATIVE,
    check_captured,
    check_compiled,
    needs_gpu,
    spied_launches,
)
from .test_coordinates import random_coords


# Coordinates, channels, factor.
CASES = {
    "several samples": (random_coords(12, 300, 3), 16, 2),
    "other coordinates": (random_coords(9, 90, 4, seed=1), 16, 2),
    "odd": (random_coords(9, 200, 2), 5, 3),
    "large blocks": (random_coords(8, 400, 2), 8, 8),
    "wide": (random_coords(6, 60, 1), 160, 2),
    "single voxel": (random_coords(2048, 1, 1), 3, 2),
}
if NATIVE:
    CASES["large"] = (random_coords(128, 200_000, 2), 32, 2)


@pytest.mark.parametrize("exact_mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_reference(name, dtype, exact_mean):
    coords, channels, factor = CASES[name]
    cache = CoordinateCache(coords.to(DEVICE))
    coarse, parents = cache.downsample(factor)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(len(coords), channels, generator=generator).to(DEVICE, dtype).requires_grad_()
    exact = feats.detach().double().requires_grad_()
    output = operator.sparse_mean_pool(feats, cache, factor, exact_mean)
    expected = sparse_mean_pool_reference(exact, parents, len(coarse.coords), exact_mean)
    grad_output = torch.randn(expected.shape, generator=generator).to(DEVICE, dtype)
    (gradient,) = torch.autograd.grad(output, feats, grad_output)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad_output.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, wanted in ((output, expected), (gradient, expected_gradient)):
        assert found.shape == wanted.shape and found.dtype == dtype
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def planned(name):
    coords, channels, factor = CASES[name]
    cache = CoordinateCache(coords.to(DEVICE))
    tables = plan_pooling(cache, factor)
    feats = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    return feats, cache, factor, tables


def test_operators_are_registered_right():
    feats, _, _, (parents, order, starts) = planned("odd")
    torch.library.opcheck(operator._pool.registered, (feats, parents, order, starts, False))
    gradient = torch.randn(len(starts) - 1, 5, device=DEVICE)
    torch.library.opcheck(operator._pool_backward.registered, (gradient, parents, starts, True))


def test_compiled_once_for_all_coordinates():
    def arguments(name):
        feats, cache, factor, _ = planned(name)
        return [feats], (cache, factor, False)

    check_compiled(operator.sparse_mean_pool, arguments, ["several samples", "other coordinates"])


@needs_gpu
def test_captured_in_a_cuda_graph():
    feats, cache, factor, _ = planned("large")
    check_captured(lambda feats: operator.sparse_mean_pool(feats, cache, factor, False), [feats])


def test_launches_on_the_device_of_the_inputs(monkeypatch):
    launches = spied_launches(monkeypatch)
    feats, cache, factor, _ = planned("odd")
    operator.sparse_mean_pool(feats, cache, factor, False).sum().backward()
    assert len(launches) == 2 and min(launches) >= 1
