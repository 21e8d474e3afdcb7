"""Group norm of dense patches: the reference and the kernels against PyTorch's in float64."""

import collections

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import JITFunction

from diffusers_sparse3d.ops.group_norm import dense_group_norm, operator, reference
from diffusers_sparse3d.ops.group_norm.kernels import common, join_statistics, normalization, statistics
from diffusers_sparse3d.ops.group_norm.plan import GroupNormPlan

from .kernel_testing import DEVICE, DTYPES, NATIVE, needs_gpu, without_gpu
from .runtime.fake_driver import fake_driver, on_gpu  # noqa: F401 - a fixture


# Shape of the patches, groups.
CASES = [((1, 8, 6, 5, 7), 4), ((3, 6, 4, 4, 4), 3), ((2, 4, 3, 3), 1), ((1, 2, 1, 1, 1), 1), ((2, 5, 9), 5)]
if NATIVE:
    CASES += [((1, 8, 128, 128, 128), 4), ((2, 32, 64, 63, 65), 4)]


def make_inputs(shape, dtype):
    """Values far from zero, weight and bias in float64, with the values that they have in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    tensors = [10 + torch.randn(shape, generator=generator), *torch.randn(2, shape[1], generator=generator)]
    return [tensor.to(dtype).double().to(DEVICE) for tensor in tensors]


def expected_of(values, num_groups, weight, bias, silu):
    normalized = F.group_norm(values, num_groups, weight, bias, 1e-5)
    return F.silu(normalized) if silu else normalized


def assert_close(found, expected, dtype):
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2)
    assert (found.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, num_groups", CASES, ids=str)
def test_reference(shape, num_groups, dtype, silu):
    inputs = make_inputs(shape, dtype)
    found = reference.dense_group_norm_reference(*_arguments(inputs, dtype, num_groups), 1e-5, silu)
    assert_close(found, expected_of(inputs[0], num_groups, *inputs[1:], silu), dtype)


@needs_gpu
@pytest.mark.parametrize("shape, num_groups", CASES, ids=str)
def test_reference_on_a_gpu_in_float64(shape, num_groups):
    values, weight, bias = make_inputs(shape, torch.float64)
    found = dense_group_norm(values, num_groups, weight, bias, silu=True)
    assert_close(found, expected_of(values, num_groups, weight, bias, True), torch.float64)


def _arguments(inputs, dtype, num_groups):
    values, weight, bias = (tensor.to(dtype) for tensor in inputs)
    return values, num_groups, weight, bias


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, num_groups", CASES, ids=str)
def test_kernels(shape, num_groups, dtype, channels_last, silu):
    inputs = make_inputs(shape, dtype)
    results = []
    for number_type in (dtype, torch.float64):
        values, weight, bias = leaves = [tensor.to(number_type).requires_grad_() for tensor in inputs]
        if number_type == torch.float64:
            output = expected_of(values, num_groups, weight, bias, silu)
        else:
            given = values.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else values
            output = operator.dense_group_norm(given, num_groups, weight, bias, 1e-5, silu)
        grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(output)
        results.append((output, *torch.autograd.grad(output, leaves, grad_output)))
    for found, expected in zip(*results):
        assert_close(found, expected, dtype)


def test_gradients_of_the_reference():
    values, weight, bias = (tensor.requires_grad_() for tensor in make_inputs((2, 4, 2, 2, 3), torch.float64))
    assert torch.autograd.gradcheck(
        lambda *leaves: dense_group_norm(leaves[0], 2, *leaves[1:], silu=True), (values, weight, bias)
    )


@without_gpu
def test_few_variants_are_compiled(fake_driver, monkeypatch):  # noqa: F811 - a fixture
    """The norms of a refiner's U-Net, of eleven widths on four levels, are as many as there are shapes of tiles."""
    kernels = (statistics._statistics_kernel, join_statistics._join_kernel, normalization._normalize_kernel)
    for kernel in kernels:
        # Compiled as `triton.jit` would be told to, which interprets here.
        function = kernel.function
        monkeypatch.setattr(kernel, "function", JITFunction(function.fn, **function.kwargs))
        monkeypatch.setattr(kernel, "_compiled", {})
        fake_driver.bodies[function.fn.__name__] = lambda *_: None
    monkeypatch.setattr(common, "num_multiprocessors", lambda _: 132)
    levels = {4096: (8, 16, 40), 512: (32, 64, 160), 64: (128, 256, 640), 9: (512, 1024)}
    for rows, widths in levels.items():
        for channels in widths:
            cu_rows = on_gpu(torch.tensor([0, rows], dtype=torch.int32))
            feats, weight, bias = (on_gpu(torch.zeros(*shape, channels)) for shape in ((rows,), (), ()))
            plan, tiles = GroupNormPlan(cu_rows[:, None], cu_rows, None), common.Tiles.of(feats, 1)
            parts = statistics.part_statistics(feats, plan, tiles)
            joined = join_statistics.join_statistics(parts, plan, 4, 1e-5)
            normalization.normalize(feats, common.Affine(weight, bias), joined, plan, tiles, True)
    assert len(fake_driver.launched) == 33
    counts = collections.Counter(fake_driver.compiled)
    assert counts == {"_statistics_kernel": 5, "_join_kernel": 1, "_normalize_kernel": 5}
