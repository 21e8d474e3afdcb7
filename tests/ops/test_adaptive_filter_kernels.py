"""The adaptive filter: the reference against a loop over voxels, the kernel against the reference in float64."""

import itertools

import pytest
import torch

from diffusers_sparse3d.ops.adaptive_filter import adaptive_filter
from diffusers_sparse3d.ops.adaptive_filter.operator import filter_patches
from diffusers_sparse3d.ops.adaptive_filter.reference import adaptive_filter_reference

from .kernel_testing import DEVICE, DTYPES, NATIVE


# Batch size, channels and sizes of patches.
SHAPES = [(2, 8, 5, 6, 7), (1, 1, 8, 4, 9), (1, 3, 1, 4, 2), (1, 3, 4, 8, 1), (3, 5, 2, 2, 2), (1, 2, 1, 1, 1)]
if NATIVE:
    SHAPES += [(2, 8, 63, 40, 65), (1, 1, 64, 64, 64)]


def make_inputs(shape, dtype):
    """Values and taps in float64, with the values that they have in `dtype`; one voxel has no weight at all."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(shape, generator=generator)
    taps = torch.randn(shape[0], 27, *shape[2:], generator=generator)
    taps[:, :, -1, -1, -1] = 0
    return [tensor.to(dtype).double().to(DEVICE) for tensor in (hidden_states, taps)]


def test_reference_is_the_sum_over_neighbours():
    hidden_states, taps = make_inputs((2, 3, 3, 4, 5), torch.float64)
    output = adaptive_filter_reference(hidden_states, taps)
    sizes = hidden_states.shape[2:]
    for position in itertools.product(*map(range, sizes)):
        total = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
        for offset in itertools.product((-1, 0, 1), repeat=3):
            neighbour = tuple(place + step for place, step in zip(position, offset))
            if all(0 <= place < size for place, size in zip(neighbour, sizes)):
                number = 9 * (offset[0] + 1) + 3 * (offset[1] + 1) + offset[2] + 1
                total += taps[(slice(None), number, *position)][:, None] * hidden_states[(..., *neighbour)]
        norm = taps[(..., *position)].abs().sum(1, keepdim=True).clamp(min=1e-12)
        torch.testing.assert_close(output[(..., *position)], total / norm)


@pytest.mark.parametrize("layout", ["channels first", "channels last", "wider rows", "strides of axes of size 1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_reference(shape, dtype, layout):
    hidden_states, taps = make_inputs(shape, dtype)
    expected = adaptive_filter_reference(hidden_states, taps)
    inputs = [tensor.to(dtype) for tensor in (hidden_states, taps)]
    if layout == "channels last":
        inputs = [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in inputs]
    elif layout == "wider rows":
        # As a convolution with padded channels leaves them; what follows in a row is not to be read.
        padding = [tensor.new_full((shape[0], *shape[2:], 32), float("nan")) for tensor in inputs]
        for wide, tensor in zip(padding, inputs):
            wide[..., : tensor.shape[1]] = tensor.movedim(1, -1)
        inputs = [wide[..., : tensor.shape[1]].movedim(-1, 1) for wide, tensor in zip(padding, inputs)]
    elif layout == "strides of axes of size 1":
        inputs = [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in inputs]
        strides = [[1 if size == 1 else step for size, step in zip(x.shape, x.stride())] for x in inputs]
        inputs = [tensor.as_strided(tensor.shape, stride) for tensor, stride in zip(inputs, strides)]
    output = filter_patches(*inputs)
    assert output.shape == expected.shape and output.dtype == dtype
    error = (output.double() - expected).norm() / expected.norm().clamp(min=0.1)
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_kernels_against_reference(shape, dtype, layout):
    inputs = make_inputs(shape, dtype)
    # Some taps are zero, whose magnitude has no slope, and all of one voxel, which is not divided by their sum.
    inputs[1][:, 5:9] = 0
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).double().to(DEVICE)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(adaptive_filter_reference(*leaves), leaves, grad_output)
    found_leaves = [tensor.to(dtype) for tensor in inputs]
    found_grad_output = grad_output.to(dtype)
    if layout == "channels last":
        found_leaves = [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in found_leaves]
        found_grad_output = found_grad_output.contiguous(memory_format=torch.channels_last_3d)
    found_leaves = [tensor.requires_grad_() for tensor in found_leaves]
    found = torch.autograd.grad(filter_patches(*found_leaves), found_leaves, found_grad_output)
    # The voxel without weights passes on 1e12 times its gradient, which is infinite in float16.
    extreme = torch.zeros(1, 1, *shape[2:], dtype=torch.bool, device=DEVICE)
    extreme[..., -1, -1, -1] = True
    for gradient, reference in zip(found, expected):
        assert gradient.shape == reference.shape and gradient.dtype == dtype
        for part in (~extreme, extreme) if dtype != torch.float16 else (~extreme,):
            own, other = (torch.where(part, values.double(), 0) for values in (gradient, reference))
            error = (own - other).norm() / other.norm().clamp(min=0.1)
            assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_the_filter_never_amplifies():
    hidden_states, taps = make_inputs((1, 4, 6, 6, 6), torch.float32)
    output = adaptive_filter(hidden_states.float(), 100 * taps.float())
    assert output.abs().max() <= hidden_states.abs().max() * (1 + 1e-6)


def test_gradients():
    hidden_states, taps = (tensor.requires_grad_() for tensor in make_inputs((1, 2, 2, 3, 2), torch.float64))
    # The taps of a voxel that are all zero have no derivative of their norm.
    taps = (taps + 0.1).detach().requires_grad_()
    assert torch.autograd.gradcheck(adaptive_filter, (hidden_states, taps))


@pytest.mark.parametrize("number", [26, 28])
def test_shapes_that_do_not_fit(number):
    with pytest.raises(ValueError, match="`taps` must have shape"):
        adaptive_filter(torch.zeros(1, 2, 3, 3, 3), torch.zeros(1, number, 3, 3, 3))
    with pytest.raises(ValueError, match="`taps` must have the dtype"):
        adaptive_filter(torch.zeros(1, 2, 3, 3, 3), torch.zeros(1, 27, 3, 3, 3, dtype=torch.float16))
