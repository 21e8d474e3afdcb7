"""The arguments of a call of the pipeline, stage by stage, and the checks that do not need the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from .stages import DenseStage, SparseStage, argument_name


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("mesh", "sdf", "latent", "pt")


@dataclass(frozen=True)
class StageInputs:
    """The arguments of a call that belong to one stage, completed from the settings of the checkpoint.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance, which is off up to 1.
        latents: the noise to start from; drawn if None.
        coords: `[N, 4]` int32, the cells of a sparse stage; found by the stage before if None.
        guidance_interval: (start, stop) in shares of the steps: guidance is off before and after.
    """

    num_inference_steps: int
    guidance_scale: float
    latents: Tensor | None
    coords: Tensor | None
    guidance_interval: tuple[float, float]

    @classmethod
    def complete(
        cls,
        stage: str,
        config: Mapping[str, Any],
        num_inference_steps: int | None,
        guidance_scale: float | None,
        latents: Tensor | None,
        coords: Tensor | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> StageInputs:
        """The inputs of the stage called `stage`; a setting that is None is taken from `config`, the pipeline's."""
        if num_inference_steps is None:
            num_inference_steps = stage_setting(config, stage, "num_inference_steps")
        if guidance_scale is None:
            guidance_scale = stage_setting(config, stage, "guidance_scale")
        return cls(num_inference_steps, guidance_scale, latents, coords, guidance_interval)


def stage_setting(config: Mapping[str, Any], stage: str, name: str) -> Any:
    """The setting `name` of the stage called `stage` where a call gives none, from the configuration of a pipeline."""
    return config["default_" + argument_name(stage, name)]


def check_stages(
    dense_stage: DenseStage,
    sparse_stages: Sequence[SparseStage],
    missing: Sequence[str],
    resolution: int | None,
    inputs: Mapping[str, StageInputs],
) -> None:
    """
    Check that the stages belong together and generate the `resolution` that a call asks for.

    Args:
        dense_stage: the dense stage.
        sparse_stages: the sparse stages that have all their components.
        missing: names of the components that the second sparse stage lacks.
        resolution: samples per axis, or None for the last stage.
        inputs: by name of the stage. The dense stage is checked only if the call runs it.

    Raises:
        ValueError: if they do not; the message says which components or arguments.
    """
    resolutions = [stage.resolution for stage in sparse_stages]
    if resolution is not None and resolution not in resolutions:
        message = f"`resolution` must be one of {resolutions}, which the stages generate, got {resolution}"
        if missing:
            message += (
                f". The second stage lacks {', '.join(f'`{name}`' for name in missing)}: load a checkpoint that"
                " has them, or give them to `from_pretrained`"
            )
        raise ValueError(message)
    if resolutions != sorted(set(resolutions)):
        raise ValueError(
            f"`transformer_1024` and `vae_1024` give {resolutions[1]}^3 samples, not more than the"
            f" {resolutions[0]}^3 of the first stage: these components do not belong together"
        )
    given_cells = [name for name, stage_inputs in inputs.items() if stage_inputs.coords is not None]
    used = [stage.name for stage in sparse_stages if resolution is None or stage.resolution <= resolution]
    for name in given_cells:
        if name not in used:
            raise ValueError(
                f"`{argument_name(name, 'coords')}` need the second stage: its components, and its `resolution`"
            )
    if not given_cells and dense_stage.resolution != sparse_stages[0].latent_resolution:
        raise ValueError(
            f"`dense_vae` gives a grid of {dense_stage.resolution}^3 cells, but `transformer` works on a grid of"
            f" {sparse_stages[0].latent_resolution}^3: these components do not belong together"
        )


def check_stage_inputs(inputs: Mapping[str, StageInputs]) -> None:
    """
    Check the arguments that belong to stages: the ranges of settings, and which arguments go together.

    Args:
        inputs: by name of the stage, in the order of the stages.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    earlier: list[str] = []
    for stage, stage_inputs in inputs.items():
        names = {name: argument_name(stage, name) for name in ("num_inference_steps", "latents", "coords")}
        check_positive(names["num_inference_steps"], stage_inputs.num_inference_steps)
        check_interval(argument_name(stage, "guidance_interval"), stage_inputs.guidance_interval)
        check_finite(argument_name(stage, "guidance_scale"), stage_inputs.guidance_scale)
        if stage_inputs.coords is not None and earlier:
            raise ValueError(
                f"`{names['coords']}` replace the stages before, to which {' and '.join(earlier)} belong: give one"
                " of them"
            )
        if stage != "dense" and stage_inputs.latents is not None and stage_inputs.coords is None:
            raise ValueError(f"`{names['latents']}` need `{names['coords']}`, the cells that their rows belong to")
        for name in ("latents", "coords"):
            if getattr(stage_inputs, name) is not None:
                earlier.append(f"`{names[name]}`")


def check_positive(name: str, value: int) -> None:
    """Raise a ValueError that names the argument unless `value` is a positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raise a ValueError that names the argument unless `value` is a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")


def check_interval(name: str, value: tuple[float, float]) -> None:
    """Raise a ValueError that names the argument unless `value` is two numbers, 0 <= start < stop <= 1."""
    if len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"`{name}` must be (start, stop) with 0 <= start < stop <= 1, got {value!r}")


def check_num_meshes(num_meshes_per_image: int, num_images_per_prompt: int | None) -> int:
    """How many meshes to make of each image, checked; diffusers' name for it counts if it is given.

    Raises:
        ValueError: if both are given and differ, or one is no positive integer.
    """
    check_positive("num_meshes_per_image", num_meshes_per_image)
    if num_images_per_prompt is None:
        return num_meshes_per_image
    check_positive("num_images_per_prompt", num_images_per_prompt)
    if num_meshes_per_image not in (1, num_images_per_prompt):
        raise ValueError(
            f"`num_images_per_prompt` is another name of `num_meshes_per_image`, which is {num_meshes_per_image}, got"
            f" {num_images_per_prompt}"
        )
    return num_images_per_prompt


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Warn of float16 on a CPU, for which PyTorch has few fast kernels."""
    if device.type == "cpu" and dtype == torch.float16:
        logger.warning(
            "float16 on a CPU is several times slower than float32: load the pipeline with `dtype=torch.float32` (or"
            " torch.bfloat16), or move it to a GPU."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that names the argument unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {value!r}")


def check_output(output_type: str, level: float, tensor_inputs: Sequence[str], allowed: Sequence[str]) -> None:
    """
    Check what a call wants to have.

    Args:
        output_type: one of `OUTPUT_TYPES`.
        level: iso-level of the surface, 0 to 0.2 in units of the narrow band.
        tensor_inputs: names of the tensors for the callback, from `allowed`.
        allowed: the names that there are.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if not 0 <= level <= 0.2:
        raise ValueError(f"`level` must be between 0 and 0.2, in units of the narrow band, got {level}")
    unknown = [name for name in tensor_inputs if name not in allowed]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be from {list(allowed)}, got {unknown}")
