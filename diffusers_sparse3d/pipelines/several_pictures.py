"""Several pictures of one object, for transformers that were trained with one: taken in turn, or averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT
from .conditioning import select_samples
from .guards import warn_of_unseen_pictures
from .guidance import GuidedVelocity
from .image_processor import load_images
from .stages import Stage, argument_name


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


def picture_rounds(counts: Sequence[int], mode: str, num_calls: int) -> list[list[int]]:
    """Rounds in which every object shows one of its pictures; after its last one, the first again.

    Args:
        counts: pictures of each object; the pictures are numbered object by object.
        mode: one of `MODES`.
        num_calls: of the velocity in a stage.

    Returns:
        For each round the number of a picture for each object. To average, as many rounds as the object with most
        pictures has of them; to alternate, until all objects show their first pictures at once again, if there are so
        many calls.
    """
    starts = [sum(counts[:index]) for index in range(len(counts))]
    num_rounds = max(counts) if mode == "average" else min(math.lcm(*counts), num_calls)
    return [[start + number % count for start, count in zip(starts, counts)] for number in range(num_rounds)]


def condition_on_pictures(
    conditioning: Mapping[str, Tensor],
    counts: Sequence[int],
    num_meshes_per_image: int,
    mode: str,
    stage: Stage,
    num_inference_steps: int,
) -> list[dict[str, Tensor]]:
    """
    Conditioning of a stage for several pictures of each object, with a warning if it leaves some of them out.

    Args:
        conditioning: what `encode_image` of the pipeline gives for the stage, for all pictures, object by object.
        counts: how many pictures each object has.
        num_meshes_per_image: how often to repeat the tokens of each object.
        mode: one of `MODES`.
        stage: the stage.
        num_inference_steps: its steps.

    Returns:
        The conditioning of all meshes for each of the rounds of `picture_rounds`.
    """
    if mode == "alternate":
        warn_of_unseen_pictures(argument_name(stage.name, "num_inference_steps"), num_inference_steps, max(counts))
    # A solver of order 2 calls twice in a step.
    rounds = picture_rounds(counts, mode, num_inference_steps * getattr(stage.scheduler, "order", 1))
    return [
        select_samples(conditioning, [picture for picture in chosen for _ in range(num_meshes_per_image)])
        for chosen in rounds
    ]


def make_velocity(
    transformer: DenseDiT | SparseDiT,
    arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
    batch_size: int,
    batched: bool,
    mode: str,
    counts: Sequence[int] | None = None,
) -> GuidedVelocity | SeveralPicturesVelocity:
    """The guided velocity for one set of image tokens, or for several.

    Args:
        transformer, batch_size, batched: as [`GuidedVelocity`] takes them.
        arguments: of the transformer; a sequence of them for several pictures of each object.
        common: further arguments, the same for all pictures.
        mode: see [`SeveralPicturesVelocity`].
        counts: how many of the arguments are of different pictures, for each sample; all of them if None.

    Raises:
        ValueError: if there are several pictures, and the transformer has a cache that keeps what one of them gave, or
            `counts` has not one number for each sample.
    """
    if isinstance(arguments, Mapping):
        arguments = [arguments]
    if len(arguments) > 1 and transformer.is_cache_enabled:
        raise ValueError(
            "`image` must hold one picture of each object while a transformer has a cache of diffusers, which would"
            " mix what it keeps of them: call `disable_cache()` of the transformer"
        )
    velocities = [GuidedVelocity(transformer, {**own, **common}, batch_size, batched) for own in arguments]
    if len(velocities) == 1:
        return velocities[0]
    weights = None
    if mode == "average":
        counts = [len(velocities)] * batch_size if counts is None else counts
        if len(counts) != batch_size:
            raise ValueError(f"`picture_counts` must have a number for each of {batch_size} samples, got {counts}")
        weights = _picture_weights(counts, len(velocities), arguments[0])
    return SeveralPicturesVelocity(velocities, weights)


def _picture_weights(counts: Sequence[int], num_rounds: int, arguments: Mapping[str, Any]) -> Tensor:
    """The share of each round in the mean over the pictures of a sample, `[R, B]`; `[R, N]` of packed latents."""
    pictures = torch.tensor(counts, device=arguments["encoder_hidden_states"].device)
    # Later rounds show pictures of the sample once more.
    weights = (torch.arange(num_rounds, device=pictures.device)[:, None] < pictures) / pictures
    return weights[:, arguments["coords"][:, 0].long()] if "coords" in arguments else weights


class SeveralPicturesVelocity:
    """
    The velocity for several pictures of each object, each of which has one of its own.

    Args:
        velocities: of the pictures, in the order of use.
        weights: of the pictures in a mean, `[R, B]`, or `[R, N]` for packed latents, which takes as many times the
            time. If None, each call takes another picture.
    """

    def __init__(self, velocities: Sequence[GuidedVelocity], weights: Tensor | None):
        self._velocities, self._weights = velocities, weights
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
        if self._weights is not None:
            predictions = torch.stack([velocity(latents, timestep, scale) for velocity in self._velocities])
            weights = self._weights.view(*self._weights.shape, *(1,) * (latents.ndim - 1))
            return (weights * predictions).sum(0).to(predictions.dtype)
        velocity = self._velocities[self._num_calls % len(self._velocities)]
        self._num_calls += 1
        return velocity(latents, timestep, scale)
