"""Timesteps of a scheduler, shifted by the length of the samples where the scheduler asks for it."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler


def check_scheduler(scheduler: Any, name: str) -> None:
    """
    Check that a scheduler takes predictions of the velocity of a flow, as the transformers make them.

    Those of flow matching do; UniPC, DPM-Solver and DEIS if they are told to. Others would make noise of them.

    Args:
        scheduler: the scheduler.
        name: of the component.

    Raises:
        ValueError: if it does not.
    """
    config = scheduler.config
    is_told = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if not (is_told or type(scheduler).__name__.startswith("FlowMatch")):
        raise ValueError(
            f"`{name}` must be a scheduler of flow matching, got {type(scheduler).__name__}. Of a multistep solver,"
            ' `from_config(..., use_flow_sigmas=True, prediction_type="flow_prediction")` makes one'
        )


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
