"""Planning of sparse models: all that a call derives from coordinates, made beforehand.

A planned call does not wait for the GPU, and `torch.compile(fullgraph=True)` and `torch.export` trace it as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sparse_tensor import CoordinateCache
from .attention import PackedAttentionMixin


class PlannedTransformerMixin(PackedAttentionMixin):
    """`plan` for a transformer whose `transformer_blocks` have a `plan` each."""

    transformer_blocks: Any
    device: Any
    dtype: Any

    def plan(
        self, coords: Tensor, batch_size: int, encoder_coords: Tensor | None = None
    ) -> tuple[CoordinateCache, CoordinateCache | None]:
        """
        What calls derive from the coordinates, for the arguments `cache` and `encoder_cache`.

        The dtype is that of the model, or of autocast where it is on. What a backward pass needs is included if
        gradients are enabled.

        Args:
            coords (`torch.Tensor` of shape `(N, 4)`): int32 (batch, x, y, z) of the tokens.
            batch_size (`int`): Number of samples, B.
            encoder_coords (`torch.Tensor` of shape `(M, 4)`, *optional*): int32, of packed conditioning tokens.

        Returns:
            The two caches; the second is None without `encoder_coords`.
        """
        cache = CoordinateCache(coords, batch_size)
        encoder_cache = None if encoder_coords is None else CoordinateCache(encoder_coords, batch_size)
        self.plan_blocks(torch.empty(0, device=self.device, dtype=self.dtype), cache, encoder_cache)
        return cache, encoder_cache

    def plan_blocks(
        self, hidden_states: Tensor, cache: CoordinateCache, encoder_cache: CoordinateCache | None
    ) -> None:
        """Fill the caches for tokens with the dtype and device of `hidden_states`."""
        plan_blocks(self.transformer_blocks, hidden_states, cache, encoder_cache)


class PlannedAutoencoderMixin(PackedAttentionMixin):
    """`plan` for a sparse autoencoder with `encoder` and `decoder`, whose blocks have a `plan` each."""

    encoder: Any
    decoder: Any
    device: Any
    dtype: Any

    def plan(self, coords: Tensor, batch_size: int | None = None) -> CoordinateCache:
        """What `forward` derives from the coordinates `[N, 4]` of its samples, for its argument `cache`."""
        cache = self.plan_encode(coords, batch_size)
        self._plan_decoder(self.latent_cache(cache))
        return cache

    def plan_encode(self, coords: Tensor, batch_size: int | None = None) -> CoordinateCache:
        """
        What `encode` derives from the coordinates, for its argument `cache`; dtype and gradients as of the call.

        Args:
            coords (`torch.Tensor` of shape `(N, 4)`): int32 (batch, x, y, z) of the samples.
            batch_size (`int`, *optional*): Number of samples, counting empty ones; found in `coords` if not given.
        """
        cache = level = CoordinateCache(coords, batch_size)
        tokens = self._tokens()
        for block in self.encoder.down_blocks:
            block.plan(tokens, level)
            level, _ = level.downsample(2)
        plan_blocks(self.encoder.transformer_blocks, tokens, level)
        return cache

    def plan_decode(self, coords: Tensor, batch_size: int | None = None) -> CoordinateCache:
        """What `decode` derives from the coordinates of the latents; otherwise as `plan_encode`."""
        return self._plan_decoder(CoordinateCache(coords, batch_size))

    def latent_cache(self, cache: CoordinateCache) -> CoordinateCache:
        """The cache of the latents of the samples that `cache` is of."""
        for _ in self.encoder.down_blocks:
            cache, _ = cache.downsample(2)
        return cache

    def _plan_decoder(self, cache: CoordinateCache) -> CoordinateCache:
        tokens, level = self._tokens(), cache
        plan_blocks(self.decoder.transformer_blocks, tokens, level)
        for index, block in enumerate(self.decoder.up_blocks):
            if index > 0:
                level = level.subdivide(keep=True)
            block.plan(tokens, level)
        return cache

    def _tokens(self) -> Tensor:
        return torch.empty(0, device=self.device, dtype=self.dtype)


def plan_blocks(blocks: Any, *args: Any) -> None:
    """Call `plan` of all blocks of a model with the same arguments."""
    for block in blocks:
        block.plan(*args)


def checks_values(check_inputs: bool) -> bool:
    """Whether to look at the values of arguments: not where the call is traced, since they are not known there."""
    return check_inputs and not torch.compiler.is_compiling()
