"""The arguments of a call of the pipeline, stage by stage, and the checks that do not need the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..checks import check_choice, check_integer, check_number
from ..geometry.cavities import MAX_OPENING
from ..models.attention_kwargs import check_attention_kwargs
from ..models.input_checks import check_finite
from ..ops.coordinates import MAX_SAMPLES
from .stages import DenseStage, SparseStage, argument_name
from .timesteps import check_scheduler


logger = logging.get_logger(__name__)

# Timesteps that a scheduler has by default; more steps than these repeat some.
MOST_STEPS = 1000
# Far above any use, and far below where predictions overflow in half precision.
MOST_GUIDANCE = 1000
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
        """
        The inputs of the stage called `stage`, checked; a setting that is None is taken from `config`, the pipeline's.

        Raises:
            TypeError: if latents or cells are no tensors.
            ValueError: naming the argument that is out of range.
        """
        if num_inference_steps is None:
            num_inference_steps = stage_setting(config, stage, "num_inference_steps")
        if guidance_scale is None:
            guidance_scale = stage_setting(config, stage, "guidance_scale")
        names = {field.name: argument_name(stage, field.name) for field in fields(cls)}
        num_inference_steps = check_integer(names["num_inference_steps"], num_inference_steps, 1, MOST_STEPS)
        guidance_scale = check_number(names["guidance_scale"], guidance_scale, -MOST_GUIDANCE, MOST_GUIDANCE)
        guidance_interval = check_interval(names["guidance_interval"], guidance_interval)
        check_given = {names["latents"]: latents, names["coords"]: coords}
        for name, value in check_given.items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}")
            if value is not None and value.is_meta:
                raise ValueError(f"`{name}` must have values, got a tensor on the device meta")
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
    runs: list[DenseStage | SparseStage] = [stage for stage in sparse_stages if stage.name in used]
    for stage in runs if given_cells else [dense_stage, *runs]:
        check_scheduler(stage.scheduler, argument_name(stage.name, "scheduler"))
    if not given_cells and dense_stage.resolution != sparse_stages[0].latent_resolution:
        raise ValueError(
            f"`dense_vae` gives a grid of {dense_stage.resolution}^3 cells, but `transformer` works on a grid of"
            f" {sparse_stages[0].latent_resolution}^3: these components do not belong together"
        )


def check_stage_inputs(inputs: Mapping[str, StageInputs]) -> None:
    """
    Check which arguments that belong to stages go together.

    Args:
        inputs: by name of the stage, in the order of the stages.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    earlier: list[str] = []
    for stage, stage_inputs in inputs.items():
        names = {name: argument_name(stage, name) for name in ("latents", "coords")}
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


def check_interval(name: str, value: Any) -> tuple[float, float]:
    """The two numbers (start, stop) of `value`; a ValueError names the argument unless 0 <= start < stop <= 1."""
    try:
        start, stop = (check_number(name, bound, 0, 1) for bound in value)
    except (TypeError, ValueError):
        start = stop = 0.0
    if start >= stop:
        raise ValueError(f"`{name}` must be (start, stop) with 0 <= start < stop <= 1, got {value!r:.100}")
    return start, stop


def check_num_meshes(num_meshes_per_image: int, num_images_per_prompt: int | None) -> int:
    """How many meshes to make of each image, checked; diffusers' name for it counts if it is given.

    Raises:
        ValueError: if both are given and differ, or one is no positive integer.
    """
    num_meshes_per_image = check_integer("num_meshes_per_image", num_meshes_per_image, 1, MAX_SAMPLES)
    if num_images_per_prompt is None:
        return num_meshes_per_image
    num_images_per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_SAMPLES)
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


def check_generator(generator: Any, batch_size: int) -> None:
    """
    Check that a generator, or one for each mesh, is what the call was given, if anything.

    Raises:
        TypeError: if it is something else, as a seed.
        ValueError: if a list has not one for each of the `batch_size` meshes.
    """
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                f"`generator` must be a torch.Generator or a list of them, got {one!r:.100}: make one of a seed by"
                " `torch.Generator().manual_seed(0)`"
            )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generator)} for a batch of {batch_size} meshes")


def check_hooks(attention_kwargs: Any, callback: Any) -> None:
    """Check that `attention_kwargs` are a dictionary, and the callback is callable, if there are any.

    Raises:
        TypeError: if they are not.
        ValueError: if the `scale` of LoRA layers is no finite number.
    """
    check_attention_kwargs(attention_kwargs)
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be callable, got {callback!r:.100}")


def checked_replacements(returned: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    What a callback of a step returned, checked: nothing, or some of the tensors in their shapes.

    Raises:
        ValueError: if it is something else, or has values that are not finite (on a CPU).
    """
    if returned is None:
        return {}
    if not isinstance(returned, dict) or not returned.keys() <= tensors.keys():
        raise ValueError(
            f"`callback_on_step_end` must return None or a dictionary of some of {list(tensors)}, got"
            f" {returned!r:.100}"
        )
    for name, tensor in returned.items():
        if not isinstance(tensor, Tensor) or tensor.shape != tensors[name].shape:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"`callback_on_step_end` must return `{name}` of shape {list(tensors[name].shape)}, got {got}"
            )
        # On a GPU the host would have to wait for the values.
        if tensor.device.type == "cpu":
            check_finite(tensor, f"{name}` of `callback_on_step_end")
    return returned


def check_output(
    output_type: str, level: float, max_opening: float, tensor_inputs: Sequence[str], allowed: Sequence[str]
) -> None:
    """
    Check what a call wants to have.

    Args:
        output_type: one of `OUTPUT_TYPES`.
        level: iso-level of the surface, 0 to 0.2 in units of the narrow band.
        max_opening: width of the openings of cavities that are filled, up to a quarter of the cube.
        tensor_inputs: names of the tensors for the callback, from `allowed`.
        allowed: the names that there are.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_choice("output_type", output_type, OUTPUT_TYPES)
    check_number("level", level, 0, 0.2)
    check_number("max_opening", max_opening, 0, MAX_OPENING)
    if not isinstance(tensor_inputs, (list, tuple)) or any(name not in allowed for name in tensor_inputs):
        unknown = tensor_inputs
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be from {list(allowed)}, got {unknown}")
