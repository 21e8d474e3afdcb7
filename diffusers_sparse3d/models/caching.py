"""Caches of diffusers over denoising steps, on the transformers of this package."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from ..sparse_tensor import CoordinateCache
from .compatibility import FASTER_CACHE_DENOISER_HOOK, FasterCacheDenoiserHook, HookRegistry


# The modules whose outputs TaylorSeer extrapolates unless its configuration names others. diffusers' own patterns name
# attention modules that are called "attn".
ATTENTION_PATTERN = r"transformer_blocks\.\d+\.attn\d"
# Edge of the blocks of cells whose means are the low frequencies of packed latents.
FREQUENCY_BLOCK_SIZE = 4


class StepCacheMixin(CacheMixin):
    """diffusers' `CacheMixin` for transformers whose blocks are `transformer_blocks`, with `attn1` and `attn2`."""

    transformer_blocks: nn.ModuleList

    def enable_cache(self, config: Any) -> None:
        """
        Reuse what steps have in common.

        Args:
            config: of diffusers, such as `FirstBlockCacheConfig`, `MagCacheConfig`, `TaylorSeerCacheConfig`,
                `FasterCacheConfig` or `PyramidAttentionBroadcastConfig`. TaylorSeer without identifiers of modules
                extrapolates the attention modules.

        Raises:
            ValueError: if the cache needs more than one transformer block, or a cache is enabled already.
        """
        # By name, because older versions of diffusers have fewer of them.
        name = type(config).__name__
        if name in ("FirstBlockCacheConfig", "MagCacheConfig") and len(self.transformer_blocks) < 2:
            raise ValueError(
                f"`config` must not be a {name} for a transformer with one block: it skips the blocks after the first"
            )
        if name == "TaylorSeerCacheConfig" and not (
            config.cache_identifiers or config.skip_predict_identifiers or config.use_lite_mode
        ):
            config = dataclasses.replace(config, cache_identifiers=[ATTENTION_PATTERN])
        super().enable_cache(config)

    def disable_cache(self) -> None:
        """Undo `enable_cache`, whole: of a layer that seems hooked, no call is replayed or fused."""
        super().disable_cache()
        for module in self.modules():
            _forget_removed_hooks(module)


def _forget_removed_hooks(module: Any) -> None:
    """Take away what diffusers leaves on a module when its last hook is removed: a registry, and its own `forward`."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None or registry.hooks:
        return
    del module._diffusers_hook
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward


class PackedStepCacheMixin(StepCacheMixin):
    """The same for packed tokens `[N, C]` with `coords [N, 4]`."""

    def enable_cache(self, config: Any) -> None:
        if getattr(self, "_parallel_config", None) is not None:
            raise ValueError(
                "a cache over steps cannot be used with context parallelism: the decision to skip a block may differ"
                " between processes, which then wait for each other"
            )
        super().enable_cache(config)
        if type(config).__name__ == "FasterCacheConfig":
            registry = HookRegistry.check_if_exists_or_initialize(self)
            hook = registry.get_hook(FASTER_CACHE_DENOISER_HOOK)
            registry.remove_hook(FASTER_CACHE_DENOISER_HOOK, recurse=False)
            registry.register_hook(PackedFasterCacheHook(**_arguments_of(hook)), FASTER_CACHE_DENOISER_HOOK)


class PackedFasterCacheHook(FasterCacheDenoiserHook):
    """
    FasterCache (arXiv 2410.19355) of the prediction without the image, for the packed tokens of a sparse transformer.

    A call is for 2 B samples: B without the image, then the same cells with it. In steps that leave out the first
    half, its prediction is that of the second half plus their difference in an earlier step, whose low and high
    frequencies are weighted apart. diffusers takes frequencies of a Fourier transform over a dense grid; here the low
    ones are the means over blocks of 4^3 cells, and the high ones are the rest.
    """

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the model for both halves, or for the second one, and return the prediction for both."""
        if self.is_guidance_distilled:
            return super().new_forward(module, *args, **kwargs)
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        arguments.pop("self")
        if self.state.iteration == 0:
            _check_halves(arguments["coords"], arguments["timestep"])
        first, last = self.unconditional_batch_timestep_skip_range
        skips = self.state.iteration > 0 and self.state.iteration % self.unconditional_batch_skip_range != 0
        skips = skips and first < self.current_timestep_callback() < last
        half = _second_half(arguments)
        output = self.fn_ref.original_forward(**(half if skips else arguments))
        state, predicted = self.state, output[0]
        if skips:
            state.low_frequency_delta = state.low_frequency_delta * self.low_frequency_weight_callback(module)
            state.high_frequency_delta = state.high_frequency_delta * self.high_frequency_weight_callback(module)
            unconditional = predicted + state.low_frequency_delta + state.high_frequency_delta
            predicted = torch.cat([unconditional.to(predicted.dtype), predicted])
        else:
            unconditional, conditional = predicted.float().chunk(2)
            difference = unconditional - conditional
            state.low_frequency_delta = _block_means(difference, half["cache"])
            state.high_frequency_delta = difference - state.low_frequency_delta
        state.iteration += 1
        return (predicted,) if isinstance(output, tuple) else type(output)(sample=predicted)


def _arguments_of(hook: FasterCacheDenoiserHook) -> dict[str, Any]:
    """The arguments that diffusers made a hook with."""
    names = [name for name in inspect.signature(FasterCacheDenoiserHook.__init__).parameters if name != "self"]
    return {name: getattr(hook, name) for name in names}


def _check_halves(coords: Tensor, timestep: Tensor) -> None:
    """Raise a ValueError unless `coords` are those of B samples, then the same cells of B more in the same order."""
    shift = coords.new_tensor([len(timestep) // 2, 0, 0, 0])
    rows = len(coords) // 2
    if len(timestep) % 2 or not torch.equal(coords[:rows] + shift, coords[rows:]):
        raise ValueError(
            "`coords` must hold samples without the image, then the same cells with it, for FasterCache: without"
            " guidance it takes `is_guidance_distilled=True`"
        )


def _second_half(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call for 2 B samples, without the first B."""
    half = dict(arguments)
    for name in ("hidden_states", "timestep", "encoder_hidden_states"):
        half[name] = arguments[name].chunk(2)[1]
    batch_size = len(half["timestep"])
    for coords_name, cache_name in (("coords", "cache"), ("encoder_coords", "encoder_cache")):
        coords, cache = arguments.get(coords_name), arguments.get(cache_name)
        if coords is not None:
            coords = coords.chunk(2)[1]
            half_cache = partial(CoordinateCache, coords - coords.new_tensor([batch_size, 0, 0, 0]), batch_size)
            # Kept with the other cache, so that attention is planned once for all steps.
            half[cache_name] = half_cache() if cache is None else cache.derived("second half", half_cache)
            half[coords_name] = half[cache_name].coords
    return half


def _block_means(values: Tensor, cache: CoordinateCache) -> Tensor:
    """For each row of `values [N, C]`, the mean of the rows in its block of 4^3 cells."""
    blocks, block_of_row = cache.downsample(FREQUENCY_BLOCK_SIZE)
    sums = values.new_zeros(len(blocks.coords), values.shape[1]).index_add(0, block_of_row, values)
    return (sums / torch.bincount(block_of_row)[:, None])[block_of_row]
