"""Configurations of tiny models that several tests train, some of them in processes of their own."""

from typing import Any


SPARSE_VAE: dict[str, Any] = {
    "latent_channels": 4,
    "sample_size": 4,
    "encoder_channels": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_channels": 32,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "norm_num_groups": 2,
}
