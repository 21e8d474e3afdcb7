"""Timestep modulation: the reference against plain formulas, the kernels against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_sparse3d.ops.modulation import (
    SampleRows,
    affine_layer_norm,
    api,
    gated_sum,
    modulated_layer_norm,
    operator,
)
from diffusers_sparse3d.ops.modulation.reference import gated_sum_reference, modulated_layer_norm_reference
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import DEVICE, DTYPES, NATIVE, run_kernels_on_the_cpu, spied_launches


# Tokens of each sample, channels; "parts" has no index of samples.
CASES = {
    "one sample": ([37], 24),
    "several samples": ([40, 0, 13, 0], 16),
    "single tokens": ([1, 1, 1], 5),
    "parts": ([11, 11, 11], 20),
    "wide": ([3, 2], 300),
}
if NATIVE:
    CASES |= {"published": ([10_000, 36_000], 1024), "large parts": ([4096, 4096], 1024)}


def make_case(name, dtype):
    """Samples, and tokens, values, shift, scale and gate in float64, with the values that they have in `dtype`."""
    counts, channels = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batch = torch.repeat_interleave(torch.tensor(counts))
    if name not in ("parts", "large parts"):
        batch = batch[torch.randperm(len(batch), generator=generator)]
    coords = torch.stack([batch, *[torch.arange(len(batch))] * 3], 1).int().to(DEVICE)
    samples = SampleRows.of(CoordinateCache(coords, len(counts)))
    if name in ("parts", "large parts"):
        samples = SampleRows(len(counts))
    tokens = [3 + torch.randn(len(batch), channels, generator=generator) for _ in range(2)]
    # Views of a wider tensor, as a chunk of the modulation is.
    modulation = torch.randn(len(counts), 3 * channels, generator=generator)
    tensors = [tensor.to(dtype).double().to(DEVICE) for tensor in (*tokens, *modulation.chunk(3, 1))]
    return samples, batch, tensors


def plain_norm(tokens, shift, scale, batch):
    centred = tokens - tokens.mean(1, keepdim=True)
    normalized = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return normalized * (1 + scale[batch]) + shift[batch]


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    samples, batch, (tokens, values, shift, scale, gate) = make_case(name, torch.float64)
    batch = batch.to(DEVICE)
    torch.testing.assert_close(
        modulated_layer_norm(tokens, shift, scale, samples), plain_norm(tokens, shift, scale, batch)
    )
    torch.testing.assert_close(gated_sum(tokens, values, gate, samples), tokens + gate[batch] * values)


def test_affine_reference_is_torch():
    _, _, (tokens, _, shift, scale, _) = make_case("wide", torch.float64)
    expected = F.layer_norm(tokens, tokens.shape[1:], scale[0], shift[0], 1e-6)
    torch.testing.assert_close(affine_layer_norm(tokens, scale[0], shift[0]), expected)


def check(function, expected_function, inputs, dtype):
    results = []
    for called, number_type in ((function, dtype), (expected_function, torch.float64)):
        leaves = [tensor.to(number_type).requires_grad_() for tensor in inputs]
        output = called(*leaves)
        assert output.dtype == number_type
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(output)
        results.append((output, *torch.autograd.grad(output, leaves, weights)))
    for number, (found, expected) in enumerate(zip(*results)):
        assert found.shape == expected.shape and found.dtype == dtype
        error = (found.double() - expected).norm() / expected.norm().clamp(min=0.1 * weights.double().norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"result {number}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_modulated_layer_norm(name, dtype):
    samples, _, (tokens, _, shift, scale, _) = make_case(name, dtype)
    fields = samples.index, samples.cu_rows, samples.order
    check(
        lambda *inputs: operator.normalize_and_modulate(*inputs, *fields, 1e-6, 1.0),
        lambda *inputs: modulated_layer_norm_reference(*inputs, samples, 1e-6),
        (tokens, shift, scale),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_layer_norm(dtype):
    _, _, (tokens, _, shift, scale, _) = make_case("wide", dtype)
    check(
        lambda *inputs: operator.normalize_and_modulate(*inputs, None, None, None, 1e-6, 0.0),
        lambda tokens, shift, scale: F.layer_norm(tokens, tokens.shape[1:], scale[0], shift[0], 1e-6),
        (tokens, shift[:1], scale[:1]),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gated_sum(name, dtype):
    samples, _, (tokens, values, _, _, gate) = make_case(name, dtype)
    fields = samples.index, samples.cu_rows, samples.order
    check(
        lambda *inputs: operator.add_gated(*inputs, *fields),
        lambda *inputs: gated_sum_reference(*inputs, samples),
        (tokens, values, gate),
        dtype,
    )


def test_views_of_the_modulation_are_read_in_place():
    samples, _, (tokens, _, shift, scale, _) = make_case("several samples", torch.float32)
    modulation = torch.cat([shift, scale], 1).float()
    views = modulation.chunk(2, 1)
    fields = samples.index, samples.cu_rows, samples.order
    found = operator.normalize_and_modulate(tokens.float(), *views, *fields, 1e-6, 1.0)
    expected = modulated_layer_norm_reference(tokens, shift, scale, samples, 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_samples_of_unsorted_rows():
    coords = torch.tensor([[2, 0, 0, 0], [0, 1, 0, 0], [2, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    samples = SampleRows.of(CoordinateCache(coords, 4))
    assert samples.cu_rows.tolist() == [0, 2, 2, 4, 4]
    assert samples.order.tolist() == [1, 3, 0, 2]


def test_shapes_that_do_not_fit():
    samples, tokens, row = SampleRows(2), torch.zeros(4, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="`hidden_states` must have shape"):
        modulated_layer_norm(tokens[0], row, row, samples)
    with pytest.raises(ValueError, match="`scale` must have shape"):
        modulated_layer_norm(tokens, row, row[:1], samples)
    with pytest.raises(ValueError, match="`gate` must have shape"):
        gated_sum(tokens, tokens, row[:, :2], samples)
    with pytest.raises(ValueError, match="`values` must have the shape"):
        gated_sum(tokens, tokens[:2], row, samples)


@pytest.mark.parametrize("name", ["several samples", "parts"])
def test_operators_are_registered_right(name):
    samples, _, tensors = make_case(name, torch.float32)
    tokens, values, shift, scale, gate = (tensor.float().requires_grad_() for tensor in tensors)
    fields = samples.index, samples.cu_rows, samples.order
    torch.library.opcheck(operator.normalize_and_modulate.registered, (tokens, shift, scale, *fields, 1e-6, 1.0))
    torch.library.opcheck(operator.add_gated.registered, (tokens, values, gate, *fields))


@pytest.mark.parametrize("most_channels, num_launches", [(16, 2), (15, 0)])
def test_wider_tokens_than_a_kernel_takes(most_channels, num_launches, monkeypatch):
    samples, _, tensors = make_case("several samples", torch.float32)
    tokens, values, shift, scale, gate = (tensor.float() for tensor in tensors)
    if not NATIVE:
        run_kernels_on_the_cpu(monkeypatch)
    monkeypatch.setattr(api, "MOST_CHANNELS", most_channels)
    launches = spied_launches(monkeypatch)
    found = modulated_layer_norm(tokens, shift, scale, samples), gated_sum(tokens, values, gate, samples)
    assert len(launches) == num_launches
    torch.testing.assert_close(found[0], modulated_layer_norm_reference(tokens, shift, scale, samples, 1e-6))
    torch.testing.assert_close(found[1], gated_sum_reference(tokens, values, gate, samples))
