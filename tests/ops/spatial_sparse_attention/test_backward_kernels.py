"""The kernels around the backward pass of the branches: what they read, and the sums of what they write."""

import pytest
import torch

from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import backward_inputs
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import LOG2_E, KeyGradients
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.backward_inputs import BranchGate, prepare_backward
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.key_gradients import key_gradients
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.key_rows import KeyOrders

from ..kernel_testing import DEVICE, DTYPES


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def number_of(statistics, first_column):
    """The number `[N, H]` whose three terms start at a column, in float64."""
    unit, growth = backward_inputs._UNIT.value, backward_inputs._GROWTH.value
    terms = statistics[..., first_column : first_column + 3].double()
    return (terms * torch.tensor([unit, unit / growth, unit / growth**2], device=DEVICE)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("branch", [None, 0, 2])
def test_inputs_of_the_backward_kernels(branch, dtype):
    output, grad_output = (random(5, 3, 20, dtype=dtype, seed=seed) for seed in (0, 1))
    log_sum, gate = 40 * random(5, 3, seed=2), random(5, 3, dtype=dtype, seed=3)
    grad_gate = torch.full_like(gate, 7)
    inputs = prepare_backward(
        output, log_sum, grad_output, 0.3, None if branch is None else BranchGate(gate, grad_gate, branch)
    )
    product = (output.double() * grad_output.double()).sum(-1)
    expected_gate = torch.full_like(gate, 7).double()
    gradient = grad_output.double()
    if branch is not None:
        expected_gate[:, branch] = product.sum(-1)
        factor = gate[:, branch, None].double()
        product, gradient = product * factor, gradient * factor[..., None]
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(grad_gate.double(), expected_gate, rtol=tolerance, atol=1e-4)
    torch.testing.assert_close(inputs.gradient.double(), gradient, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(inputs.product.double(), product, rtol=1e-5, atol=1e-5)
    assert inputs.log_sum is log_sum
    if dtype == torch.float32:
        assert inputs.statistics is None
    else:
        # Three terms are as exact as float32; two are not.
        found = number_of(inputs.statistics, backward_inputs.LOG_SUM_COLUMN.value)
        torch.testing.assert_close(found, log_sum.double() / (0.3 * LOG2_E), rtol=2e-7, atol=0)
        found = number_of(inputs.statistics, backward_inputs.PRODUCT_COLUMN.value)
        torch.testing.assert_close(found, inputs.product.double(), rtol=6e-8, atol=0)


@pytest.mark.parametrize("num_tokens, num_compressed", [(37, 9), (3, 50)])
@pytest.mark.parametrize("window_parts, compressed_parts", [(1, 6), (3, 1)])
def test_gradients_of_keys_in_the_rows_of_the_caller(num_tokens, num_compressed, window_parts, compressed_parts):
    def gradients(*rows):
        return KeyGradients(random(*rows, 2, 20, seed=len(rows)), random(*rows, 2, 12, seed=len(rows) + 2))

    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(rows, generator=generator) for rows in (num_tokens, num_compressed, num_tokens)]
    # Row `order[i]` of the caller is row i of the branch.
    inverses = KeyOrders(*(order.argsort().to(DEVICE) for order in orders))
    selected, window = gradients(num_tokens), gradients(window_parts, num_tokens)
    compressed = gradients(compressed_parts, num_compressed)
    found = key_gradients(*selected, window, compressed, inverses, torch.float32)
    window_order, compressed_order, block_order = (order.to(DEVICE) for order in orders)
    for number in range(2):
        expected = torch.zeros_like(selected[number])
        expected[block_order] += selected[number]
        expected[window_order] += window[number].sum(0)
        torch.testing.assert_close(found[number], expected)
        expected = torch.zeros_like(compressed[number][0])
        expected[compressed_order] = compressed[number].sum(0)
        torch.testing.assert_close(found[2 + number], expected)
