import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_sparse3d import DenseVAE, SparseVAE
from diffusers_sparse3d.training import batches, dense_vae, dit, sparse_vae
from diffusers_sparse3d.training.batches import (
    BlockDataset,
    block_grids,
    encoder_input,
    expand_blocks,
    pack,
    vae_targets,
)
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.latents import cache_latents
from diffusers_sparse3d.training.losses import LossSums, sparse_sdf_losses
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.noise import Draw, normal_like
from diffusers_sparse3d.training.vaes import make_vae
from tests.training.tiny import cached_latents


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


def means(task, batch):
    """The means of the losses of a batch and their weighted sum; the losses say what they are means over."""
    losses = task(batch)
    counts = task.counts(batch)
    assert set(counts) == set(task.loss_weights) and all(losses[name].number == counts[name] for name in counts)
    sums = LossSums()
    sums.add(losses)
    return sums.means(lambda tensor: tensor, task.loss_weights)


def check_outputs(folder, data, steps):
    curve = losses(folder)
    assert len(curve) == steps
    assert np.mean(curve[-3:]) < 0.8 * np.mean(curve[:3])
    assert (folder / "loss.png").exists() and list((folder / "logs").glob("events*"))
    picture = Image.open(folder / "pictures" / f"{steps:07d}.png")
    assert len(np.unique(np.array(picture))) > 10
    # Normalised latents, sampled from the posterior, have mean 0 and deviation 1.
    config = json.loads((folder / "vae" / "config.json").read_text())
    latents = cached_latents(folder / "latents", data)
    items = [latents[index] for index in range(len(latents))]
    mean, logvar = (torch.cat([item[name].float().flatten() for item in items]) for name in ("mean", "logvar"))
    generator = torch.Generator().manual_seed(0)
    draws = mean + (0.5 * logvar).exp() * torch.randn(100, *mean.shape, generator=generator)
    normalized = (draws - config["shift_factor"]) * config["scaling_factor"]
    assert abs(float(normalized.mean())) < 0.02 and abs(float(normalized.std()) - 1) < 0.02


def test_train_sparse_vae(tmp_path, common_options, sparse_vae_model):
    options = {**common_options, "output_dir": str(tmp_path), "model": sparse_vae_model, "max_train_steps": 24}
    sparse_vae.train(build_config(sparse_vae.SparseVAEConfig, options))
    check_outputs(tmp_path, options["data"], 24)

    # What was saved are the averaged weights, and its latents are those of the cache.
    vae = SparseVAE.from_pretrained(tmp_path / "vae")
    data = BlockDataset(SparseSDFDataset(options["data"], "train", 32))
    latents = cache_latents(vae, data.data, tmp_path / "latents", Accelerator(cpu=True), 2, 0)
    assert len(list((tmp_path / "latents").iterdir())) == 1 and len(latents) == len(data) == 4
    for index in range(4):
        batch = pack([data[index, 32]])
        coords, target, is_input, _ = expand_blocks(batch)
        with torch.no_grad():
            output = vae.encode(target[is_input], coords[is_input])
        assert torch.equal(output.coords[:, 1:], latents[index]["coords"].int())
        assert torch.allclose(output.latent_dist.mean, latents[index]["mean"].float(), atol=1e-2)


def test_train_dense_vae(tmp_path, common_options, dense_vae_model):
    options = {**common_options, "output_dir": str(tmp_path), "model": dense_vae_model, "max_train_steps": 30}
    dense_vae.train(build_config(dense_vae.DenseVAEConfig, {**options, "dice_weight": 0.5}))
    check_outputs(tmp_path, options["data"], 30)
    assert DenseVAE.from_pretrained(tmp_path / "vae").config.shift_factor != 0


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_decoder_is_trained_for_the_latents_that_there_are(
    kind, tmp_path, common_options, sparse_vae_model, dense_vae_model
):
    """The encoder and the normalisation of its latents stay, and the decoder is trained."""
    torch.manual_seed(0)
    if kind == "sparse":
        module, config_class, before = sparse_vae, sparse_vae.SparseVAEConfig, SparseVAE(**sparse_vae_model)
    else:
        module, config_class, before = dense_vae, dense_vae.DenseVAEConfig, DenseVAE(**dense_vae_model)
    before.register_to_config(shift_factor=0.25, scaling_factor=1.5)
    before.save_pretrained(tmp_path / "before")
    options = {**common_options, "output_dir": str(tmp_path / "out"), "max_train_steps": 3}
    options |= {"pretrained": str(tmp_path / "before"), "train_encoder": False}
    module.train(build_config(config_class, options))
    after = type(before).from_pretrained(tmp_path / "out" / "vae")
    weights = before.state_dict()
    changed = {
        name.split(".")[0] for name, value in after.state_dict().items() if not torch.equal(value, weights[name])
    }
    assert changed == {"decoder"}
    assert (after.config.shift_factor, after.config.scaling_factor) == (0.25, 1.5)
    with pytest.raises(ValueError, match="`train_encoder` must be true without `pretrained`"):
        build_config(config_class, {**options, "pretrained": None})


