"""The weights that a new refiner of distances starts with: they give back what it is to refine."""

import pytest
import torch

from diffusers_sparse3d import SDFRefiner
from diffusers_sparse3d.training import refiner
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.refiner_start import start_from_input


SIZES = {"feature_channels": 2, "feature_mlp_dim": 4, "patch_size": 16, "layers_per_block": 1, "mid_layers": 0}


def make_refiner(channels=(4, 8), groups=2):
    torch.manual_seed(0)
    return SDFRefiner(block_out_channels=list(channels), norm_num_groups=groups, **SIZES)


def make_patches():
    """Shells of distances in free space, `[2, 1, 16, 16, 16]`, and features with it."""
    axis = torch.arange(16) - 7.3
    radius = (axis[:, None, None].square() + axis[:, None].square() + axis.square()).sqrt()
    distance = torch.stack([(radius - size) / 2 for size in (4.0, 5.0)])[:, None]
    sample = torch.where(distance.abs() < 1, distance, 1.0)
    return sample, torch.randn(2, 2, 16, 16, 16)


@pytest.mark.parametrize("channels, groups", [((4, 8), 2), ((8, 8, 16), 4), ((2, 4, 4), 1)])
@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_a_new_refiner_gives_back_the_distances(channels, groups, scale):
    model = make_refiner(channels, groups)
    sample, features = make_patches()
    before = model(sample, features).sample
    assert start_from_input(model, scale)
    refined = model(sample, features).sample
    expected = (scale * sample).clamp(-1, 1)
    sure = sample.abs() > 0.02
    assert torch.equal(refined[sure] > 0, sample[sure] > 0)
    assert (refined - expected).square().mean() < 0.01 < (before - expected).square().mean()
    assert (refined - expected).abs().max() < 0.25


def test_every_weight_learns():
    model = make_refiner()
    start_from_input(model, 2.0)
    sample, features = make_patches()
    model(sample, features).sample.square().sum().backward()
    still = [name for name, weight in model.named_parameters() if not weight.grad.any()]
    assert not still


@pytest.mark.parametrize("channels", [(2, 4), (6, 6)])
def test_groups_of_another_size_keep_random_weights(channels):
    model, same = make_refiner(channels), make_refiner(channels)
    assert not start_from_input(model, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))


@pytest.mark.parametrize("start", [True, False])
def test_the_configuration_decides(start):
    model = {"block_out_channels": [4, 8], "norm_num_groups": 2, **SIZES}
    values = {"data": "", "output_dir": "", "vae": "x", "max_train_steps": 1}
    values |= {"model": model, "start_from_input": start}
    made = refiner.load_refiner(build_config(refiner.RefinerConfig, values))
    sample, features = make_patches()
    sure = sample.abs() > 0.02
    assert torch.equal(made(sample, features).sample[sure] > 0, sample[sure] > 0) == start


def test_random_weights_are_said(caplog):
    values = {"data": "", "output_dir": "", "vae": "x", "max_train_steps": 1}
    model = {"block_out_channels": [2, 4], "norm_num_groups": 2, **SIZES}
    refiner.load_refiner(build_config(refiner.RefinerConfig, values | {"model": model}))
    assert "random weights" in caplog.text
