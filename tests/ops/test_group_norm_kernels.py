"""The Triton kernels against the reference in float64: small cases in Triton's interpreter, larger ones on a GPU."""

import pytest
import torch

from diffusers_sparse3d.ops.group_norm import operator
from diffusers_sparse3d.ops.group_norm.kernels import common
from diffusers_sparse3d.ops.group_norm.plan import plan_group_norm
from diffusers_sparse3d.ops.group_norm.reference import sparse_group_norm_reference

from .kernel_testing import (
    DEVICE,
    DTYPES,
    NATIVE,
    check_captured,
    check_compiled,
    needs_gpu,
    spied_launches,
)
from .test_group_norm import cache_of, parameters


GROWTH = 500 if NATIVE else 1
# Rows of each sample, channels, groups.
CASES = {
    "one sample": ([200], 16, 4),
    "several samples": ([70, 0, 50, 0], 32, 32),
    "odd channels": ([40, 33], 15, 3),
    "other coordinates": ([25, 0, 31, 2], 15, 3),
    "wide": ([30, 9], 160, 5),
    "single voxels": ([1, 1], 8, 2),
    "one voxel": ([1], 8, 1),
}


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_reference(name, dtype, silu, monkeypatch):
    # Several parts of each sample, of several tiles each.
    if not NATIVE:
        monkeypatch.setattr(common, "num_multiprocessors", lambda _: 1)
        monkeypatch.setattr(common, "_TILE_VALUES", 128)
    counts, channels, num_groups = CASES[name]
    counts = [count if count < 2 else count * GROWTH for count in counts]
    generator = torch.Generator().manual_seed(0)
    batch_index = torch.repeat_interleave(torch.tensor(counts))
    cache = cache_of(batch_index[torch.randperm(len(batch_index), generator=generator)].to(DEVICE), len(counts))
    feats = 3 + torch.randn(len(batch_index), channels, generator=generator)
    inputs = [tensor.to(DEVICE, dtype) for tensor in (feats, *parameters(channels))]
    grad_output = torch.randn(feats.shape, generator=generator).to(DEVICE, dtype)
    results = []
    for number_type in (dtype, torch.float64):
        feats, weight, bias = leaves = [tensor.to(number_type).detach().requires_grad_() for tensor in inputs]
        if number_type == dtype:
            output = operator.sparse_group_norm(feats, cache, num_groups, weight, bias, 1e-5, silu)
        else:
            output = sparse_group_norm_reference(
                feats, cache.coords[:, 0], cache.batch_size, num_groups, weight, bias, 1e-5, silu
            )
        assert output.dtype == number_type
        results.append((output, *torch.autograd.grad(output, leaves, grad_output.to(number_type))))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for result, found, expected in zip(("output", "feats", "weight", "bias"), *results):
        assert found.shape == expected.shape and found.dtype == dtype
        # Groups of a single value are normalised to zero: there the error is measured against the gradient.
        size = torch.maximum(expected.norm(), 0.1 * grad_output.double().norm())
        error = (found.double() - expected).norm() / size
        assert error < tolerance, f"{result}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_far_from_zero(dtype):
    feats = (100 + torch.randn(1000, 4)).to(DEVICE, dtype)  # the variance is lost in sums of squares
    cache = cache_of(torch.arange(1000, device=DEVICE) % 2, 2)
    weight, bias = (tensor.to(DEVICE, dtype) for tensor in parameters(4))
    output = operator.sparse_group_norm(feats, cache, 2, weight, bias, 1e-5, False)
    expected = sparse_group_norm_reference(
        feats.double(), cache.coords[:, 0], 2, 2, weight.double(), bias.double(), 1e-5, False
    )
    # A mean of 100 in float32 has an error of up to 4e-6.
    assert (output.double() - expected).norm() < (1e-4 if dtype == torch.float32 else 1e-2) * expected.norm()


def planned(name):
    counts, channels, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batch_index = torch.repeat_interleave(torch.tensor(counts))
    cache = cache_of(batch_index[torch.randperm(len(batch_index), generator=generator)].to(DEVICE), len(counts))
    plan_group_norm(cache)
    feats = torch.randn(len(batch_index), channels, generator=generator)
    return cache, [tensor.float().to(DEVICE).requires_grad_() for tensor in (feats, *parameters(channels))]


@pytest.mark.parametrize("name, num_groups", [("one sample", 4), ("odd channels", 3)])
def test_operators_are_registered_right(name, num_groups):
    cache, leaves = planned(name)
    plan = plan_group_norm(cache)
    torch.library.opcheck(operator._normalize.registered, (*leaves, *plan, num_groups, 1e-5, True))
    feats, weight, bias = (leaf.detach() for leaf in leaves)
    _, mean, scale = operator._normalize(feats, weight, bias, *plan, num_groups, 1e-5, True)
    arguments = (torch.randn_like(feats), feats, weight, bias, mean, scale, *plan, True)
    torch.library.opcheck(operator._normalize_backward.registered, arguments)


def normalize(feats, weight, bias, cache):
    return operator.sparse_group_norm(feats, cache, 3, weight, bias, 1e-5, True)


def test_compiled_once_for_all_coordinates():
    def arguments(name):
        cache, leaves = planned(name)
        return leaves, (cache,)

    check_compiled(normalize, arguments, ["odd channels", "other coordinates"])


@needs_gpu
@pytest.mark.parametrize("name", ["one sample", "odd channels"])
def test_captured_in_a_cuda_graph(name):
    cache, leaves = planned(name)
    check_captured(lambda *leaves: operator.sparse_group_norm(leaves[0], cache, 1, *leaves[1:], 1e-5, True), leaves)


def test_launches_on_the_device_of_the_inputs(monkeypatch):
    launches = spied_launches(monkeypatch)
    cache, leaves = planned("odd channels")
    normalize(*leaves, cache).sum().backward()
    assert len(launches) == 5 and min(launches) >= 1
