"""What the pipeline gives to a scheduler: timesteps, shifted by the length of the samples if asked, and generators."""

from inspect import signature
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor


# What the shift follows from, beside the number of tokens.
SHIFT_SETTINGS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def check_scheduler(scheduler: Any, name: str) -> None:
    """
    Check that a scheduler takes predictions of the velocity of a flow, and the shift that its settings ask for.

    Those of flow matching take velocities; UniPC, DPM-Solver and DEIS if they are told to. Others would make noise of
    them.

    Args:
        scheduler: the scheduler.
        name: of the component.

    Raises:
        ValueError: if it does not take one of them.
    """
    config = scheduler.config
    is_told = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if not (is_told or type(scheduler).__name__.startswith("FlowMatch")):
        raise ValueError(
            f"`{name}` must be a scheduler of flow matching, got {type(scheduler).__name__}. Of a multistep solver,"
            ' `from_config(..., use_flow_sigmas=True, prediction_type="flow_prediction")` makes one'
        )
    if not config.get("use_dynamic_shifting", False):
        return
    missing = [setting for setting in SHIFT_SETTINGS if config.get(setting) is None]
    if "mu" not in signature(scheduler.set_timesteps).parameters:
        missing.append("`mu` of `set_timesteps`")
    if missing:
        raise ValueError(
            f"`{name}` must be made with `use_dynamic_shifting=False`: {type(scheduler).__name__} lacks what such a"
            f" shift needs, {', '.join(missing)}"
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
    if not config.get("use_dynamic_shifting", False):
        scheduler.set_timesteps(num_inference_steps, device=device)
        return
    share = (num_tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + share * (config.max_shift - config.base_shift)
    scheduler.set_timesteps(num_inference_steps, device=device, mu=mu)


def step_arguments(
    scheduler: Any, generator: torch.Generator | list[torch.Generator] | None, coords: Tensor | None
) -> dict[str, Any]:
    """
    Keyword arguments of a scheduler's `step` beside prediction, timestep and latents: the generator, if it takes one.

    Args:
        scheduler: the scheduler, which may draw noise at each step.
        generator: one for all samples, or a list with one for each.
        coords: `[N, 4]` (sample, x, y, z) of packed latents; None of those that have a dimension of samples. Of a list
            each row is drawn by the generator of its sample, so that the noise of a sample does not depend on others.
    """
    if "generator" not in signature(scheduler.step).parameters:
        return {}
    if isinstance(generator, list) and coords is not None:
        # As `randn_tensor` of diffusers reads a list: one for each entry of the first dimension.
        generator = [generator[sample] for sample in coords[:, 0].tolist()]
    return {"generator": generator}
