"""Names of published parameters and of ours, there and back."""

import pytest
import torch

from diffusers_sparse3d import SDFRefiner, SDFSignRefiner
from diffusers_sparse3d.loaders.original_checkpoint import convert_parameters
from diffusers_sparse3d.loaders.original_config import convert_config
from diffusers_sparse3d.loaders.original_names import (
    RULES,
    convert_state_dict,
    original_name,
    rename,
    restore_state_dict,
)
from tests.golden import load_golden


CASES = {
    "dense_vae": "DenseVAE",
    "dense_dit": "DenseDiT",
    "sparse_vae": "SparseVAE",
    "sparse_dit": "SparseDiT",
    "refiner": "SDFRefiner",
    "refiner_sign": "SDFSignRefiner",
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    state_dict = load_golden(case).state_dict
    state_dict.pop("pos_emb", None)
    restored = restore_state_dict(CASES[case], convert_state_dict(CASES[case], state_dict))
    assert restored.keys() == state_dict.keys()
    assert all(torch.equal(restored[name], state_dict[name]) for name in state_dict)


@pytest.mark.parametrize("model_name", RULES)
def test_unknown_name(model_name):
    with pytest.raises(ValueError, match=f"original {model_name}"):
        original_name(model_name, "no_such.weight")
    with pytest.raises(ValueError, match=r"no_such\.weight"):
        convert_state_dict(model_name, {"no_such.weight": torch.zeros(1)})


@pytest.mark.parametrize("model_class", [SDFRefiner, SDFSignRefiner])
def test_refiners_from_published_configuration(model_class):
    name = model_class.__name__
    golden = load_golden({value: case for case, value in CASES.items()}[name])
    config = convert_config(name, golden.config, golden.state_dict)
    assert config["block_out_channels"] == [8, 32, 128, 512] and config["sample_size"] == 512
    with torch.device("meta"):
        model = model_class(**config)
    assert (config["patch_size"], model.patch_stride) == ((192, 160) if name == "SDFRefiner" else (256, 128))
    assert convert_parameters(model, name, golden.state_dict).keys() == model.state_dict().keys()


# Packed projection of each model, and what its equal parts are, in the order in which the published code splits them.
PACKED = [
    ("SparseVAE", "encoder.blocks.0.attn.to_qkv", "encoder.transformer_blocks.0.attn1", ["to_q", "to_k", "to_v"]),
    ("SparseVAE", "decoder.blocks.1.attn.to_qkv", "decoder.transformer_blocks.1.attn1", ["to_q", "to_k", "to_v"]),
    ("SparseDiT", "blocks.0.cross_attn.to_kv", "transformer_blocks.0.attn2", ["to_k", "to_v"]),
    ("DenseDiT", "blocks.0.self_attn.to_qkv", "transformer_blocks.0.attn1", ["to_q", "to_k", "to_v"]),
    ("DenseDiT", "blocks.0.cross_attn.to_kv", "transformer_blocks.0.attn2", ["to_k", "to_v"]),
    (
        "Dinov2WithRegistersModel",
        "blocks.3.attn.qkv",
        "encoder.layer.3.attention.attention",
        ["query", "key", "value"],
    ),
]


@pytest.mark.parametrize(("model_name", "original", "ours", "parts"), PACKED)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_packed_projections_are_split_in_order(model_name, original, ours, parts, leaf):
    rows = torch.arange(2.0 * len(parts))
    packed = rows[:, None].repeat(1, 3) if leaf == "weight" else rows
    converted = convert_state_dict(model_name, {f"{original}.{leaf}": packed})
    expected = {f"{ours}.{part}.{leaf}": packed[2 * i : 2 * i + 2] for i, part in enumerate(parts)}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


# Separate projections that a typing mistake could exchange without changing any shape.
NAMES = [
    ("SparseDiT", "blocks.2.self_attn.proj_q.weight", "transformer_blocks.2.attn1.to_q.weight"),
    ("SparseDiT", "blocks.2.self_attn.proj_k.weight", "transformer_blocks.2.attn1.to_k.weight"),
    ("SparseDiT", "blocks.2.self_attn.proj_v.weight", "transformer_blocks.2.attn1.to_v.weight"),
    ("SparseDiT", "blocks.2.self_attn.q_rms_norm.gamma", "transformer_blocks.2.attn1.norm_q.gamma"),
    ("SparseDiT", "blocks.2.self_attn.k_rms_norm.gamma", "transformer_blocks.2.attn1.norm_k.gamma"),
    (
        "SparseDiT",
        "blocks.2.self_attn.compression_key.act_layers.0.conv.kernel",
        "transformer_blocks.2.attn1.ssa.compress_key.conv_in.weight",
    ),
    (
        "SparseDiT",
        "blocks.2.self_attn.compression_value.out_layers.0.conv.kernel",
        "transformer_blocks.2.attn1.ssa.compress_value.conv1.weight",
    ),
    (
        "SparseDiT",
        "blocks.2.self_attn.compression_value.out_layers.3.conv.kernel",
        "transformer_blocks.2.attn1.ssa.compress_value.conv2.weight",
    ),
    ("SparseDiT", "t_embedder.mlp.0.weight", "time_embedding.linear_1.weight"),
    ("SparseDiT", "t_embedder.mlp.2.weight", "time_embedding.linear_2.weight"),
    ("SparseVAE", "encoder.downsample.1.out_layers.0.conv.kernel", "encoder.down_blocks.1.conv1.weight"),
    ("SparseVAE", "encoder.downsample.1.out_layers.3.conv.kernel", "encoder.down_blocks.1.conv2.weight"),
    ("SparseVAE", "encoder.downsample.1.act_layers.0.weight", "encoder.down_blocks.1.norm1.weight"),
    ("SparseVAE", "encoder.downsample.1.out_layers.1.weight", "encoder.down_blocks.1.norm2.weight"),
    ("SparseVAE", "decoder.upsample.1.act_layers.0.conv.kernel", "decoder.up_blocks.1.conv1.weight"),
    ("SparseVAE", "decoder.upsample.1.out_layers.0.conv.kernel", "decoder.up_blocks.1.conv2.weight"),
    ("Dinov2WithRegistersModel", "blocks.0.ls1.gamma", "encoder.layer.0.layer_scale1.lambda1"),
    ("Dinov2WithRegistersModel", "blocks.0.ls2.gamma", "encoder.layer.0.layer_scale2.lambda1"),
]


@pytest.mark.parametrize(("model_name", "original", "ours"), NAMES)
def test_names_by_hand(model_name, original, ours):
    assert rename(model_name, original) == [ours]
