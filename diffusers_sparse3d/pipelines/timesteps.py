"""Timesteps of a scheduler, shifted by the length of the samples where the scheduler asks for it."""

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler


def set_timesteps(
    scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, num_tokens: float, device: torch.device
) -> None:
    """
    Set the timesteps of a scheduler.

    With `use_dynamic_shifting`, the logarithm of the shift is linear in the number of tokens of a sample, as in Flux:
    `base_shift` at `base_image_seq_len` tokens and `max_shift` at `max_image_seq_len`.

    Args:
        scheduler: the scheduler.
        num_inference_steps: its steps.
        num_tokens: tokens of a sample, in the mean over a batch.
        device: device of the timesteps.
    """
    config = scheduler.config
    if not config.use_dynamic_shifting:
        scheduler.set_timesteps(num_inference_steps, device=device)
        return
    share = (num_tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + share * (config.max_shift - config.base_shift)
    scheduler.set_timesteps(num_inference_steps, device=device, mu=mu)
