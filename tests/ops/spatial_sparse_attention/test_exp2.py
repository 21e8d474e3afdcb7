"""Powers of two of which some are computed by a polynomial."""

import pytest
import torch


pytest.importorskip("triton")

import triton
import triton.language as tl

from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tiles import _ROUNDING, _SMALLEST, CUBIC, exp2
from tests.ops.kernel_testing import DEVICE, NATIVE


SIZE = 1024


@triton.jit
def _kernel(numbers, powers, POLYNOMIAL: tl.constexpr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(powers + places, exp2(tl.load(numbers + places), POLYNOMIAL))


def cubic(numbers):
    """What the assembly computes of a number, step by step in float32."""
    numbers = numbers.clamp(min=_SMALLEST)
    shifted = numbers + _ROUNDING
    fraction = numbers - (shifted - _ROUNDING)
    power = torch.full_like(fraction, CUBIC[0])
    for coefficient in CUBIC[1:]:
        power = power * fraction + coefficient
    bits = power.view(torch.int32) + (shifted.view(torch.int32) << 23)
    return bits.view(torch.float32)


def test_cubic():
    numbers = torch.cat([torch.linspace(-125, 0, 100_001), torch.arange(-125, 1) + 0.0, torch.arange(-125, 0) + 0.5])
    expected = torch.exp2(numbers.double())
    assert ((cubic(numbers) - expected).abs() / expected).max() < 7.6e-5
    below = cubic(torch.tensor([float("-inf"), -1e30, -126.0]))
    assert ((below > 0) & (below <= 2.0**-125)).all()


@pytest.mark.parametrize("polynomial", [False, pytest.param(True, marks=pytest.mark.skipif(not NATIVE, reason="PTX"))])
def test_kernel(polynomial):
    numbers = torch.linspace(-125, 0, SIZE, device=DEVICE)
    powers = torch.empty_like(numbers)
    _kernel[(1,)](numbers, powers, polynomial, SIZE)
    expected = torch.exp2(numbers.double())
    error = (powers - expected).abs() / expected
    assert error.max() < (7.7e-5 if polynomial else 1e-6)
    # A quarter comes from the cubic.
    assert not polynomial or 0.2 * SIZE < (error > 1e-6).sum() <= 0.25 * SIZE
    _kernel[(1,)](numbers.fill_(float("-inf")), powers, polynomial, SIZE)
    assert powers.max() <= 2.0**-125
