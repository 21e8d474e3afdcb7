"""The caches of diffusers over the steps of a stage: what they need to know, and when they must forget."""

from __future__ import annotations

from typing import Any

from ..models.transformer_dense import DenseDiT
from ..models.transformer_sparse import SparseDiT


def steps_in_interval(interval: tuple[float, float], num_steps: int) -> range:
    """The numbers of the steps from and up to shares (start, stop) of `num_steps`, rounded."""
    start, stop = interval
    return range(round(start * num_steps), round(stop * num_steps))


class StepCache:
    """
    The cache that a transformer has by `enable_cache`, during the steps of one stage.

    What a cache of diffusers holds belongs to one sequence of calls with one batch: it is forgotten before the first
    step, and where guidance begins or ends within the steps.

    Args:
        transformer: of the stage.
    """

    def __init__(self, transformer: DenseDiT | SparseDiT):
        self._transformer = transformer
        self._guided: bool | None = None

    def check(self, num_steps: int, guided_steps: range, batches_guidance: bool) -> None:
        """
        Check that the cache, if there is one, can do what is asked of it.

        Args:
            num_steps: of the stage.
            guided_steps: the steps with guidance.
            batches_guidance: whether guidance is one call for both predictions.

        Raises:
            ValueError: if it cannot; the message says which setting to change.
        """
        config: Any = getattr(self._transformer, "_cache_config", None)
        # By name, because older versions of diffusers have fewer of them.
        kind = type(config).__name__
        always_guided = len(guided_steps) == num_steps
        needs_batch = kind in ("FasterCacheConfig", "PyramidAttentionBroadcastConfig") and len(guided_steps) > 0
        if needs_batch and not batches_guidance:
            raise ValueError(f"{kind} needs guidance as one batch: call `enable_guidance_batching()` of the pipeline")
        if kind == "FasterCacheConfig" and not config.is_guidance_distilled and not always_guided:
            raise ValueError(
                "FasterCacheConfig needs guidance in all steps (`guidance_scale` above 1 and no `guidance_interval`),"
                " or `is_guidance_distilled=True`"
            )
        if kind == "MagCacheConfig":
            if config.num_inference_steps != num_steps:
                raise ValueError(
                    f"`num_inference_steps` of MagCacheConfig must be that of the stage, {num_steps}, got"
                    f" {config.num_inference_steps}"
                )
            if len(guided_steps) and not always_guided:
                raise ValueError("MagCacheConfig counts its steps, and so takes no `guidance_interval`")

    def start_step(self, guided: bool) -> None:
        """Forget what was kept, if this is the first step or the first one with or without guidance."""
        if guided != self._guided:
            self._transformer._reset_stateful_cache()
        self._guided = guided
