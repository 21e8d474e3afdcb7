"""The RMS norm of heads: the reference is the formula, the kernels are the reference in float64."""

import pytest
import torch

from diffusers_sparse3d.models.normalization import MultiHeadRMSNorm
from diffusers_sparse3d.ops.head_norm import api, head_rms_norm, operator
from diffusers_sparse3d.ops.head_norm.kernels import head_norm_backward, heads
from diffusers_sparse3d.ops.head_norm.reference import head_rms_norm_reference
from diffusers_sparse3d.ops.whole_tokens import with_whole_tokens

from .kernel_testing import DEVICE, DTYPES, NATIVE, check_compiled, run_kernels_on_the_cpu, spied_launches


# Tokens, heads and channels of a head.
CASES = {
    "tokens": (37, 4, 16),
    "one token": (1, 1, 1),
    "odd sizes": (11, 3, 5),
    "a wide token": (3, 5, 130),
}
if NATIVE:
    CASES |= {"published": (46_001, 32, 32), "keys": (46_001, 2, 32), "wide heads": (5_000, 16, 64)}


def make_case(name, dtype, shape=()):
    """Heads and gamma in float64, with the values that they have in `dtype`; one head is too short for the norm."""
    generator, (tokens, num_heads, dim) = torch.Generator().manual_seed(0), CASES[name]
    hidden_states = torch.randn(*shape, tokens, num_heads, dim, generator=generator)
    if tokens > 2:
        hidden_states[..., 2, 0, :] *= 5e-13 / hidden_states[..., 2, 0, :].norm(dim=-1, keepdim=True)
    gamma = 1 + torch.randn(num_heads, dim, generator=generator) / 2
    return [tensor.to(dtype).double().to(DEVICE) for tensor in (hidden_states, gamma)]


def test_reference_is_the_formula():
    hidden_states, gamma = make_case("odd sizes", torch.float64)
    found = head_rms_norm(hidden_states, gamma)
    # One over the root of the mean square, for all heads but the one of half the length that counts.
    root = hidden_states.square().mean(-1, keepdim=True).sqrt()
    factor = torch.where(root > 1e-12, 1.0, 0.5)
    torch.testing.assert_close(found, factor * hidden_states / root * gamma)
    norm = MultiHeadRMSNorm(*gamma.shape).to(DEVICE)
    norm.gamma.data.copy_(gamma)
    torch.testing.assert_close(norm(hidden_states.float()), found.float())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("name", CASES)
def test_head_norm(name, tile, dtype, monkeypatch):
    """With tiles of one token, programs of the backward pass have several of them."""
    if not NATIVE:
        monkeypatch.setattr(heads, "_TILE", tile)
        monkeypatch.setattr(head_norm_backward, "_PROGRAMS_OF_MULTIPROCESSOR", 4)
    results = []
    for function, number_type in ((operator.normalize_heads, dtype), (head_rms_norm_reference, torch.float64)):
        leaves = [tensor.to(number_type).requires_grad_() for tensor in make_case(name, dtype)]
        output = function(*leaves)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(output)
        results.append((output, *torch.autograd.grad(output, leaves, weights)))
    # The gradient of a short head is 1e12 times as large as others: relative to itself, and infinite in float16.
    rows = make_case(name, dtype)[0].flatten(0, 1).norm(dim=1) > 1e-12
    for number, (found, expected) in enumerate(zip(*results)):
        assert found.shape == expected.shape and found.dtype == dtype
        found, expected = found.double(), expected.double()
        if number == 1:
            found, expected, others = found.flatten(0, 1)[rows], expected.flatten(0, 1)[rows], found.flatten(0, 1)
            zeros = results[1][1].flatten(0, 1)[~rows].to(dtype).double()
            torch.testing.assert_close(others[~rows], zeros, rtol=1e-2, atol=0.0)
        # With a single channel the gradient is zero, but for rounding.
        error = (found - expected).norm() / expected.norm().clamp(min=0.1 * weights.double().norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"result {number}: {error:.2e}"


def test_rows_of_a_wider_tensor_are_read_in_place(monkeypatch):
    """As queries and keys of one projection are, in tokens `[B, L]`."""
    run_kernels_on_the_cpu(monkeypatch)
    hidden_states, gamma = (tensor.float() for tensor in make_case("tokens", torch.float32, (2,)))
    wide = torch.cat([hidden_states, hidden_states.flip(1)], 2).chunk(2, 2)
    for number, tensor in enumerate(wide):
        assert not tensor.is_contiguous()
        leaf = tensor.detach().requires_grad_()
        output = head_rms_norm(leaf, gamma)
        expected = head_rms_norm_reference(hidden_states.flip(1) if number else hidden_states, gamma)
        torch.testing.assert_close(output, expected)
        # Gradients of the result may be parts of a wider tensor too.
        weights = torch.arange(3 * output.numel(), device=DEVICE).sin().view(*output.shape[:2], -1, output.shape[3])
        weights = weights.chunk(3, 2)[number]
        (gradient,) = torch.autograd.grad(output, leaf, weights)
        leaf = tensor.double().requires_grad_()
        (expected,) = torch.autograd.grad(head_rms_norm_reference(leaf, gamma.double()), leaf, weights.double())
        long = tensor.norm(dim=-1) > 1e-12
        torch.testing.assert_close(gradient[long].double(), expected[long], rtol=1e-4, atol=1e-5)
    assert with_whole_tokens(wide[1][0]).stride(0) == 2 * 64
    transposed = hidden_states[0].transpose(0, 1)
    assert with_whole_tokens(transposed).is_contiguous() and not transposed.is_contiguous()


def test_compiled():
    def arguments(name):
        hidden_states, gamma = make_case(name, torch.float32)
        return [hidden_states.float()[: 20 if name == "tokens" else None, :3, :5], gamma.float()[:3, :5]], ()

    def function(hidden_states, gamma):
        return operator.normalize_heads(hidden_states + 0.5, gamma)

    check_compiled(
        lambda *leaves: function(*leaves),
        lambda name: ([leaf.clone().requires_grad_() for leaf in arguments(name)[0]], ()),
        ["tokens", "odd sizes"],
    )


def test_which_way_is_taken(monkeypatch):
    run_kernels_on_the_cpu(monkeypatch)
    launches = spied_launches(monkeypatch)
    hidden_states, gamma = (tensor.float() for tensor in make_case("odd sizes", torch.float32))
    head_rms_norm(hidden_states, gamma)
    assert launches == [1]
    # No tokens, another dtype, and tokens that do not fit in the registers.
    assert head_rms_norm(hidden_states[:0], gamma).shape == (0, 3, 5)
    head_rms_norm(hidden_states.double(), gamma)
    monkeypatch.setattr(api, "MOST_VALUES", 31)
    head_rms_norm(hidden_states, gamma)
    assert launches == [1]


def test_shapes_that_do_not_fit():
    hidden_states, gamma = make_case("odd sizes", torch.float32)
    for wrong in (gamma[:2], gamma[0], gamma[None]):
        with pytest.raises(ValueError, match="`gamma` must have shape"):
            head_rms_norm(hidden_states, wrong)
    with pytest.raises(ValueError, match="`gamma` must have shape"):
        head_rms_norm(hidden_states[0, 0], gamma)
    with pytest.raises(ValueError, match="`gamma`"):
        head_rms_norm(hidden_states, gamma.int())
