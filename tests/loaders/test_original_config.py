"""Configurations from published ones: every default of the table a second time, so that a slip in it is noticed."""

import pytest
import torch

from diffusers_sparse3d.loaders.original_config import convert_config, model_config


TRANSFORMER = {"resolution": 64, "in_channels": 16, "out_channels": 16, "num_blocks": 24, "cond_channels": 1024}
COMMON_TRANSFORMER = {
    "sample_size": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "cross_attention_dim": 1024,
    "mlp_ratio": 4.0,
    "share_mod": False,
    "qk_norm": False,
    "qk_norm_cross": False,
    # Heads have 64 channels unless their number is given.
    "num_attention_heads": 16,
    "attention_head_dim": 64,
}
REFINER = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 2,
    "mid_layers": 2,
    "patch_size": 192,
    "sample_size": 512,
}
DEFAULTS = {
    "DenseDiT": ({**TRANSFORMER, "model_channels": 1024}, {**COMMON_TRANSFORMER, "patch_size": 2}),
    "SparseDiT": (
        {**TRANSFORMER, "model_channels": 1024},
        {
            **COMMON_TRANSFORMER,
            "num_key_value_heads": 2,
            "compression_block_size": 4,
            "selection_block_size": 8,
            "topk": 8,
            "compression_version": "v2",
            "sparse_conditioning": False,
            "coord_scale": 1.0,
            "window_size": 8,
            "norm_num_groups": 32,
        },
    ),
    "DenseVAE": (
        {"embed_dim": 8},
        {
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 8,
            "encoder_block_out_channels": (32, 128, 512),
            "decoder_block_out_channels": (512, 128, 32),
            "layers_per_block": 2,
            "mid_layers": 2,
            "decoder_layers_per_block": 2,
            "decoder_mid_layers": 2,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        },
    ),
    "SparseVAE": (
        {"embed_dim": 16},
        {
            "out_channels": 1,
            "latent_channels": 16,
            "sample_size": 64,
            "encoder_channels": 512,
            "encoder_layers": 4,
            "encoder_heads": 8,
            "decoder_channels": 512,
            "decoder_layers": 4,
            "decoder_heads": 8,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "norm_num_groups": 32,
        },
    ),
    "SDFRefiner": ({}, REFINER),
    "SDFSignRefiner": ({}, REFINER),
}


@pytest.mark.parametrize("model_name", DEFAULTS)
def test_defaults_of_the_published_classes(model_name):
    params, expected = DEFAULTS[model_name]
    assert convert_config(model_name, params, {}) == expected


def test_values_away_from_the_defaults():
    params = {**TRANSFORMER, "model_channels": 1024, "num_heads": 32, "num_kv_heads": 4, "sparse_conditions": True}
    config = convert_config("SparseDiT", {**params, "factor": 0.5, "topk": 32, "compression_version": "v1"}, {})
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (32, 32)
    assert (config["num_key_value_heads"], config["sparse_conditioning"]) == (4, True)
    assert (config["coord_scale"], config["topk"], config["compression_version"]) == (0.5, 32, "v1")
    config = convert_config("SparseVAE", {"embed_dim": 16, "latents_scale": 2.5, "latents_shift": 0.25}, {})
    assert (config["scaling_factor"], config["shift_factor"]) == (2.5, 0.25)


def test_refiners_take_their_widths_from_the_parameters():
    shapes = {f"unet3d1.down_blocks.{i}.resnets.0.conv1.weight": (width, 8, 3, 3, 3) for i, width in enumerate((4, 6))}
    shapes["latent_mlp.net.0.weight"] = (12, 5)
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = convert_config("SDFRefiner", {}, state_dict)
    assert config["block_out_channels"] == [4, 6]
    assert (config["feature_mlp_dim"], config["feature_channels"]) == (12, 5)


@pytest.mark.parametrize(("channels", "sample_size"), [([32, 128, 512], 64), ([32, 64], 32), ([32], 16)])
def test_the_grid_of_the_dense_vae_is_that_of_the_dense_latents(channels, sample_size):
    """Each of its levels but the last halves the grid; the latents are those of the dense transformer."""
    config = {
        "dense_vae": {"target": "x.DenseShapeVAE", "params": {"embed_dim": 8, "model_channels_encoder": channels}},
        "dense_dit": {"target": "x.DenseDiT", "params": {"resolution": 16}},
    }
    converted = model_config(config, "DenseVAE", {}, entry="dense_vae")
    assert list(converted["encoder_block_out_channels"]) == channels and converted["sample_size"] == sample_size
