"""What the transformers are trained for: overfitted on one shape by the script, they generate it in the pipeline.

A wrong sign of the velocity, a wrong mixture of latents and noise, or other timesteps than those of the scheduler lets
the loss fall just as well, and generates something else.
"""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trimesh
import yaml

from diffusers_sparse3d import DenseVAE, Direct3DS2Pipeline, SparseVAE
from diffusers_sparse3d.training import assembly
from diffusers_sparse3d.training.batches import BlockDataset, OccupancyDataset, pack
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.latents import encode
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.preparation import command


SCRIPT = Path(__file__).parents[2] / "training" / "train_dit.py"
IMAGE_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 16}
SPARSE_ATTENTION = {
    "num_key_value_heads": 1,
    "compression_block_size": 2,
    "selection_block_size": 2,
    "topk": 2,
    "window_size": 2,
    "norm_num_groups": 4,
}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of one ring at 32^3."""
    folder = tmp_path_factory.mktemp("objective")
    (folder / "meshes").mkdir()
    trimesh.creation.annulus(0.3, 0.6, 0.5).export(folder / "meshes" / "ring.ply")
    arguments = ["--resolutions", "32", "--num_views", "1", "--image_size", "28", "--num_workers", "0"]
    command.main(
        ["--input", str(folder / "meshes"), "--output", str(folder / "data"), *arguments, "--val_fraction", "0"]
    )
    return folder


def save_normalizing(vae, batch, folder):
    """Saves a VAE with the normalisation of its latents of one shape, which are returned normalised."""
    (latents,) = encode(vae.eval(), batch)
    mean, deviation = latents["mean"].mean().item(), latents["mean"].std().item()
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)
    vae.save_pretrained(folder)
    return (latents["mean"] - mean) / deviation, latents.get("coords")


def run_script(monkeypatch, folder, **options):
    """Trains with the script, and returns the losses of the last fifth of the steps."""
    values = {
        "data": str(folder.parent / "data"),
        "output_dir": str(folder / "dit"),
        "vae": str(folder / "vae"),
        "sample_posterior": False,
        "sigma_sampling": "uniform",
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "ema_decay": 0.0,
        "logging_steps": 1,
        "num_workers": 0,
        "cpu": True,
        **options,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(folder / "config.yaml")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    losses = [entry["loss"] for entry in read_metrics(folder / "dit") if "loss" in entry]
    return sum(losses[-len(losses) // 5 :]) / (len(losses) // 5)


def relative_error(values, expected):
    return float((values - expected).norm() / expected.norm())


@torch.no_grad()
def test_overfitted_transformers_generate_their_shape(folder, monkeypatch):
    torch.manual_seed(0)
    data = SparseSDFDataset(folder / "data", "train", 32)
    dense_vae = DenseVAE(
        latent_channels=2,
        sample_size=4,
        encoder_block_out_channels=[8, 16],
        decoder_block_out_channels=[16, 8],
        layers_per_block=1,
        mid_layers=1,
    )
    vae = SparseVAE(
        latent_channels=1,
        sample_size=4,
        encoder_channels=32,
        encoder_layers=1,
        encoder_heads=2,
        decoder_channels=32,
        decoder_layers=1,
        decoder_heads=2,
        norm_num_groups=2,
    )
    dense_truth, _ = save_normalizing(dense_vae, pack([OccupancyDataset(data)[0, 32]]), folder / "dense" / "vae")
    truth, coords = save_normalizing(vae, pack([BlockDataset(data)[0, 32]]), folder / "sparse" / "vae")
    with torch.enable_grad():
        loss = run_script(
            monkeypatch,
            folder / "dense",
            stage="dense",
            model={**TRANSFORMER, "sample_size": 2, "in_channels": 2},
            image_encoder_model=IMAGE_ENCODER,
            train_image_encoder=True,
            max_train_steps=100,
            batch_size=16,
            shift=2.0,
        )
        assert loss < 0.3
        loss = run_script(
            monkeypatch,
            folder / "sparse",
            stage="sparse",
            model={**TRANSFORMER, **SPARSE_ATTENTION, "sample_size": 4, "in_channels": 1},
            image_encoder=str(folder / "dense" / "dit" / "image_encoder"),
            max_train_steps=110,
            batch_size=8,
        )
        assert loss < 0.3

    parts = {
        "image_encoder": folder / "dense" / "dit" / "image_encoder",
        "dense_vae": folder / "dense" / "vae",
        "dense_dit": folder / "dense" / "dit",
        "vae": folder / "sparse" / "vae",
        "sparse_dit": folder / "sparse" / "dit",
        "output": folder / "pipeline",
    }
    assembly.main([argument for name, path in parts.items() for argument in (f"--{name}", str(path))])
    pipe = Direct3DS2Pipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    # The VAEs are random: a cell counts as occupied where the decoded truth is above its median.
    probabilities = dense_vae.decode(dense_vae_latents(dense_vae, dense_truth)).sample.sigmoid()
    pipe.register_to_config(occupancy_threshold=probabilities.median().item())
    path: dict[str, list[torch.Tensor]] = {}

    def keep(pipeline, step, timestep, values):
        path.setdefault(pipeline.stage, []).append(values["latents"])
        return {}

    options = {"dense_num_inference_steps": STEPS, "num_inference_steps": STEPS, "output_type": "latent"}
    options |= {"dense_guidance_scale": 1.0, "guidance_scale": 1.0, "callback_on_step_end": keep}
    image, cells = data.picture(0, 0), F.pad(coords.int(), (1, 0))

    def generate():
        """Of both stages, means over three seeds: the error at the end, and how far the latents are from the straight
        line between noise and truth halfway; and the latents of the last seed."""
        found = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            noise, sparse_noise = (torch.randn(target.shape, generator=generator) for target in (dense_truth, truth))
            path.clear()
            pipe(image, dense_latents=noise[None], **options)
            dense = [latents[0] for latents in path.pop("dense")]
            path.clear()
            pipe(image, coords=cells, latents=sparse_noise, **options)
            sigma, sparse_sigma = (each.sigmas[STEPS // 2] for each in (pipe.dense_scheduler, pipe.scheduler))
            found.append(deviations(dense, noise, dense_truth, sigma))
            found.append(deviations(path["sparse"], sparse_noise, truth, sparse_sigma))
        errors, halfway = torch.tensor(found).view(3, 2, 2).mean(0).T
        return errors, halfway, dense[-1], path["sparse"][-1]

    errors, halfway, dense, latents = generate()
    assert (errors < 0.25).all() and (halfway < 0.2).all()
    # The shapes that they stand for.
    occupied = dense_vae.decode(dense_vae_latents(dense_vae, dense)).sample.sigmoid()
    both = torch.stack([occupied, probabilities]) >= probabilities.median()
    assert both.all(0).sum() / both.any(0).sum() > 0.75
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    found, expected = (vae.decode(values / scale + shift, cells).sample for values in (latents, truth))
    assert relative_error(found - expected.mean(), expected - expected.mean()) < 0.3

    # One shape can be learned without the timestep, but here it is known: another one does harm.
    def divide_timestep(module, args, kwargs):
        return args, {**kwargs, "timestep": kwargs["timestep"] / 1000}

    for transformer in (pipe.dense_transformer, pipe.transformer):
        transformer.register_forward_pre_hook(divide_timestep, with_kwargs=True)
    _, other, *_ = generate()
    assert (other > 2 * halfway).all()


def deviations(path, noise, target, sigma):
    """Returns, relative to `target`, the error of the last latents of a path and, halfway, their distance from the
    mixture of noise and target at `sigma`, where they should be."""
    mixture = sigma * noise + (1 - sigma) * target
    return [
        ((found - expected).norm() / target.norm()).item()
        for found, expected in ((path[-1], target), (path[STEPS // 2 - 1], mixture))
    ]


def dense_vae_latents(vae, normalized):
    """Returns latents `[1, C, r, r, r]` as the VAE decodes them."""
    return normalized[None] / vae.config.scaling_factor + vae.config.shift_factor
