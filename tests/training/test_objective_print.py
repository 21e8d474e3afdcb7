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
        latent_channels=4,
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
        print("LOSS", loss, 0.4)
        loss = run_script(
            monkeypatch,
            folder / "sparse",
            stage="sparse",
            model={**TRANSFORMER, **SPARSE_ATTENTION, "sample_size": 4, "in_channels": 4},
            image_encoder=str(folder / "dense" / "dit" / "image_encoder"),
            max_train_steps=80,
            batch_size=8,
        )
        print("LOSS", loss, 0.3)

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
    kept = {}

    def keep(pipeline, step, timestep, values):
        kept[pipeline.stage] = values["latents"]
        return {}

    options = {"dense_num_inference_steps": STEPS, "num_inference_steps": STEPS, "output_type": "latent"}
    scales = {"dense_guidance_scale": 1.0, "guidance_scale": 1.0}
    image, cells = data.picture(0, 0), F.pad(coords.int(), (1, 0))
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        pipe(image, generator=generator, callback_on_step_end=keep, **options, **scales)
        print("ERR", relative_error(kept["dense"][0], dense_truth), 0.45)
        occupied = pipe.dense_vae.decode(dense_vae_latents(dense_vae, kept["dense"][0])).sample.sigmoid()
        both = torch.stack([occupied, probabilities]) >= probabilities.median()
        print("IOU", both.all(0).sum() / both.any(0).sum())
        output = pipe(image, coords=cells, generator=generator, **options, **scales)
        assert torch.equal(output.coords, cells)
        print("ERR", relative_error(output.latents, truth), 0.35)
        config = vae.config
        decoded = [
            vae.decode(latents / config.scaling_factor + config.shift_factor, cells).sample
            for latents in (output.latents, truth)
        ]
        found, expected = (values - decoded[1].mean() for values in decoded)
        print("ERR", relative_error(found, expected), 0.35)


def dense_vae_latents(vae, normalized):
    """Returns latents `[1, C, r, r, r]` as the VAE decodes them."""
    return normalized[None] / vae.config.scaling_factor + vae.config.shift_factor
