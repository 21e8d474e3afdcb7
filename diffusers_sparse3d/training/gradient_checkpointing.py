"""Gradient checkpointing as the configuration of a training has it."""

from __future__ import annotations

from diffusers import ModelMixin

from .. import SparseDiT, SparseVAE
from ..models.checkpointing import checkpoint_keeping_attention
from .configuration import TrainingConfig


def set_gradient_checkpointing(model: ModelMixin, config: TrainingConfig) -> None:
    """Let a model compute its activations again in the backward pass, if the configuration says so.

    Raises:
        ValueError: if attention is to be kept in a model that has none that can be.
    """
    if not config.gradient_checkpointing:
        return
    if config.checkpointing_keeps_attention:
        if not isinstance(model, SparseDiT | SparseVAE):
            raise ValueError(
                f"`checkpointing_keeps_attention` must be false for {type(model).__name__}: only sparse models have"
                " attention that is kept"
            )
        model.enable_gradient_checkpointing(checkpoint_keeping_attention)
    else:
        model.enable_gradient_checkpointing()
