"""Losses and noise levels against values worked out by hand."""

import math

import pytest
import torch

from diffusers_sparse3d.training import losses
from diffusers_sparse3d.training.losses import dice_loss, sample_sigmas


def test_dice_loss_by_hand():
    # Probabilities 0.5 and 0.9 on two cells, of which the second is occupied: overlap 0.9, sums 1.4 and 1.
    logits = torch.tensor([0.0, math.log(9)]).view(1, 1, 1, 1, 2)
    occupancy = torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    first = 1 - (2 * 0.9 + 1) / (1.4 + 1 + 1)
    assert dice_loss(logits, occupancy).item() == pytest.approx(first)
    # A second sample that is empty: overlap 0, sums 1.4 and 0. There is one loss for each sample, not for each cell.
    second = 1 - 1 / (1.4 + 0 + 1)
    both = dice_loss(logits.repeat(2, 1, 1, 1, 1), torch.cat([occupancy, torch.zeros_like(occupancy)]))
    assert both.tolist() == pytest.approx([first, second])


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_shifted_noise_levels_by_hand(sampling, monkeypatch):
    draws = torch.tensor([0.0, 0.25, 0.5]) if sampling == "uniform" else torch.tensor([-1.0, 0.0, 2.0])
    monkeypatch.setattr(losses.torch, "rand" if sampling == "uniform" else "randn", lambda *args, **kwargs: draws)
    unshifted = [0.0, 0.25, 0.5] if sampling == "uniform" else [1 / (1 + math.exp(-x)) for x in (-1, 0, 2)]
    for shift in (1.0, 3.0):
        expected = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in unshifted]
        assert sample_sigmas(3, sampling, shift, torch.device("cpu")).tolist() == pytest.approx(expected)
