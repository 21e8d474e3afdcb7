"""Noise levels against values worked out by hand and against the scheduler that samples with the same shift."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_sparse3d.pipelines.timesteps import set_timesteps
from diffusers_sparse3d.training.noise_levels import NoiseLevels, losses_by_level
from tests.training.test_flow_matching import make_task


FLUX = NoiseLevels("uniform", 2.0, "exponential", base_tokens=100, max_shift=8.0, max_tokens=300)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (NoiseLevels("uniform", 3.0), [3, 3, 3]),
        (NoiseLevels("uniform", 3.0, "sqrt", base_tokens=100), [3, 6, 1.5]),
        # Logarithms rise by log 4 from 100 to 300 tokens: by log 8 to 400, and fall by 3/8 log 4 to 25.
        (FLUX, [2, 16, 2 * 4**-0.375]),
    ],
)
def test_shifts_by_hand(levels, expected):
    assert levels.shifts(torch.tensor([100, 400, 25])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_shifted_noise_levels_by_hand(sampling):
    # Quantiles of the standard normal distribution at -1, 0 and 2.
    quantiles = [0.15865525, 0.5, 0.97724987]
    unshifted = quantiles if sampling == "uniform" else [1 / (1 + math.exp(-x)) for x in (-1, 0, 2)]
    for shift in (1.0, 3.0):
        expected = [shift * level / (1 + (shift - 1) * level) for level in unshifted]
        levels = NoiseLevels(sampling, shift).at(torch.tensor(quantiles), torch.ones(3))
        assert levels.tolist() == pytest.approx(expected, rel=1e-5)
    # Each sample has the shift of its own length.
    both = NoiseLevels(sampling, 1.0, "sqrt", base_tokens=4).at(torch.tensor([0.3, 0.3]), torch.tensor([4, 16]))
    low, high = both.tolist()
    assert high == pytest.approx(2 * low / (1 + low)) and high > low


def test_the_extreme_quantiles_have_noise_levels_in_between():
    levels = NoiseLevels("logit_normal", 1.0).at(torch.tensor([1e-7, 1 - 1e-7]), torch.ones(2))
    assert 0 < levels[0] < 0.01 and 0.99 < levels[1] < 1


@pytest.mark.parametrize("levels", [NoiseLevels("uniform", 3.0), FLUX])
def test_levels_are_those_of_the_scheduler(levels, tmp_path):
    """Levels are as often above each of the scheduler's as its steps are, after saving and loading it."""
    levels.scheduler().save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    set_timesteps(scheduler, 1000, 250, torch.device("cpu"))
    quantiles = torch.linspace(1, 0.001, 1000)
    expected = levels.at(quantiles, torch.full((1000,), 250))
    # The later steps differ: the scheduler shifts the lower end of its own levels twice.
    assert torch.allclose(scheduler.sigmas[:500], expected[:500], atol=3e-3)
    assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


def test_losses_by_level_by_hand():
    losses = losses_by_level(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.05, 0.31, 0.39, 1.0]))
    assert list(losses) == [f"sigma/0.{place}" for place in range(10)]
    found = {name: (loss.total.item(), loss.number.item()) for name, loss in losses.items() if loss.number}
    assert found == {"sigma/0.0": (1, 1), "sigma/0.3": (6, 2), "sigma/0.9": (8, 1)}


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_levels_of_a_batch_are_those_of_its_quantiles_and_lengths(stage):
    """The timestep of each sample, and the losses by level, whose sum is the loss."""
    options = {"shift": 2.0, "shift_scaling": "sqrt", "shift_base_tokens": 8}
    task, batch = make_task(stage, sigma_sampling="uniform", **options)
    batch["quantile"] = torch.tensor([0.15, 0.5, 0.95])
    latents = task.transformer.latents
    task.transformer.latents = latents + 1  # so that there is a loss
    losses = task(batch)
    _, timestep = task.transformer.calls[-1]
    lengths = [64, 64, 64] if stage == "dense" else [2, 1, 2]
    expected = []
    for quantile, length in zip((0.15, 0.5, 0.95), lengths):
        shift = 2 * math.sqrt(length / 8)
        expected.append(shift * quantile / (1 + (shift - 1) * quantile))
    assert (timestep / 1000).tolist() == pytest.approx(expected)
    # The prediction is off by 1 / sigma.
    rows = [1, 1, 1] if stage == "dense" else lengths
    for level, count in zip(expected, rows):
        loss = losses[f"sigma/{math.floor(10 * level) / 10:.1f}"]
        assert loss.number.item() == count and loss.total.item() == pytest.approx(count / level**2, rel=1e-4)
    levels = [loss for name, loss in losses.items() if name != "loss"]
    assert sum(loss.total.item() for loss in levels) == pytest.approx(losses["loss"].total.item(), rel=1e-5)
    assert sum(loss.number.item() for loss in levels) == losses["loss"].number.item()
