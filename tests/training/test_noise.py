"""Noise of a sample: normal, independent of everything but its seed, its purpose and its place."""

import pytest
import torch

from diffusers_sparse3d.training import noise as noise_module
from diffusers_sparse3d.training.noise import Draw, normal_like, uniform


def test_bits_are_those_of_splitmix64():
    """The first numbers of the published generator for the state 1234567, computed with Python's integers."""
    mask, state, expected = 2**64 - 1, 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        bits = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(bits ^ (bits >> 31))
    assert expected[0] == 6457827717110365317
    states = 1234567 + noise_module._GOLDEN * torch.arange(1, 4)
    assert [value % 2**64 for value in noise_module._mix(states).tolist()] == expected


def test_noise_is_normal_and_independent():
    seeds = torch.arange(64)
    values = torch.zeros(64, 4, 16, 16)
    noise = normal_like(values, seeds, Draw.NOISE).flatten(1)
    other = normal_like(values, seeds, Draw.POSTERIOR).flatten(1)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert float((noise**power).mean()) == pytest.approx(moment, abs=0.08)
    # Of neighbouring elements, of two samples with neighbouring seeds, of two purposes.
    for product in (noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1], noise * other):
        assert abs(float(product.mean())) < 0.02
    share = uniform(seeds, Draw.COLOR, 500)
    assert float(share.min()) > 0 and float(share.max()) < 1
    assert float(share.mean()) == pytest.approx(0.5, abs=0.01) and float(share.var()) == pytest.approx(
        1 / 12, abs=0.003
    )


def test_noise_belongs_to_the_sample():
    """Neither the order of rows, nor the batch, nor the place of the sample in it changes the noise."""
    coords = torch.randint(2048, (40, 3)).unique(dim=0)
    first, second = (torch.nn.functional.pad(coords, (1, 0), value=sample).int() for sample in (0, 1))
    both, seeds = torch.cat([first, second]), torch.tensor([7, 2**62 + 3])
    noise = normal_like(torch.zeros(len(both), 5), seeds, Draw.NOISE, both)
    order = torch.randperm(len(both))
    assert torch.equal(normal_like(torch.zeros(len(both), 5), seeds, Draw.NOISE, both[order]), noise[order])
    alone = normal_like(torch.zeros(len(second), 5), seeds[1:], Draw.NOISE, first)
    assert torch.equal(alone, noise[len(first) :])
    assert not torch.isclose(noise[: len(first)], alone).any()
    values = torch.zeros(2, 3, 4)
    assert torch.equal(normal_like(values[1:], seeds[1:], Draw.NOISE), normal_like(values, seeds, Draw.NOISE)[1:])
