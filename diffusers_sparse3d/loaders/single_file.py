"""`from_single_file` of the models: how diffusers turns a published `.ckpt` file into one of ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from .original_checkpoint import convert_parameters, model_state_dict
from .original_config import model_config


def _map_config(
    model_class: type[ModelMixin],
    original_config: dict[str, Any],
    checkpoint: dict[str, Any],
    original_file: str | None = None,
    original_entry: str | None = None,
) -> dict[str, Any]:
    model_name = model_class.__name__
    state_dict = model_state_dict(model_name, checkpoint)
    return model_config(original_config, model_name, state_dict, original_file, original_entry)


def _map_checkpoint(
    model_class: type[ModelMixin], config: dict[str, Any], checkpoint: dict[str, Any]
) -> dict[str, Tensor]:
    model_name = model_class.__name__
    with torch.device("meta"):
        model = model_class.from_config(config)
    return convert_parameters(model, model_name, model_state_dict(model_name, checkpoint))


def register_single_file(model_class: type[ModelMixin]) -> None:
    """Registers with `FromOriginalModelMixin.from_single_file` how to read the published files of `model_class`."""
    SINGLE_FILE_LOADABLE_CLASSES[model_class.__name__] = {
        "checkpoint_mapping_fn": partial(_map_checkpoint, model_class),
        "config_mapping_fn": partial(_map_config, model_class),
    }
