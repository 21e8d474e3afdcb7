"""Parameter names of the published Direct3D-S2 checkpoints and of this package: the one table between them.

Each model class has an ordered list of `(pattern, replacement)` rules, regular expressions applied to the whole
original name; the first rule that matches wins. Fused projections (`to_qkv`, `to_kv`) are written with a replacement
per part, separated by `|`, and are split into equal parts along the first axis. An empty replacement drops what is
computed here rather than loaded.
"""

from __future__ import annotations

import re

import torch


# What the two refiners have in common.
REFINER_RULES: list[tuple[str, str]] = [
    (r"(conv_in|conv_out)\.(.+)", r"\1.\2"),
    (r"unet3d1\.conv_in\.(.+)", r"unet.conv_in.\1"),
    (r"unet3d1\.conv_norm_out\.(.+)", r"unet.norm_out.\1"),
    (r"unet3d1\.mid_block\.resnets\.(.+)", r"unet.mid_blocks.\1"),
    (r"unet3d1\.(down|up)_blocks\.(\d+)\.resnets\.(.+)", r"unet.\1_blocks.\2.resnets.\3"),
    (r"unet3d1\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\.(.+)", r"unet.\1_blocks.\2.\3sampler.\4"),
]

RULES: dict[str, list[tuple[str, str]]] = {
    "SparseDiT": [
        (r"t_embedder\.mlp\.0\.(.+)", r"time_embedding.linear_1.\1"),
        (r"t_embedder\.mlp\.2\.(.+)", r"time_embedding.linear_2.\1"),
        (r"cond_proj\.(.+)", r"context_embedder.\1"),
        (r"input_layer\.(.+)", r"proj_in.\1"),
        (r"out_layer\.(.+)", r"proj_out.\1"),
        (r"adaLN_modulation\.1\.(.+)", r"modulation.1.\1"),
        (r"blocks\.(\d+)\.adaLN_modulation\.1\.(.+)", r"transformer_blocks.\1.modulation.1.\2"),
        (r"blocks\.(\d+)\.norm2\.(.+)", r"transformer_blocks.\1.norm2.\2"),
        (r"blocks\.(\d+)\.self_attn\.proj_([qkv])\.(.+)", r"transformer_blocks.\1.attn1.to_\2.\3"),
        (r"blocks\.(\d+)\.self_attn\.proj_o\.(.+)", r"transformer_blocks.\1.attn1.to_out.0.\2"),
        (r"blocks\.(\d+)\.self_attn\.([qk])_rms_norm\.gamma", r"transformer_blocks.\1.attn1.norm_\2.gamma"),
        (r"blocks\.(\d+)\.self_attn\.intra_block_pe", r"transformer_blocks.\1.attn1.ssa.intra_block_pos_embed"),
        (r"blocks\.(\d+)\.self_attn\.gate\.0\.(.+)", r"transformer_blocks.\1.attn1.ssa.gate.\2"),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.act_layers\.0\.conv\.kernel",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.conv_in.weight",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.act_layers\.0\.conv\.bias",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.conv_in.bias",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.act_layers\.0\.(.+)",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.norm_in.\3",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.out_layers\.0\.conv\.kernel",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.conv1.weight",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.out_layers\.0\.conv\.bias",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.conv1.bias",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.out_layers\.1\.(.+)",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.norm.\3",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.out_layers\.3\.conv\.kernel",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.conv2.weight",
        ),
        (
            r"blocks\.(\d+)\.self_attn\.compression_(key|value)\.out_layers\.3\.conv\.bias",
            r"transformer_blocks.\1.attn1.ssa.compress_\2.conv2.bias",
        ),
        (r"blocks\.(\d+)\.cross_attn\.to_q\.(.+)", r"transformer_blocks.\1.attn2.to_q.\2"),
        (
            r"blocks\.(\d+)\.cross_attn\.to_kv\.(.+)",
            r"transformer_blocks.\1.attn2.to_k.\2|transformer_blocks.\1.attn2.to_v.\2",
        ),
        (r"blocks\.(\d+)\.cross_attn\.to_out\.(.+)", r"transformer_blocks.\1.attn2.to_out.0.\2"),
        (r"blocks\.(\d+)\.cross_attn\.([qk])_rms_norm\.gamma", r"transformer_blocks.\1.attn2.norm_\2.gamma"),
        (r"blocks\.(\d+)\.mlp\.mlp\.0\.(.+)", r"transformer_blocks.\1.ff.net.0.proj.\2"),
        (r"blocks\.(\d+)\.mlp\.mlp\.2\.(.+)", r"transformer_blocks.\1.ff.net.2.\2"),
    ],
    "SparseVAE": [
        (r"encoder\.input_layer1\.(.+)", r"encoder.conv_in.\1"),
        (r"(encoder|decoder)\.input_layer\.(.+)", r"\1.proj_in.\2"),
        (
            r"(encoder|decoder)\.blocks\.(\d+)\.attn\.to_qkv\.(.+)",
            r"\1.transformer_blocks.\2.attn1.to_q.\3|\1.transformer_blocks.\2.attn1.to_k.\3"
            r"|\1.transformer_blocks.\2.attn1.to_v.\3",
        ),
        (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.to_out\.(.+)", r"\1.transformer_blocks.\2.attn1.to_out.0.\3"),
        (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.mlp\.0\.(.+)", r"\1.transformer_blocks.\2.ff.net.0.proj.\3"),
        (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.mlp\.2\.(.+)", r"\1.transformer_blocks.\2.ff.net.2.\3"),
        (r"encoder\.downsample\.(\d+)\.act_layers\.0\.(.+)", r"encoder.down_blocks.\1.norm1.\2"),
        (r"encoder\.downsample\.(\d+)\.out_layers\.0\.conv\.kernel", r"encoder.down_blocks.\1.conv1.weight"),
        (r"encoder\.downsample\.(\d+)\.out_layers\.0\.conv\.bias", r"encoder.down_blocks.\1.conv1.bias"),
        (r"encoder\.downsample\.(\d+)\.out_layers\.1\.(.+)", r"encoder.down_blocks.\1.norm2.\2"),
        (r"encoder\.downsample\.(\d+)\.out_layers\.3\.conv\.kernel", r"encoder.down_blocks.\1.conv2.weight"),
        (r"encoder\.downsample\.(\d+)\.out_layers\.3\.conv\.bias", r"encoder.down_blocks.\1.conv2.bias"),
        (
            r"encoder\.downsample\.(\d+)\.skip_connection\.conv\.kernel",
            r"encoder.down_blocks.\1.conv_shortcut.weight",
        ),
        (r"encoder\.downsample\.(\d+)\.skip_connection\.conv\.bias", r"encoder.down_blocks.\1.conv_shortcut.bias"),
        (r"decoder\.upsample\.(\d+)\.act_layers\.0\.conv\.kernel", r"decoder.up_blocks.\1.conv1.weight"),
        (r"decoder\.upsample\.(\d+)\.act_layers\.0\.conv\.bias", r"decoder.up_blocks.\1.conv1.bias"),
        (r"decoder\.upsample\.(\d+)\.out_layers\.0\.conv\.kernel", r"decoder.up_blocks.\1.conv2.weight"),
        (r"decoder\.upsample\.(\d+)\.out_layers\.0\.conv\.bias", r"decoder.up_blocks.\1.conv2.bias"),
        (r"encoder\.out_layer\.(.+)", r"encoder.proj_out.\1"),
        (r"decoder\.out_layer\.(.+)", r"decoder.conv_out.\1"),
    ],
    "DenseDiT": [
        (r"pos_emb", r""),
        (r"t_embedder\.mlp\.0\.(.+)", r"time_embedding.linear_1.\1"),
        (r"t_embedder\.mlp\.2\.(.+)", r"time_embedding.linear_2.\1"),
        (r"input_layer\.(.+)", r"proj_in.\1"),
        (r"out_layer\.(.+)", r"proj_out.\1"),
        (r"adaLN_modulation\.1\.(.+)", r"modulation.1.\1"),
        (r"blocks\.(\d+)\.adaLN_modulation\.1\.(.+)", r"transformer_blocks.\1.modulation.1.\2"),
        (r"blocks\.(\d+)\.norm2\.(.+)", r"transformer_blocks.\1.norm2.\2"),
        (
            r"blocks\.(\d+)\.self_attn\.to_qkv\.(.+)",
            r"transformer_blocks.\1.attn1.to_q.\2|transformer_blocks.\1.attn1.to_k.\2|transformer_blocks.\1.attn1.to_v.\2",
        ),
        (r"blocks\.(\d+)\.self_attn\.to_out\.(.+)", r"transformer_blocks.\1.attn1.to_out.0.\2"),
        (r"blocks\.(\d+)\.self_attn\.([qk])_rms_norm\.gamma", r"transformer_blocks.\1.attn1.norm_\2.gamma"),
        (r"blocks\.(\d+)\.cross_attn\.to_q\.(.+)", r"transformer_blocks.\1.attn2.to_q.\2"),
        (
            r"blocks\.(\d+)\.cross_attn\.to_kv\.(.+)",
            r"transformer_blocks.\1.attn2.to_k.\2|transformer_blocks.\1.attn2.to_v.\2",
        ),
        (r"blocks\.(\d+)\.cross_attn\.to_out\.(.+)", r"transformer_blocks.\1.attn2.to_out.0.\2"),
        (r"blocks\.(\d+)\.cross_attn\.([qk])_rms_norm\.gamma", r"transformer_blocks.\1.attn2.norm_\2.gamma"),
        (r"blocks\.(\d+)\.mlp\.mlp\.0\.(.+)", r"transformer_blocks.\1.ff.net.0.proj.\2"),
        (r"blocks\.(\d+)\.mlp\.mlp\.2\.(.+)", r"transformer_blocks.\1.ff.net.2.\2"),
    ],
    "DenseVAE": [
        (r"(encoder|decoder)\.input_layer\.(.+)", r"\1.conv_in.\2"),
        (r"encoder\.blocks\.(.+)", r"encoder.down_blocks.\1"),
        (r"decoder\.blocks\.(.+)", r"decoder.up_blocks.\1"),
        (r"(encoder|decoder)\.middle_block\.(.+)", r"\1.mid_blocks.\2"),
        (r"(encoder|decoder)\.out_layer\.0\.(.+)", r"\1.norm_out.\2"),
        (r"(encoder|decoder)\.out_layer\.2\.(.+)", r"\1.conv_out.\2"),
    ],
    # torch.hub's dinov2_*_reg; on the right the names in files of transformers' published checkpoints.
    "Dinov2WithRegistersModel": [
        (r"(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
        (r"pos_embed", r"embeddings.position_embeddings"),
        (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
        (r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(.+)", r"encoder.layer.\1.\2.\3"),
        (
            r"blocks\.(\d+)\.attn\.qkv\.(.+)",
            r"encoder.layer.\1.attention.attention.query.\2|encoder.layer.\1.attention.attention.key.\2"
            r"|encoder.layer.\1.attention.attention.value.\2",
        ),
        (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"encoder.layer.\1.attention.output.dense.\2"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"norm\.(.+)", r"layernorm.\1"),
    ],
    "SDFRefiner": [
        (r"latent_mlp\.net\.(.+)", r"feature_mlp.\1"),
        (r"adaptive_conv1\.0\.(.+)", r"filter_in.conv_in.\1"),
        (r"adaptive_conv1\.2\.(.+)", r"filter_in.conv_out.\1"),
        (r"adaptive_conv2\.0\.(.+)", r"filter_mid.conv_in.\1"),
        (r"adaptive_conv2\.2\.(.+)", r"filter_mid.conv_out.\1"),
        (r"adaptive_conv3\.0\.(.+)", r"filter_out.conv_in.\1"),
        (r"adaptive_conv3\.2\.(.+)", r"filter_out.conv_out.\1"),
        (r"mid_conv\.(.+)", r"conv_mid.\1"),
        *REFINER_RULES,
    ],
    "SDFSignRefiner": REFINER_RULES,
}


def rename(model_name: str, name: str) -> list[str]:
    """Returns the names here of the original parameter `name`: one, one per part of a fused projection, or none.

    Raises:
        ValueError: if no rule of `model_name` matches `name`.
    """
    for pattern, replacement in RULES[model_name]:
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(part) for part in replacement.split("|") if part]
    raise ValueError(f"`{name}` is not a parameter of the original {model_name}")


def convert_state_dict(model_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames and splits an original state dict into the layout of this package's model class.

    Args:
        model_name: class name, a key of `RULES`.
        state_dict: parameters in the original layout; tensors of any dtype, not copied except where fused.

    Returns:
        The state dict that `load_state_dict(strict=True)` of the model class takes.

    Raises:
        ValueError: if a name is unknown; all unknown names are listed.
    """
    unknown: list[str] = []
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        try:
            targets = rename(model_name, name)
        except ValueError:
            unknown.append(name)
            continue
        parts = tensor.chunk(len(targets), dim=0) if len(targets) > 1 else [tensor]
        converted.update(zip(targets, parts))
    if unknown:
        raise ValueError(f"`state_dict` has names that are not parameters of the original {model_name}: {unknown}")
    return converted


def original_name(model_name: str, name: str) -> tuple[str, int]:
    """Inverts `rename`: returns the original parameter that `name` comes from, and the index of its part.

    Args:
        model_name: class name, a key of `RULES`.
        name: a parameter of this package's model.

    Returns:
        The original name, and the index of the part if the original is a fused projection, else 0.

    Raises:
        ValueError: if no rule of `model_name` gives `name`.
    """
    for pattern, replacement in RULES[model_name]:
        pieces = re.split(r"(\([^()]*\))", pattern)
        groups = pieces[1::2]
        template = "".join(rf"\{i // 2 + 1}" if i % 2 else piece.replace(r"\.", ".") for i, piece in enumerate(pieces))
        for part, target in enumerate(replacement.split("|")):
            # Groups by name, since they may come in another order than in the pattern.
            target_pattern = re.escape(target)
            for i, group in enumerate(groups, start=1):
                target_pattern = target_pattern.replace(rf"\\{i}", f"(?P<g{i}>{group[1:-1]})")
            match = re.fullmatch(target_pattern, name)
            if match:
                original = template
                for i in range(1, len(groups) + 1):
                    original = original.replace(rf"\{i}", match[f"g{i}"])
                if name in rename(model_name, original):
                    return original, part
    raise ValueError(f"`{name}` does not come from a parameter of the original {model_name}")


def restore_state_dict(model_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverts `convert_state_dict`: returns parameters of this package in the original layout.

    Raises:
        ValueError: if a name does not come from an original parameter.
    """
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        original, part = original_name(model_name, name)
        parts.setdefault(original, {})[part] = tensor
    return {
        original: torch.cat([tensors[part] for part in sorted(tensors)]) if len(tensors) > 1 else tensors[0]
        for original, tensors in parts.items()
    }
