"""Gradient checkpointing as the configuration of a training has it."""

from __future__ import annotations

from diffusers import ModelMixin

from ..models.checkpointing import checkpoint_keeping_attention
from .configuration import TrainingConfig


def set_gradient_checkpointing(model: ModelMixin, config: TrainingConfig) -> None:
    """Let a model compute its activations again in the backward pass, if the configuration says so."""
    if not config.gradient_checkpointing:
        return
    if config.checkpointing_keeps_attention:
        model.enable_gradient_checkpointing(checkpoint_keeping_attention)
    else:
        model.enable_gradient_checkpointing()
