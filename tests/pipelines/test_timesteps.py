"""Schedulers that shift by the length of the samples, as they are saved by a training with such a shift."""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .tiny import LATENT_SIZE, tiny_components, tiny_coords, tiny_image, tiny_pipeline


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
