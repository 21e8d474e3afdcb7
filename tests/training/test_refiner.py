"""Training of the refiners: the pairs that they see, and that they make the decoded volume a truer one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sparse3d import SDFRefiner, SDFSignRefiner, SparseVAE
from diffusers_sparse3d.models.refiner_patches import surrounding_coords
from diffusers_sparse3d.training import refiner, sparse_vae
from diffusers_sparse3d.training.batches import BlockDataset, pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.refiner import RefinerConfig, RefinerTask, VolumePair, sign_patches, window_corners


MODEL = {"block_out_channels": [2, 4], "layers_per_block": 1, "mid_layers": 0, "norm_num_groups": 2}


def make_config(**values):
    return build_config(RefinerConfig, {"data": "", "output_dir": "", "vae": "x", "max_train_steps": 1, **values})


@pytest.fixture(scope="module")
def vae(tmp_path_factory, common_options, sparse_vae_model):
    """Folder of a SparseVAE of a few steps of training."""
    folder = tmp_path_factory.mktemp("vae")
    values = {**common_options, "output_dir": str(folder), "model": sparse_vae_model, "max_train_steps": 4}
    sparse_vae.train(build_config(sparse_vae.SparseVAEConfig, values))
    return folder / "vae"


@pytest.mark.parametrize("kind", ["distance", "sign"])
def test_training_writes_the_refiner_and_its_losses(tmp_path, vae, common_options, kind):
    values = {
        **common_options,
        "output_dir": str(tmp_path),
        "vae": str(vae),
        "refiner": kind,
        "model": {**MODEL, "patch_size": 16, "feature_channels": 2, "feature_mlp_dim": 8},
        "max_train_steps": 3,
        "ema_decay": 0.0,
    }
    if kind == "sign":
        values["model"] = {**MODEL, "patch_size": 16}
    refiner.train(build_config(RefinerConfig, values))
    names = {"sign", "sign_error", "unrefined_sign_error"}
    if kind == "distance":
        names |= {"distance", "unrefined_distance"}
    *entries, last = read_metrics(tmp_path)
    assert len(entries) == 3 and all(names <= set(entry) for entry in entries)
    assert {f"validation/{name}" for name in names} <= set(last)
    model_class = {"distance": SDFRefiner, "sign": SDFSignRefiner}[kind]
    saved = model_class.from_pretrained(tmp_path / "refiner")
    fresh = model_class(**values["model"])
    assert saved.config.patch_size == 16 and saved.conv_in.weight.shape == fresh.conv_in.weight.shape
    assert len(np.unique(np.array(Image.open(tmp_path / "pictures" / "0000003.png")))) > 10


def learn(task, pairs, learning_rate):
    """Trains a task on two pairs by turns; returns the means of the losses in the first and in the last two steps."""
    optimizer = torch.optim.Adam(task.refiner.parameters(), lr=learning_rate)
    means = []
    for step in range(24):
        pair = pairs[step % 2]
        losses = task.distance_losses(pair, 1) if task.of_distances else task.sign_losses(pair, 1)
        sum(weight * losses[name].mean for name, weight in task.loss_weights.items()).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append({name: loss.mean.item() for name, loss in losses.items()})
    return tuple({name: (a[name] + b[name]) / 2 for name in a} for a, b in (means[:2], means[-2:]))


def test_refined_distances_are_truer_than_decoded_ones():
    """Decoded distances are too small and too high, and features tell how much."""
    torch.manual_seed(0)
    pairs = []
    for radius in (5.0, 6.5):
        coords, target, _ = sphere_shell(16, radius)
        height = 0.8 * torch.rand(len(coords), 1)
        pairs.append(VolumePair(coords, 0.5 * target + height, torch.cat([height, target.sign()], dim=1), target))
    config = make_config(model={**MODEL, "block_out_channels": [4, 8], "patch_size": 16, "feature_channels": 2})
    task = RefinerTask(SDFRefiner(**config.model), SimpleVAE(), config)
    first, last = learn(task, pairs, 3e-2)
    assert last["distance"] < 0.5 * last["unrefined_distance"] < first["distance"]
    assert last["sign_error"] < 0.7 * last["unrefined_sign_error"] and last["sign"] < 0.5 * first["sign"]


def test_refined_signs_are_truer_than_outside_everywhere():
    """What has no voxels is the inside of a large ball, which the grid cuts, and the corners around a small one."""
    torch.manual_seed(0)
    pairs = []
    for radius in (18.0, 9.0):
        coords, target, _ = sphere_shell(32, radius)
        pairs.append(VolumePair(coords, target, target, target))
    config = make_config(refiner="sign", model={**MODEL, "block_out_channels": [4, 8], "patch_size": 16})
    task = RefinerTask(SDFSignRefiner(**config.model), SimpleVAE(), config)
    first, last = learn(task, pairs, 1e-2)
    assert last["unrefined_sign_error"] == 0.5
    assert last["sign"] < 0.6 * first["sign"] and last["sign_error"] < 0.1


def test_windows_hold_a_block_and_lie_in_the_volume():
    coords = torch.tensor([[0, 0, 0, 0], [0, 15, 15, 15], [1, 7, 2, 9]], dtype=torch.int32)
    found = set()
    for seed in range(40):
        corners = window_corners(coords, torch.tensor([seed, seed + 100]), 128, 48)
        assert ((corners >= 0) & (corners <= 80) & (corners % 8 == 0)).all()
        # The block of the second sample, in the middle of its window as far as the volume allows.
        assert corners[1].tolist() == [32, 0, 48]
        found.add(tuple(corners[0].tolist()))
    assert found == {(0, 0, 0), (80, 80, 80)}
    assert window_corners(coords, torch.tensor([1, 2]), 128, 256).eq(0).all()


def test_pairs_are_the_decoded_and_the_true_volume_of_a_window(small_data, vae):
    data = BlockDataset(SparseSDFDataset(small_data, "train", 32))
    batch = {**pack([data[0, 32], data[2, 32]]), "seed": torch.tensor([3, 4])}
    config = make_config(model={**MODEL, "patch_size": 16, "feature_channels": 2})
    task = RefinerTask(SDFRefiner(**config.model), SparseVAE.from_pretrained(vae), config)
    pair = task.decode(batch)
    assert pair.coords[:, 1:].min() >= 0 and pair.coords[:, 1:].max() < 16
    corners = window_corners(batch["coords"], batch["seed"], 32, 16)
    dense = torch.full((2, 32, 32, 32), 2.0)
    for sample, index in enumerate((0, 2)):
        blocks = data.data.blocks(index, 32)
        for (x, y, z), values in zip((8 * blocks.coords).tolist(), blocks.values):
            dense[sample, x : x + 8, y : y + 8, z : z + 8] = values.half().float()
    places = pair.coords.clone().long()
    places[:, 1:] += corners[places[:, 0]]
    assert torch.allclose(dense[tuple(places.T)], pair.target[:, 0])
    # All voxels of the windows are there.
    for sample, (x, y, z) in enumerate(corners.tolist()):
        window = dense[sample, x : x + 16, y : y + 16, z : z + 16]
        assert (window < 2).sum() == (pair.coords[:, 0] == sample).sum() > 0
    assert pair.features.shape == (len(pair.coords), 2) and pair.decoded.shape == pair.target.shape
    noisy = RefinerTask(task.refiner, task.vae, make_config(latent_noise=1.0, model=config.model))
    assert torch.equal(noisy.decode(batch).target, pair.target)
    assert not torch.allclose(noisy.decode(batch).decoded, pair.decoded, atol=1e-2)


def sphere_shell(size, radius):
    """Blocks of 8^3 around a sphere in the middle of a grid: voxels `[N, 4]`, and their distances, cut off at 1."""
    axis = torch.arange(size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    distance = ((grid - (size - 1) / 2).float().norm(dim=-1) - radius) / 2
    near = (distance.abs() < 1).view(*(size // 8, 8) * 3).amax(dim=(1, 3, 5))
    voxels = near.repeat_interleave(8, 0).repeat_interleave(8, 1).repeat_interleave(8, 2).nonzero()
    values = distance[tuple(voxels.T)].clamp(-1, 1)
    return torch.nn.functional.pad(voxels, (1, 0)).int(), values[:, None], distance


def test_the_sign_is_asked_for_where_the_pipeline_asks():
    """Around a hollow ball: the voxels of half the resolution that touch the shell, and the side of each."""
    coords, target, distance = sphere_shell(64, 24.0)
    pair = VolumePair(coords, 0.5 * target, 0.5 * target, target)
    sample, asked, outside = sign_patches(pair, 1, 32)
    surroundings = surrounding_coords(coords, 64)[:, 1:].long() // 2
    expected = torch.zeros(32, 32, 32, dtype=torch.bool)
    expected[tuple(surroundings.T)] = True
    assert expected.any() and torch.equal(asked[0, 0], expected)
    center = distance.view(32, 2, 32, 2, 32, 2).mean(dim=(1, 3, 5))
    assert torch.equal(outside[0, 0][expected], center[expected] > 0)
    assert 0 < (center[expected] > 0).float().mean() < 1
    # What the refiner sees is what `refine` shows it.
    model = SDFSignRefiner(**MODEL, patch_size=32)
    seen = []
    model.forward = lambda volume, **kwargs: seen.append(volume) or (volume,)
    model.refine(pair.decoded, coords, resolution=64)
    assert torch.equal(seen[0], sample)


def test_the_sign_is_not_asked_for_in_doubt():
    """Voxels 0 and 2 of a row of half the resolution are outside and inside, voxel 6 is half and half."""
    cell = torch.cartesian_prod(*[torch.arange(2)] * 3)
    coords = torch.cat([torch.nn.functional.pad(cell + torch.tensor([2 * x, 0, 0]), (1, 0)) for x in (0, 2, 6)]).int()
    target = torch.tensor([0.5, -0.5, 0.5]).repeat_interleave(8)[:, None]
    target[-3:] = -0.5
    _, asked, outside = sign_patches(VolumePair(coords, target, target, target), 1, 8)
    # 1 touches both sides, 5 and 7 the voxel of both; 3 is inside, as is what lies beside 2 alone.
    assert asked[0, 0, :, 0, 0].tolist() == [False, False, False, True, False, False, False, False]
    assert asked[0, 0, :, 1, 0].tolist() == [True, False, True, True, False, False, False, False]
    assert outside[0, 0, 0, 1, 0] and not outside[0, 0, 3, 0, 0]


def test_losses_of_distances_by_hand():
    """Of two patches with one and three voxels, each of which counts alike."""
    config = make_config(sign_weight=0.5, model={**MODEL, "patch_size": 16})
    task = RefinerTask(SDFRefiner(**config.model), SimpleVAE(), config)
    assert task.loss_weights == {"distance": 1.0, "sign": 0.5}
    target = torch.tensor([[0.25], [-0.5], [0.8], [0.1]])
    decoded = torch.tensor([[0.25], [0.5], [0.3], [-0.1]])
    refined = torch.tensor([[0.5], [-0.8], [0.9], [0.2]])
    coords = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 2]])
    task.refine = lambda pair, count: refined
    losses = task.distance_losses(VolumePair(coords, decoded, decoded, target), 2)
    # At twice the scale the truth is 0.5, -1, 1 and 0.2; the decoded volume is 0.5, 1, 0.6 and -0.2.
    assert losses["distance"].mean.item() == pytest.approx((0 + (0.2**2 + 0.1**2 + 0) / 3) / 2)
    assert losses["unrefined_distance"].mean.item() == pytest.approx((0 + (4 + 0.4**2 + 0.4**2) / 3) / 2)
    entropies = [np.log1p(np.exp(-10 * abs(value))) for value in refined[:, 0].tolist()]
    assert losses["sign"].mean.item() == pytest.approx((entropies[0] + sum(entropies[1:]) / 3) / 2, rel=1e-4)
    assert losses["sign_error"].mean == 0
    assert losses["unrefined_sign_error"].mean.item() == pytest.approx((0 + 2 / 3) / 2)


class SimpleVAE(torch.nn.Module):
    config = SimpleNamespace(scaling_factor=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refiner": "both"}, "`refiner` must be one of"),
        ({"vae": ""}, "`vae` must be the folder"),
        ({"phases": [{"steps": 1, "resolutions": [64]}]}, "`phases` must be empty"),
        ({"distance_scale": 0.0}, "`distance_scale` must be positive"),
        ({"latent_noise": -1.0}, "`latent_noise` and `sign_weight` must not be negative"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**change)


def test_features_must_be_those_of_the_decoder(tmp_path, vae, small_data):
    config = make_config(vae=str(vae), data=str(small_data), output_dir=str(tmp_path), cpu=True, model=MODEL)
    with pytest.raises(ValueError, match=r"`model.feature_channels` must be 2"):
        refiner.train(config)
