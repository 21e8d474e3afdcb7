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
            base_shift=0.0,
            max_shift=math.log(9),
            base_image_seq_len=0,
            max_image_seq_len=20,
        )
    pipe = tiny_pipeline(**components)
    images = [tiny_image(), tiny_image("blue")]
    pipe(images, coords=tiny_coords((13, 7)), num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    # Ten cells a sample in the mean: the shift is exp(log(9) / 2) = 3, of 1 to 1/1000 in four steps.
    plain = torch.linspace(1, 0.001, 4)
    assert torch.allclose(pipe.scheduler.sigmas[:-1], 3 * plain / (1 + 2 * plain))
    pipe(images[0], dense_num_inference_steps=2, num_inference_steps=1, output_type="latent")
    shift = 9 ** ((LATENT_SIZE // 2) ** 3 / 20)
    plain = torch.tensor([1, 0.001])
    assert torch.allclose(pipe.dense_scheduler.sigmas[:-1], shift * plain / (1 + (shift - 1) * plain))