def test_orders_of_inference_are_for_trainings():
    """What is kept between calls may be used in a backward pass, wherever it was made."""
    for kept in (batches.block_voxels, batches.decoder_order, batches._grid_order):
        kept.cache_clear()
    rows, sharp = torch.randn(1024, requires_grad=True), torch.zeros(2, 64, dtype=torch.uint8)
    with torch.inference_mode():
        block_grids(torch.randn(1024))
        vae_targets(torch.zeros(2, 512), sharp)
    block_grids(rows).square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows.detach())
    vae_targets(rows.view(2, 512), sharp)[0].square().sum().backward()
    torch.testing.assert_close(rows.grad, 4 * rows.detach())


def test_voxels_are_in_the_order_of_the_decoder(small_data, sparse_vae_model):
    blocks = BlockDataset(SparseSDFDataset(small_data, "train", 32))
    batch = pack([blocks[index, 32] for index in (2, 0)])
    coords, target, is_input, is_sharp = expand_blocks(batch)
    vae = SparseVAE(**sparse_vae_model)
    with torch.no_grad():
        output = vae.encode(target[is_input], coords[is_input])
        decoded = vae.decode(output.latent_dist.mode(), output.coords)
    assert torch.equal(output.coords, batch["coords"])
    assert torch.equal(decoded.coords, coords)
    feats, voxels = encoder_input(batch["coords"], target, is_input)
    assert torch.equal(feats, target[is_input]) and torch.equal(voxels, coords[is_input])
    assert voxels.dtype == torch.int32
    # The band of the dataset, found another way.
    band, values, sharp = blocks.data.blocks(0, 32).band()
    rows = (coords[:, 0] == 1) & is_input
    keys = torch.tensor([32 * 32, 32, 1])
    order, other = (coords[rows, 1:].long() @ keys).argsort(), (band.long() @ keys).argsort()
    assert torch.equal(coords[rows, 1:][order], band[other])
    assert torch.equal(target[rows][order], values[other])
    assert torch.equal(is_sharp[rows][order], sharp[other])


def test_each_loss_is_the_mean_over_its_own_voxels():
    sample, target = torch.tensor([[0.5], [0.0], [0.0], [1.0]]), torch.tensor([[0.0], [0.2], [1.0], [-1.0]])
    is_input, is_sharp = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    input_loss, extra_loss, sharp_loss = (loss.mean for loss in sparse_sdf_losses(sample, target, is_input, is_sharp))
    assert input_loss == pytest.approx((0.25 + 0.04) / 2)
    assert extra_loss == pytest.approx((1 + 4) / 2)
    assert sharp_loss == pytest.approx(0.25)
    assert sparse_sdf_losses(sample, target, is_input, torch.zeros(4, dtype=torch.bool))[2].mean == 0


def normal_error(coords, sample, target, in_band):
    """The mean of 1 - cos of the angle between gradients, voxel by voxel, within blocks and in the band."""
    row = {tuple(voxel): place for place, voxel in enumerate(coords.tolist()) if in_band[place]}
    errors = []
    for (batch, x, y, z), place in row.items():
        neighbours = [row.get(voxel) for voxel in ((batch, x + 1, y, z), (batch, x, y + 1, z), (batch, x, y, z + 1))]
        if 7 in (x % 8, y % 8, z % 8) or None in neighbours:
            continue
        first, second = (values[neighbours] - values[place] for values in (sample, target))
        errors.append(1 - first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
    return np.mean(errors)


def test_the_loss_of_the_sparse_vae_by_hand(small_data, sparse_vae_model):
    """Every term over its own voxels, found with NumPy, and their sum with six different weights."""
    blocks = BlockDataset(SparseSDFDataset(small_data, "train", 32))
    batch = pack([blocks[index, 32] for index in (0, 1)])
    weights = {"input_weight": 2.0, "extra_weight": 3.0, "sharp_weight": 5.0, "kl_weight": 7.0}
    weights |= {"normal_weight": 11.0, "sign_weight": 13.0}
    options = {"data": "", "output_dir": "", "max_train_steps": 1, "model": sparse_vae_model, **weights}
    config = build_config(sparse_vae.SparseVAEConfig, options)
    torch.manual_seed(0)
    task = sparse_vae.SparseVAETask(SparseVAE(**sparse_vae_model), config)
    batch["seed"] = torch.tensor([5, 6])
    losses = means(task, batch)

    coords, target, is_input, is_sharp = expand_blocks(batch)
    with torch.no_grad():
        posterior = task.vae.encode(target[is_input], coords[is_input]).latent_dist
        noise = normal_like(posterior.mean, batch["seed"], Draw.POSTERIOR, batch["coords"])
        sample = task.vae.decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise, batch["coords"]).sample
    error = ((sample - target) ** 2)[:, 0].numpy()
    mean, variance = posterior.mean.numpy(), posterior.var.numpy()
    expected = {
        "input": error[is_input.numpy()].mean(),
        "extra": error[~is_input.numpy()].mean(),
        "sharp": error[is_sharp.numpy()].mean(),
        "kl": (0.5 * (mean**2 + variance - 1 - np.log(variance))).mean(),
        "sign": np.maximum(-sample.numpy() * np.sign(target.numpy()), 0)[~is_input.numpy()].mean(),
        "normal": normal_error(coords.numpy(), sample[:, 0].numpy(), target[:, 0].numpy(), is_input.numpy()),
    }
    assert len(set(expected.values())) == 6
    total = sum(weight * expected[name.removesuffix("_weight")] for name, weight in weights.items())
    assert losses == pytest.approx({"loss": total, **expected}, rel=1e-4)


