"""What the trainings of both VAEs start from."""

from typing import TypeVar

from .. import DenseVAE, SparseVAE
from .configuration import VAETrainingConfig, loading
from .gradient_checkpointing import set_gradient_checkpointing


VAE = TypeVar("VAE", DenseVAE, SparseVAE)


def make_vae(model_class: type[VAE], config: VAETrainingConfig) -> VAE:
    """Returns the VAE of a configuration, with pretrained weights or new ones; its encoder is frozen if it says so."""
    if config.pretrained:
        # Never a pickle: weights may come from a stranger.
        with loading("pretrained", config.pretrained):
            vae = model_class.from_pretrained(config.pretrained, use_safetensors=True, **config.model)
    else:
        vae = model_class(**config.model)
    set_gradient_checkpointing(vae, config)
    vae.encoder.requires_grad_(config.train_encoder)
    return vae
