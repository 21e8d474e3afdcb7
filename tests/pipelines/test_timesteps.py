"""Schedulers that shift by the length of the samples, as they are saved by a training with such a shift."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from .tiny import LATENT_SIZE, tiny_components, tiny_coords, tiny_image, tiny_pipeline


def with_scheduler(name, kind, **options):
    pipe = tiny_pipeline()
    setattr(pipe, name, kind.from_config(pipe.scheduler.config, **options))
    return pipe


def test_a_multistep_solver_of_the_flow():
    """A solver that is told that predictions are velocities goes where Euler's steps go; otherwise it is refused."""
    call = {"coords": tiny_coords((7,)), "guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 40}
    expected = tiny_pipeline()(tiny_image(), **call, generator=torch.Generator().manual_seed(0)).latents
    pipe = with_scheduler(
        "scheduler", UniPCMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    found = pipe(tiny_image(), **call, generator=torch.Generator().manual_seed(0)).latents
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match=r"`scheduler` must be a scheduler of flow matching, got .*use_flow_sigmas"):
        with_scheduler("scheduler", UniPCMultistepScheduler)(tiny_image(), **call)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("name", ["scheduler", "dense_scheduler"])
def test_schedulers_of_other_predictions_are_refused(kind, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a scheduler of flow matching"):
        with_scheduler(name, kind)(tiny_image(), output_type="latent")


def test_the_pipeline_shifts_by_the_number_of_cells():
    components = tiny_components()
    for name in ("scheduler", "dense_scheduler"):
        components[name] = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=math.log(2),
            max_shift=math.log(18),
            base_image_seq_len=4,
            max_image_seq_len=16,
        )
    pipe = tiny_pipeline(**components)
    images = [tiny_image(), tiny_image("blue")]
    pipe(images, coords=tiny_coords((13, 7)), num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    # Ten cells a sample in the mean, halfway from 4 to 16: the shift is sqrt(2 * 18) = 6, of 1 to 1/1000.
    plain = torch.linspace(1, 0.001, 4)
    assert torch.allclose(pipe.scheduler.sigmas[:-1], 6 * plain / (1 + 5 * plain))
    pipe(images[0], dense_num_inference_steps=2, num_inference_steps=1, output_type="latent")
    shift = 2 * 9 ** (((LATENT_SIZE // 2) ** 3 - 4) / 12)
    plain = torch.tensor([1, 0.001])
    assert torch.allclose(pipe.dense_scheduler.sigmas[:-1], shift * plain / (1 + (shift - 1) * plain))
