"""Losses against values worked out by hand."""

import math

import pytest
import torch

from diffusers_sparse3d.training.batches import block_grids, expand_blocks
from diffusers_sparse3d.training.losses import Loss, LossSums, dice_loss, has_normal, normal_loss, sign_loss


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


def tilted_plane(normal, offset):
    """Distances to a plane at the samples of one block, `[1, 8, 8, 8]`."""
    axis = torch.arange(8.0)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    return (points @ torch.tensor(normal) - offset)[None]


def test_normal_loss_is_the_angle_between_planes():
    angle = math.radians(25)
    true = tilted_plane([0.0, 0.0, 1.0], 3.5) / 4
    sample = tilted_plane([math.sin(angle), 0.0, math.cos(angle)], 3.5) / 4
    band = true.abs() < 0.5
    # The band has the layers z = 2, 3, 4 and 5; those with the next layer in it are 2, 3 and 4, with 7 x 7 samples.
    loss = normal_loss(sample, true, band)
    assert loss.number == 3 * 49 and torch.equal(
        has_normal(band)[0, 0, 0], torch.arange(7).clamp(2, 4) == torch.arange(7)
    )
    assert loss.mean.item() == pytest.approx(1 - math.cos(angle), rel=1e-4)
    # Neither the scale of the distances nor what is outside of the band counts.
    sample[..., 6:] = 9
    assert normal_loss(3 * sample, true, band).mean.item() == pytest.approx(1 - math.cos(angle), rel=1e-4)


def test_sign_loss_by_hand():
    sample = torch.tensor([[0.5], [-0.25], [-1.0], [0.75]])
    target = torch.tensor([[1.0], [1.0], [-1.0], [-0.5]])
    loss = sign_loss(sample, target, torch.tensor([False, False, False, True]))
    assert (loss.total.item(), loss.number.item()) == (0.25, 3)


def test_grids_of_decoded_rows():
    # A value that tells where a sample is, by way of the coordinates that the decoder's rows have.
    coords, target, *_ = expand_blocks(
        {
            "coords": torch.tensor([[0, 1, 2, 3], [0, 4, 0, 1]], dtype=torch.int32),
            "values": torch.arange(1024.0).view(2, 512) / 1024,
            "sharp": torch.zeros(2, 64, dtype=torch.uint8),
        }
    )
    x, y, z = (block_grids(coords[:, axis]) for axis in (1, 2, 3))
    assert (x[0, 5, 0, 0], y[0, 5, 6, 0], z[1, 0, 0, 7]) == (13, 22, 15)
    assert torch.equal(block_grids(target[:, 0]), torch.arange(1024.0).view(2, 8, 8, 8) / 1024)


def test_sums_become_means_over_all_elements_and_processes():
    sums = LossSums()
    sums.add({"input": Loss(torch.tensor(6.0), torch.tensor(4)), "sharp": Loss(torch.tensor(0.0), torch.tensor(0))})
    sums.add({"input": Loss(torch.tensor(3.0), torch.tensor(2)), "sharp": Loss(torch.tensor(0.0), torch.tensor(0))})
    # A second process that has seen 1.0 of 2 elements: 10 of 8 in all. A loss without elements is left out.
    other = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    assert sums.means(lambda pairs: pairs + other, {"input": 2.0, "sharp": 1.0}) == {"loss": 2.5, "input": 1.25}
