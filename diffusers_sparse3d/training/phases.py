"""Phases of a training: resolutions, with batches and a learning rate of their own, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration import TrainingConfig


PHASE_KEYS = ("steps", "resolutions", "batch_size", "max_tokens", "learning_rate")


@dataclass(frozen=True)
class Phase:
    """A part of the training of a sparse model.

    Attributes:
        steps: Optimizer steps; None in a training without phases, which its limits end.
        resolutions: Samples per axis of the SDFs, all of which are gone through in each pass over the data.
        batch_sizes: Samples per process and forward pass, in the mean, for each of the resolutions.
        max_tokens: Largest number of tokens per process and forward pass, for each of the resolutions.
        learning_rate: Peak learning rate.
    """

    steps: int | None
    resolutions: list[int]
    batch_sizes: list[int]
    max_tokens: list[int | None]
    learning_rate: float


def read_phases(config: TrainingConfig, resolutions: list[int]) -> list[Phase]:
    """Returns the phases of a configuration, or one with the given resolutions if it has none.

    Raises:
        ValueError: if a phase is not as the documentation of `TrainingConfig.phases` says.
    """
    if not config.phases:
        count = len(resolutions)
        limits: list[int | None] = [config.max_tokens] * count
        return [Phase(None, resolutions, [config.batch_size] * count, limits, config.learning_rate)]
    return [_read_phase(config, f"phases[{place}]", values) for place, values in enumerate(config.phases)]


def _read_phase(config: TrainingConfig, name: str, values: dict[str, Any]) -> Phase:
    """Returns a phase from its mapping in the configuration."""
    if not isinstance(values, dict) or not {"steps", "resolutions"} <= set(values) <= set(PHASE_KEYS):
        raise ValueError(
            f"`{name}` must be a mapping with steps, resolutions and keys of {PHASE_KEYS}, got {values!r}"
        )
    resolutions = values["resolutions"]
    if not isinstance(resolutions, list) or not resolutions or not all(isinstance(r, int) for r in resolutions):
        raise ValueError(f"`{name}.resolutions` must be a list of integers, got {resolutions!r}")
    if not isinstance(values["steps"], int) or values["steps"] < 1:
        raise ValueError(f"`{name}.steps` must be an integer of at least 1, got {values['steps']!r}")
    rate = values.get("learning_rate", config.learning_rate)
    try:
        rate = float(rate)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}.learning_rate` must be a number, got {rate!r}") from None
    if rate <= 0 or config.learning_rate <= 0:
        raise ValueError(
            f"`{name}.learning_rate` must be positive, as that of the configuration, got {rate} and"
            f" {config.learning_rate}"
        )
    sizes = _for_each(f"{name}.batch_size", values.get("batch_size", config.batch_size), resolutions)
    limits = _for_each(f"{name}.max_tokens", values.get("max_tokens", config.max_tokens), resolutions)
    if None in sizes:
        raise ValueError(f"`{name}.batch_size` must be integers, got null")
    return Phase(values["steps"], resolutions, [size for size in sizes if size is not None], limits, rate)


def _for_each(name: str, value: Any, resolutions: list[int]) -> list[int | None]:
    """Returns a value for each resolution, from one for all or from a mapping of resolutions."""
    if isinstance(value, dict):
        if set(value) != set(resolutions):
            raise ValueError(f"`{name}` must have the keys {resolutions}, the resolutions of the phase, got {value!r}")
        values = [value[resolution] for resolution in resolutions]
    else:
        values = [value] * len(resolutions)
    for number in values:
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"`{name}` must be integers of at least 1, got {value!r}")
    return values


def phase_resolutions(phases: Sequence[Phase]) -> list[int]:
    """Returns all resolutions of a training, those of the last phase last."""
    resolutions = [resolution for phase in phases for resolution in phase.resolutions]
    return list(dict.fromkeys(resolutions[::-1]))[::-1]


def phase_factor(config: TrainingConfig, step: int) -> float:
    """Returns the learning rate of the phase that a step falls in, as a share of that of the configuration."""
    for values in config.phases:
        if step < values["steps"] or values is config.phases[-1]:
            return float(values.get("learning_rate", config.learning_rate)) / config.learning_rate
        step -= values["steps"]
    return 1.0
