"""Several pictures of one object, for transformers that were trained with one: taken in turn, or averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from .guidance import GuidedVelocity
from .image_processor import load_images
from .stages import Stage


MODES = ("alternate", "average")


def group_pictures(image: Any) -> tuple[Any, list[int] | None]:
    """The pictures of a call in one list, and how many each object has.

    Args:
        image: as `load_images` takes it; where an entry of a list is a list, the entries are objects.

    Returns:
        All pictures in one list, and their number for each object; `image` itself and None if each picture is of an
        object of its own.

    Raises:
        ValueError: as `load_images`; an object without pictures is an error too.
    """
    if not isinstance(image, (list, tuple)) or not any(isinstance(entry, (list, tuple)) for entry in image):
        return image, None
    groups = [load_images(entry) for entry in image]
    return [picture for group in groups for picture in group], [len(group) for group in groups]


def picture_rounds(counts: Sequence[int]) -> list[list[int]]:
    """Rounds in which every object shows one of its pictures, each of them equally often.

    Args:
        counts: pictures of each object; the pictures are numbered object by object.

    Returns:
        For each round the number of a picture for each object; as many rounds as the least common multiple of the
        counts.
    """
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [[start + number % count for start, count in zip(starts, counts)] for number in range(math.lcm(*counts))]


def encode_pictures(
    encode_image: Callable[..., tuple[dict[str, Tensor], ...]],
    pixel_values: Tensor,
    mask: Tensor,
    counts: Sequence[int],
    num_meshes_per_image: int,
    stages: Sequence[Stage],
) -> dict[str, list[dict[str, Tensor]]]:
    """
    Conditioning of each stage for several pictures of each object.

    Args:
        encode_image: the method of the pipeline.
        pixel_values, mask: of all pictures, object by object, as `encode_image` takes them.
        counts: how many pictures each object has.
        num_meshes_per_image: how often to repeat the tokens of each object.
        stages: the stages to condition.

    Returns:
        By name of the stage what `encode_image` gives for it, for each of the rounds of `picture_rounds`.
    """
    conditioning: dict[str, list[dict[str, Tensor]]] = {stage.name: [] for stage in stages}
    for chosen in picture_rounds(counts):
        encoded = encode_image(pixel_values[chosen], mask[chosen], num_meshes_per_image, stages)
        for stage, kwargs in zip(stages, encoded):
            conditioning[stage.name].append(kwargs)
    return conditioning


def make_velocity(
    transformer: DenseDiT | SparseDiT,
    arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
    batch_size: int,
    batched: bool,
    mode: str,
) -> GuidedVelocity | SeveralPicturesVelocity:
    """The guided velocity for one set of image tokens, or for several.

    Args:
        transformer, batch_size, batched: as [`GuidedVelocity`] takes them.
        arguments: of the transformer; a sequence of them for several pictures of each object.
        common: further arguments, the same for all pictures.
        mode: see [`SeveralPicturesVelocity`].

    Raises:
        ValueError: if there are several pictures, and the transformer has a cache that keeps what one of them gave.
    """
    if isinstance(arguments, Mapping):
        arguments = [arguments]
    if len(arguments) > 1 and transformer.is_cache_enabled:
        raise ValueError(
            "`image` must hold one picture of each object while a transformer has a cache of diffusers, which would"
            " mix what it keeps of them: call `disable_cache()` of the transformer"
        )
    velocities = [GuidedVelocity(transformer, {**own, **common}, batch_size, batched) for own in arguments]
    return velocities[0] if len(velocities) == 1 else SeveralPicturesVelocity(velocities, mode)


class SeveralPicturesVelocity:
    """
    The velocity for several pictures of each object, each of which has one of its own.

    Args:
        velocities: of the pictures, in the order of use.
        mode: "alternate" takes another one at each call; "average" takes the mean of all, in as many times the time.
    """

    def __init__(self, velocities: Sequence[GuidedVelocity], mode: str):
        self._velocities, self._averages = velocities, mode == "average"
        self._num_calls = 0
        self._tokens = torch.cat([velocity.encoder_hidden_states for velocity in velocities])

    @property
    def encoder_hidden_states(self) -> Tensor:
        """The tokens of all pictures, one after the other; others may be set between two steps."""
        return self._tokens

    @encoder_hidden_states.setter
    def encoder_hidden_states(self, tokens: Tensor) -> None:
        if tokens is self._tokens:
            return
        self._tokens = tokens
        lengths = [velocity.encoder_hidden_states.shape[0] for velocity in self._velocities]
        for velocity, own in zip(self._velocities, tokens.split(lengths)):
            velocity.encoder_hidden_states = own

    def __call__(self, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
        """Arguments and result as of [`GuidedVelocity`]."""
        if self._averages:
            return torch.stack([velocity(latents, timestep, scale) for velocity in self._velocities]).mean(0)
        velocity = self._velocities[self._num_calls % len(self._velocities)]
        self._num_calls += 1
        return velocity(latents, timestep, scale)
