"""Classifier-free guidance: velocities with and without the image, from one call of a transformer or from two."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.transformer_dense import DenseAttnProcessor, DenseDiT
from ..models.transformer_sparse import SparseDiT
from ..sparse_tensor import CoordinateCache


class GuidedVelocity:
    """
    The velocity that a transformer predicts under classifier-free guidance: `v_u + scale * (v_c - v_u)` from the
    velocities with (c) and without (u) the image, whose tokens are zeros then.

    Args:
        transformer: of a dense or a sparse stage.
        arguments: its keyword arguments beside latents and timestep, for a batch without guidance.
        batch_size: number of samples, B.
        batched: predict both velocities by one call for 2 B samples, first those without the image, which takes less
            time and more memory than two calls.
    """

    def __init__(
        self, transformer: DenseDiT | SparseDiT, arguments: Mapping[str, Any], batch_size: int, batched: bool = True
    ):
        self._transformer, self._arguments, self._batch_size = transformer, dict(arguments), batch_size
        self._both_arguments: dict[str, Any] | None = None
        self._spares_tokens = _takes_samples_without_tokens(transformer)
        self.batched = batched

    @property
    def encoder_hidden_states(self) -> Tensor:
        """The image tokens; others may be set between two steps."""
        return self._arguments["encoder_hidden_states"]

    @encoder_hidden_states.setter
    def encoder_hidden_states(self, tokens: Tensor) -> None:
        if tokens is not self.encoder_hidden_states:
            self._arguments["encoder_hidden_states"] = tokens
            if self._both_arguments is not None:
                self._both_arguments["encoder_hidden_states"] = self._tokens_of_both(tokens)

    def __call__(self, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
        """
        Args:
            latents: `[B, C, r, r, r]`, or packed `[N, C]`.
            timestep: scalar, in [0, 1000].
            scale: guidance scale; up to 1 there is no guidance.

        Returns:
            The velocity, of the shape of `latents`.
        """
        if scale <= 1:
            return self._predict("cond", latents, timestep, self._batch_size, self._arguments)
        if self.batched:
            if self._both_arguments is None:
                self._both_arguments = _arguments_of_both(self._arguments, self._batch_size)
                self._both_arguments["encoder_hidden_states"] = self._tokens_of_both(self.encoder_hidden_states)
                if self._spares_tokens:
                    self._both_arguments["num_unconditional"] = self._batch_size
            latents = torch.cat([latents, latents])
            both = self._predict("cond_uncond", latents, timestep, 2 * self._batch_size, self._both_arguments)
            unconditional, conditional = both.chunk(2)
        else:
            conditional = self._predict("cond", latents, timestep, self._batch_size, self._arguments)
            zeros = {"encoder_hidden_states": torch.zeros_like(self.encoder_hidden_states)}
            arguments = {**self._arguments, **zeros}
            unconditional = self._predict("uncond", latents, timestep, self._batch_size, arguments)
        return unconditional + scale * (conditional - unconditional)

    def _tokens_of_both(self, tokens: Tensor) -> Tensor:
        """The tokens of twice as many samples, zeros and then the given ones; or these alone, where that will do."""
        return tokens if self._spares_tokens else torch.cat([torch.zeros_like(tokens), tokens])

    def _predict(
        self, context: str, latents: Tensor, timestep: Tensor, batch_size: int, arguments: dict[str, Any]
    ) -> Tensor:
        with self._transformer.cache_context(context):
            return self._transformer(latents, timestep=timestep.expand(batch_size), **arguments)[0]


def _takes_samples_without_tokens(transformer: DenseDiT | SparseDiT) -> bool:
    """Whether samples without the image need no tokens of zeros: not where others look at the tokens as well.

    In the sparse transformer, tokens of zeros differ by their places in the picture.
    """
    if not isinstance(transformer, DenseDiT) or transformer.is_cache_enabled:
        return False
    return all(type(processor) is DenseAttnProcessor for processor in transformer.attn_processors.values())


def _arguments_of_both(arguments: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """The keyword arguments for 2 B samples, without the image and then with it, except for the image tokens."""
    both = dict(arguments)
    for coords_name, cache_name in (("coords", "cache"), ("encoder_coords", "encoder_cache")):
        coords = arguments.get(coords_name)
        if coords is not None:
            cache = arguments.get(cache_name) or CoordinateCache(coords, batch_size)
            both[cache_name] = cache.derived("twice the samples", partial(_twice_the_samples, coords, batch_size))
            both[coords_name] = both[cache_name].coords
    return both


def _twice_the_samples(coords: Tensor, batch_size: int) -> CoordinateCache:
    return CoordinateCache(torch.cat([coords, coords + coords.new_tensor([batch_size, 0, 0, 0])]), 2 * batch_size)
