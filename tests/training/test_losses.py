"""Losses against values worked out by hand."""

import math

import pytest
import torch

from diffusers_sparse3d.training.losses import dice_loss


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
