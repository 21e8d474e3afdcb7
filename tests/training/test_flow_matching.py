"""The objective of the transformers against formulas written out here and against the scheduler that samples later.

An oracle takes the place of the transformer: it knows the normalised latents x and predicts, from its input, the
velocity that leads straight to x. The loss is zero, and samples are x, only if noisy latents, timestep, target and
normalisation mean the same to training, scheduler and pipeline.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_sparse3d.training import dit
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.noise import Draw, normal_like


SHIFT_FACTOR, SCALING_FACTOR = 0.7, 3.0
IMAGE_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_register_tokens": 2,
}


class Oracle(nn.Module):
    """Predicts (input - x) / sigma with sigma = timestep / 1000, the velocity from x + sigma * velocity back to x."""

    def __init__(self, latents):
        super().__init__()
        self.latents, self.calls = latents, []
        self.config = FrozenDict(sparse_conditioning=False)

    def forward(self, hidden_states, *args, **kwargs):
        sparse = len(args) == 3
        timestep = args[1] if sparse else args[0]
        self.calls.append((hidden_states, timestep))
        sigma = timestep / 1000
        rows = sigma[args[0][:, 0], None] if sparse else sigma.view(-1, 1, 1, 1, 1)
        return SimpleNamespace(sample=(hidden_states - self.latents) / rows)


class NormalizingVAE(nn.Module):
    """Has nothing of a VAE but the normalisation of its latents, away from the neutral 0 and 1."""

    config = FrozenDict(shift_factor=SHIFT_FACTOR, scaling_factor=SCALING_FACTOR)


def make_task(stage, **options):
    values = {"data": "", "output_dir": "", "vae": "x", "max_train_steps": 1, "train_image_encoder": True}
    config = build_config(
        dit.DiTConfig,
        {**values, "stage": stage, "image_encoder_model": IMAGE_ENCODER, "sample_posterior": False, **options},
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 4, 28, 28), dtype=torch.uint8, generator=generator)
    if stage == "dense":
        shape, coords = (3, 2, 4, 4, 4), None
    else:
        coords = torch.tensor(
            [[0, 1, 2, 3], [0, 3, 2, 1], [1, 0, 0, 0], [2, 1, 1, 1], [2, 2, 2, 2]], dtype=torch.int32
        )
        shape = (5, 64)
    mean = torch.randn(shape, generator=generator) + 0.5
    batch = {"image": images, "mean": mean, "logvar": torch.full(shape, -60.0)}
    if coords is not None:
        batch["coords"] = coords
    transformer = Oracle((mean - SHIFT_FACTOR) * SCALING_FACTOR)
    encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**IMAGE_ENCODER))
    return dit.DiTTask(transformer, encoder, NormalizingVAE(), config), batch


@pytest.mark.parametrize("sample_posterior", [False, True])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_velocity_that_leads_to_the_latents_has_no_loss(stage, sample_posterior):
    task, batch = make_task(stage, sample_posterior=sample_posterior, shift=2.0)
    torch.manual_seed(1)
    for _ in range(4):
        assert float(task(batch)["loss"].mean) < 1e-6
    timesteps = torch.cat([timestep for _, timestep in task.transformer.calls])
    assert len(timesteps.unique()) == 12 and timesteps.min() > 0 and 100 < timesteps.max() < 1000


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_noisy_latents_are_those_of_the_scheduler(stage, monkeypatch):
    """At noise levels of the scheduler: its timesteps, and its mixture of the latents with normal noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    picked = torch.tensor([2, 5, 8])
    task, batch = make_task(stage)
    task.noise_levels = SimpleNamespace(at=lambda quantiles, num_tokens: scheduler.sigmas[picked])
    batch["seed"] = torch.tensor([4, 5, 6])
    noise = normal_like(batch["mean"], batch["seed"], Draw.NOISE, batch.get("coords"))
    task(batch)
    noisy, timestep = task.transformer.calls[-1]
    assert torch.allclose(timestep, scheduler.timesteps[picked])
    rows = batch["coords"][:, 0].long() if stage == "sparse" else torch.arange(3)
    expected = scheduler.scale_noise(task.transformer.latents, scheduler.timesteps[picked][rows], noise)
    assert torch.allclose(noisy, expected, atol=1e-6)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_latents_are_drawn_with_the_deviation_of_the_posterior(stage):
    """Without noise the transformer sees the drawn latents: mean plus exp(logvar / 2) times normal noise."""
    task, batch = make_task(stage, sample_posterior=True)
    task.noise_levels = SimpleNamespace(at=lambda quantiles, num_tokens: torch.full((3,), 1e-6))
    batch["seed"] = torch.tensor([4, 5, 6])
    batch["logvar"] = torch.full_like(batch["mean"], 2.0).log() * 2  # a standard deviation of 2
    task(batch)
    drawn = batch["mean"] + 2 * normal_like(batch["mean"], batch["seed"], Draw.POSTERIOR, batch.get("coords"))
    expected = (drawn - SHIFT_FACTOR) * SCALING_FACTOR
    assert torch.allclose(task.transformer.calls[-1][0], expected, atol=1e-4)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_samples_are_the_latents_before_normalisation(stage):
    task, batch = make_task(stage, num_inference_steps=3, guidance_scale=4.0, shift=3.0)
    torch.manual_seed(1)
    samples = task.sample(batch["image"], batch["mean"].shape, batch.get("coords"))
    assert torch.allclose(samples, batch["mean"], atol=1e-5)


def test_samples_follow_the_guidance_scale():
    """The velocity is the unconditional one plus the guidance scale times the difference to the conditional one."""
    task, batch = make_task("dense", num_inference_steps=1, guidance_scale=4.0)

    def predict(latents, timestep, tokens, token_coords, coords):
        return torch.full_like(latents, 2.0 if tokens.any() else 0.5)

    task.predict = predict
    torch.manual_seed(1)
    start = torch.randn(batch["mean"].shape)
    torch.manual_seed(1)
    sample = task.sample(batch["image"], batch["mean"].shape, None)
    # One step goes from sigma 1 to 0: start - (0.5 + 4 * 1.5).
    assert torch.allclose(sample, (start - 6.5) / SCALING_FACTOR + SHIFT_FACTOR, atol=1e-5)
