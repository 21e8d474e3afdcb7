"""The image encoder that conditions the transformers: a DINOv2 of transformers, with or without registers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from transformers import (
    AutoConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from .configuration import loading
from .dit_configuration import ENCODER_CHANGES, DiTConfig


ImageEncoder: TypeAlias = Dinov2Model | Dinov2WithRegistersModel
MODEL_CLASSES: dict[str, Any] = {
    Dinov2Config.model_type: Dinov2Model,
    Dinov2WithRegistersConfig.model_type: Dinov2WithRegistersModel,
}
# What configurations derive from the number of layers, for the use as a backbone.
DERIVED_KEYS = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
# With this variable, which `accelerate launch --use_fsdp` sets, transformers before version 5 reads the weights of a
# model in the first process of a machine alone, and expects FSDP to send them to the others.
EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def image_and_patch_size(encoder: ImageEncoder) -> tuple[int, int]:
    """Returns the edges of the images and of the patches of an image encoder in pixels; both are square."""
    # transformers declares that they may be pairs.
    config: Any = encoder.config
    return config.image_size, config.patch_size


@contextmanager
def loaded_in_every_process() -> Iterator[None]:
    """Has `from_pretrained` of transformers read the weights in all processes: FSDP never sees a frozen model."""
    before = os.environ.get(EFFICIENT_LOADING)
    os.environ[EFFICIENT_LOADING] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[EFFICIENT_LOADING]
        else:
            os.environ[EFFICIENT_LOADING] = before


def load_pretrained_encoder(source: str) -> ImageEncoder:
    """Returns the image encoder of a folder or hub id in float32, from safetensors alone.

    Raises:
        ValueError: if it is no DINOv2.
    """
    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type not in MODEL_CLASSES:
        raise ValueError(f"`image_encoder` must be one of {sorted(MODEL_CLASSES)}, got {source!r}, a {model_type!r}")
    with loaded_in_every_process():
        encoder: ImageEncoder = MODEL_CLASSES[model_type].from_pretrained(source, use_safetensors=True)
    # transformers keeps the dtype of the file, and weights that are trained must not be of half precision.
    return encoder.float()


def adapt_encoder(
    encoder: ImageEncoder, num_hidden_layers: int | None = None, image_size: int | None = None
) -> ImageEncoder:
    """Returns an image encoder with the first layers of another, for images of another size.

    Its tokens are those that the other has after so many layers, for images of that size: transformers interpolates
    position embeddings at every call, here it is done once.

    Args:
        encoder: The encoder to start from, which stays as it is.
        num_hidden_layers: Layers that are kept; all if None.
        image_size: Edge of the images in pixels; the encoder's if None.

    Raises:
        ValueError: if the encoder has fewer layers, or the size is no multiple of its patch size.
    """
    config: Any = encoder.config
    layers = config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
    size = config.image_size if image_size is None else image_size
    if not isinstance(layers, int) or not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(
            f"`image_encoder_model.num_hidden_layers` must be from 1 to {config.num_hidden_layers}, got {layers!r}"
        )
    if not isinstance(size, int) or size < config.patch_size or size % config.patch_size:
        raise ValueError(
            f"`image_encoder_model.image_size` must be a multiple of {config.patch_size}, the edge of a patch, got"
            f" {size!r}"
        )
    values = {name: value for name, value in config.to_dict().items() if name not in DERIVED_KEYS}
    changed = type(config)(**{**values, "num_hidden_layers": layers, "image_size": size})
    adapted: ImageEncoder = type(encoder)(changed).to(encoder.dtype)
    embeddings: Any = encoder.embeddings
    num_tokens = 1 + (size // config.patch_size) ** 2
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(
            embeddings.position_embeddings.new_zeros(1, num_tokens, config.hidden_size), size, size
        )
    state = {**encoder.state_dict(), "embeddings.position_embeddings": positions}
    adapted.load_state_dict({name: state[name] for name in adapted.state_dict()})
    return adapted


def load_image_encoder(config: DiTConfig) -> ImageEncoder:
    """Returns the image encoder of a configuration, whose parameters require gradients if it is trained too.

    Raises:
        ValueError: if `image_encoder` names a model of another kind, or `image_encoder_model` does not fit it.
    """
    encoder: ImageEncoder
    if config.image_encoder is None:
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config.image_encoder_model))
    else:
        with loading("image_encoder", config.image_encoder):
            encoder = load_pretrained_encoder(config.image_encoder)
        if config.image_encoder_model:
            encoder = adapt_encoder(encoder, *(config.image_encoder_model.get(name) for name in ENCODER_CHANGES))
    encoder.requires_grad_(config.train_image_encoder)
    # The conditioning does not depend on these two: it takes the tokens before the final norm, none masked.
    encoder.layernorm.requires_grad_(False)
    if encoder.embeddings.mask_token is not None:
        encoder.embeddings.mask_token.requires_grad_(False)
    return encoder