def test_the_loss_of_the_dense_vae_by_hand(dense_vae_model):
    weights = {"dice_weight": 3.0, "kl_weight": 7.0}
    options = {"data": "", "output_dir": "", "max_train_steps": 1, "model": dense_vae_model, **weights}
    torch.manual_seed(0)
    task = dense_vae.DenseVAETask(DenseVAE(**dense_vae_model), build_config(dense_vae.DenseVAEConfig, options))
    occupancy = torch.rand(2, 1, 4, 4, 4) < 0.3
    batch = {"occupancy": occupancy, "seed": torch.tensor([5, 6])}
    losses = means(task, batch)

    with torch.no_grad():
        posterior = task.vae.encode(occupancy).latent_dist
        noise = normal_like(posterior.mean, batch["seed"], Draw.POSTERIOR)
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * noise
        logits = task.vae.decode(latents).sample.double().numpy()
    truth = occupancy.double().numpy()
    probability = 1 / (1 + np.exp(-logits))
    overlap, total = (probability * truth).sum((1, 2, 3, 4)), (probability + truth).sum((1, 2, 3, 4))
    mean, variance = posterior.mean.double().numpy(), posterior.var.double().numpy()
    predicted = probability >= 0.1
    expected = {
        "bce": -(truth * np.log(probability) + (1 - truth) * np.log(1 - probability)).mean(),
        "dice": (1 - (2 * overlap + 1) / (total + 1)).mean(),
        "kl": (0.5 * (mean**2 + variance - 1 - np.log(variance))).mean(),
        "iou": (predicted & (truth > 0)).sum() / (predicted | (truth > 0)).sum(),
    }
    loss = expected["bce"] + 3 * expected["dice"] + 7 * expected["kl"]
    assert losses == pytest.approx({"loss": loss, **expected}, rel=1e-4)


def test_a_sample_that_is_too_large_is_refused_at_the_start(tmp_path, small_data, common_options, sparse_vae_model):
    data = SparseSDFDataset(small_data, "train", 32)
    sizes = [len(data.blocks(index, 32).coords) for index in range(4)]
    assert data.num_blocks(32).tolist() == sizes and len(set(sizes)) > 1
    largest = data.ids[sizes.index(max(sizes))]
    options = {**common_options, "output_dir": str(tmp_path / "run"), "model": sparse_vae_model, "max_train_steps": 1}
    config = build_config(sparse_vae.SparseVAEConfig, {**options, "max_tokens": max(sizes) - 1})
    with pytest.raises(ValueError, match=f"`max_tokens` must be at least {max(sizes)}.*'{largest}'"):
        sparse_vae.train(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_grids_of_another_size_than_the_dense_vae(tmp_path, common_options, dense_vae_model):
    """It would train on them, as its layers are convolutions, and the pipeline would want others."""
    model = {**dense_vae_model, "sample_size": 8}
    options = {**common_options, "output_dir": str(tmp_path / "vae"), "model": model, "max_train_steps": 1}
    message = r"`data` must have 64 as its lowest resolution .* `sample_size` of the dense VAE, got 32"
    with pytest.raises(ValueError, match=message):
        dense_vae.train(build_config(dense_vae.DenseVAEConfig, options))
    DenseVAE(**model).save_pretrained(tmp_path / "trained")
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    transformer = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    options |= {"model": {**transformer, "sample_size": 4, "in_channels": 2}, "image_encoder_model": encoder}
    options |= {"stage": "dense", "vae": str(tmp_path / "trained"), "output_dir": str(tmp_path / "dit")}
    with pytest.raises(ValueError, match=message):
        dit.train(build_config(dit.DiTConfig, {**options, "train_image_encoder": True}))
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("model_class", [SparseVAE, DenseVAE])
def test_pretrained_weights_for_another_grid(tmp_path, common_options, sparse_vae_model, dense_vae_model, model_class):
    """Arguments beside `pretrained` are those of the new model, whose weights are the old ones."""
    sizes = sparse_vae_model if model_class is SparseVAE else dense_vae_model
    before = model_class(**sizes)
    before.save_pretrained(tmp_path / "before")
    larger = 2 * before.config.sample_size
    options = {**common_options, "output_dir": str(tmp_path), "max_train_steps": 1}
    options |= {"pretrained": str(tmp_path / "before"), "model": {"sample_size": larger}}
    config_class = sparse_vae.SparseVAEConfig if model_class is SparseVAE else dense_vae.DenseVAEConfig
    after = make_vae(model_class, build_config(config_class, options))
    assert after.config.sample_size == larger
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
