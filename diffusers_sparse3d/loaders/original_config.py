"""The published `config.yaml` and the configuration of this package's classes: the one table between them.

`config.yaml` has one entry per part of the pipeline, each with a `target`, whose last part names a class, and its
`params`. Parameters that an entry leaves out have the defaults of the published classes, which are not always ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import check_integer
from ..models.config_checks import check_configuration


class OriginalModel(NamedTuple):
    """Component of the pipeline that a model of `config.yaml` becomes, and the file of its parameters."""

    component: str
    file: str


MODEL_ENTRIES: dict[str, OriginalModel] = {
    "dense_vae": OriginalModel("dense_vae", "model_dense.ckpt"),
    "dense_dit": OriginalModel("dense_transformer", "model_dense.ckpt"),
    "sparse_vae_512": OriginalModel("vae", "model_sparse_512.ckpt"),
    "sparse_dit_512": OriginalModel("transformer", "model_sparse_512.ckpt"),
    "refiner": OriginalModel("refiner", "model_refiner.ckpt"),
    "sparse_vae_1024": OriginalModel("vae_1024", "model_sparse_1024.ckpt"),
    "sparse_dit_1024": OriginalModel("transformer_1024", "model_sparse_1024.ckpt"),
    "refiner_1024": OriginalModel("refiner_1024", "model_refiner_1024.ckpt"),
}
SCHEDULER_ENTRIES: dict[str, str] = {
    "dense_scheduler": "dense_scheduler",
    "sparse_scheduler_512": "scheduler",
    "sparse_scheduler_1024": "scheduler_1024",
}
IMAGE_ENCODER_ENTRIES = ("dense_image_encoder", "sparse_image_encoder")

# Class of a `target` -> class of this package.
MODEL_TARGETS: dict[str, str] = {
    "DenseShapeVAE": "DenseVAE",
    "DenseDiT": "DenseDiT",
    "SparseSDFVAE": "SparseVAE",
    "SparseDiT": "SparseDiT",
    "Voxel_RefinerXL": "SDFRefiner",
    "Voxel_RefinerXL_sign": "SDFSignRefiner",
}
# Class of this package -> the key of its parameters in a published file.
CHECKPOINT_KEYS: dict[str, str] = {
    "DenseVAE": "vae",
    "DenseDiT": "dit",
    "SparseVAE": "vae",
    "SparseDiT": "dit",
    "SDFRefiner": "refiner",
    "SDFSignRefiner": "refiner",
}

REQUIRED = object()
# Parameters that change how the published code runs and not its results.
RUNTIME_PARAMETERS = {"use_fp16", "use_checkpoint", "chunk_size", "infer_patch_size"}
_DIT_PARAMETERS: dict[str, tuple[str, Any]] = {
    "resolution": ("sample_size", REQUIRED),
    "in_channels": ("in_channels", REQUIRED),
    "out_channels": ("out_channels", REQUIRED),
    "num_blocks": ("num_layers", REQUIRED),
    "cond_channels": ("cross_attention_dim", REQUIRED),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "share_mod": ("share_mod", False),
    "qk_rms_norm": ("qk_norm", False),
    "qk_rms_norm_cross": ("qk_norm_cross", False),
}
_REFINER_PARAMETERS: dict[str, tuple[str, Any]] = {
    "in_channels": ("in_channels", 1),
    "out_channels": ("out_channels", 1),
    "layers_per_block": ("layers_per_block", 2),
    "layers_mid_block": ("mid_layers", 2),
    "patch_size": ("patch_size", 192),
    "res": ("sample_size", 512),
}
# Per class: original parameter -> (ours, the published default).
PARAMETERS: dict[str, dict[str, tuple[str, Any]]] = {
    "DenseVAE": {
        "in_channels": ("in_channels", 1),
        "out_channels": ("out_channels", 1),
        "embed_dim": ("latent_channels", REQUIRED),
        "model_channels_encoder": ("encoder_block_out_channels", (32, 128, 512)),
        "model_channels_decoder": ("decoder_block_out_channels", (512, 128, 32)),
        "num_res_blocks_encoder": ("layers_per_block", 2),
        "num_res_blocks_middle_encoder": ("mid_layers", 2),
        "num_res_blocks_decoder": ("decoder_layers_per_block", 2),
        "num_res_blocks_middle_decoder": ("decoder_mid_layers", 2),
        "latents_scale": ("scaling_factor", 1.0),
        "latents_shift": ("shift_factor", 0.0),
    },
    "DenseDiT": {**_DIT_PARAMETERS, "patch_size": ("patch_size", 2)},
    "SparseVAE": {
        "out_channels": ("out_channels", 1),
        "embed_dim": ("latent_channels", REQUIRED),
        "resolution": ("sample_size", 64),
        "model_channels_encoder": ("encoder_channels", 512),
        "num_blocks_encoder": ("encoder_layers", 4),
        "num_heads_encoder": ("encoder_heads", 8),
        "model_channels_decoder": ("decoder_channels", 512),
        "num_blocks_decoder": ("decoder_layers", 4),
        "num_heads_decoder": ("decoder_heads", 8),
        "latents_scale": ("scaling_factor", 1.0),
        "latents_shift": ("shift_factor", 0.0),
    },
    "SparseDiT": {
        **_DIT_PARAMETERS,
        "num_kv_heads": ("num_key_value_heads", 2),
        "compression_block_size": ("compression_block_size", 4),
        "selection_block_size": ("selection_block_size", 8),
        "topk": ("topk", 8),
        "compression_version": ("compression_version", "v2"),
        "sparse_conditions": ("sparse_conditioning", False),
        "factor": ("coord_scale", 1.0),
        "window_size": ("window_size", 8),
    },
    "SDFRefiner": _REFINER_PARAMETERS,
    "SDFSignRefiner": _REFINER_PARAMETERS,
}
# Parameters that are not copied but have a part in the configuration, or only one value that this package knows:
# with `use_shift: false` the published code shifts the windows of every block.
OTHER_PARAMETERS: dict[str, set[str]] = {
    "DenseVAE": set(),
    "DenseDiT": {"model_channels", "num_heads", "num_head_channels", "pe_mode", "latent_shape"},
    "SparseVAE": {"num_head_channels_encoder", "num_head_channels_decoder"},
    "SparseDiT": {"model_channels", "num_heads", "num_head_channels", "pe_mode", "use_shift"},
    "SDFRefiner": set(),
    "SDFSignRefiner": set(),
}
ONLY_VALUES = {"pe_mode": "ape", "use_shift": True}
# Parameters that may be null: as many key/value heads as heads, as many blocks in the decoder as in the encoder.
NULLABLE = ("num_key_value_heads", "decoder_layers_per_block", "decoder_mid_layers")
# Published group norms have 32 groups. A narrower model, which the published code cannot build, gets one per channel.
MAX_GROUPS = 32


def target_class(entry: Mapping[str, Any], name: str) -> str:
    """Returns the last part of the `target` of an entry of `config.yaml`; `name` is for the message.

    Raises:
        ValueError: if the entry has no `target`.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("target"), str):
        raise ValueError(f"Entry `{name}` of the original configuration has no `target`: {entry!r}")
    return entry["target"].rsplit(".", 1)[-1]


def entry_params(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the `params` of an entry of `config.yaml`, empty if it has none; `name` is for the message.

    Raises:
        ValueError: if they are no parameters by name.
    """
    params = entry.get("params") if isinstance(entry, Mapping) else entry
    if params is None and isinstance(entry, Mapping):
        return {}
    if not isinstance(params, Mapping) or not all(isinstance(key, str) for key in params):
        raise ValueError(f"`{name}` of the original configuration must have `params` by name, got {params!r:.100}")
    return dict(params)


def convert_config(
    model_name: str, params: Mapping[str, Any], state_dict: Mapping[str, Tensor], name: str | None = None
) -> dict[str, Any]:
    """Configuration of a model class of this package from the parameters of the published one.

    Args:
        model_name: class name, a key of `PARAMETERS`.
        params: the `params` of an entry of `config.yaml`.
        state_dict: the original parameters; what the published code has as constants comes from their shapes.
        name: of the entry, for messages.

    Raises:
        ValueError: if a parameter is missing, unknown, or has a value that this package has no counterpart of.
    """
    name = name or model_name
    table = PARAMETERS[model_name]
    unknown = [key for key in params if key not in {*table, *OTHER_PARAMETERS[model_name], *RUNTIME_PARAMETERS}]
    if unknown:
        raise ValueError(f"`{name}` of the original configuration has parameters that {model_name} lacks: {unknown}")
    for key, value in ONLY_VALUES.items():
        if params.get(key, value) != value:
            raise ValueError(f"`{name}` of the original configuration has {key}={params[key]!r}; only {value!r} works")
    config = {ours: params.get(original, default) for original, (ours, default) in table.items()}
    missing = [original for original, (ours, _) in table.items() if config[ours] is REQUIRED]
    if "DiT" in model_name and "model_channels" not in params:
        missing.append("model_channels")
    if missing:
        raise ValueError(f"`{name}` of the original configuration lacks {missing}")

    try:
        # A value that the class may leave out is None in the published configurations, too.
        check_configuration(config, [key for key, value in config.items() if value is None and key in NULLABLE])
    except ValueError as error:
        raise ValueError(f"`{name}` of the original configuration does not fit {model_name}: {error}") from error
    if "DiT" in model_name:
        width = check_integer(f"{name}.model_channels", params["model_channels"], 1)
        head_channels = check_integer(f"{name}.num_head_channels", params.get("num_head_channels", 64), 1)
        heads = width // head_channels if params.get("num_heads") is None else params["num_heads"]
        heads = check_integer(f"{name}.num_heads (or model_channels / num_head_channels)", heads, 1, width)
        config.update(num_attention_heads=heads, attention_head_dim=width // heads)
    if model_name == "SparseDiT":
        key_value_heads = config["num_key_value_heads"] or config["num_attention_heads"]
        config["norm_num_groups"] = min(MAX_GROUPS, key_value_heads * config["attention_head_dim"])
    elif model_name == "SparseVAE":
        config["norm_num_groups"] = min(MAX_GROUPS, config["encoder_channels"] // 16)
    elif "Refiner" in model_name:
        pattern = r"unet3d1\.down_blocks\.\d+\.resnets\.0\.conv1\.weight"
        channels = [tensor.shape[0] for key, tensor in state_dict.items() if re.fullmatch(pattern, key)]
        if channels:
            config["block_out_channels"] = channels
        feature_weight = state_dict.get("latent_mlp.net.0.weight")
        if model_name == "SDFRefiner" and feature_weight is not None:
            config["feature_mlp_dim"], config["feature_channels"] = feature_weight.shape
    return config


def model_config(
    original_config: Mapping[str, Any],
    model_name: str,
    state_dict: Mapping[str, Tensor],
    file: str | None = None,
    entry: str | None = None,
) -> dict[str, Any]:
    """Configuration of a model class of this package, from `config.yaml` or one entry of it; see [`find_entry`].

    Raises:
        ValueError: if there is no such entry or more than one, or if it does not fit; see [`convert_config`].
    """
    name = find_entry(original_config, model_name, file, entry)
    description = original_config if name is None else original_config[name]
    config = convert_config(model_name, entry_params(description, name or model_name), state_dict, name)
    if model_name == "DenseVAE" and "dense_dit" in original_config:
        # The published VAE works on any grid; its latents are those of the diffusion transformer.
        params = entry_params(original_config["dense_dit"], "dense_dit")
        latent_size = check_integer("dense_dit.resolution", params.get("resolution"), 1)
        config["sample_size"] = latent_size * 2 ** (len(config["encoder_block_out_channels"]) - 1)
    return config


def find_entry(
    original_config: Mapping[str, Any], model_name: str, file: str | None = None, entry: str | None = None
) -> str | None:
    """Returns the name of the entry of `config.yaml` that describes a model.

    Args:
        original_config: the whole `config.yaml`, or one entry (`target` and `params`): None is returned.
        model_name: class of this package.
        file: name of the checkpoint file that the model is in, which tells the entries of one class apart.
        entry: name of the entry, where the file name does not say it.

    Raises:
        ValueError: if there is no such entry, or more than one.
    """
    if "target" in original_config:
        target = target_class(original_config, "target")
        if MODEL_TARGETS.get(target) != model_name:
            raise ValueError(f"`original_config` describes {target}, not the original {model_name}")
        return None
    names = [
        name
        for name in original_config
        if name in MODEL_ENTRIES and MODEL_TARGETS.get(target_class(original_config[name], name)) == model_name
    ]
    if entry is not None:
        if entry not in names:
            raise ValueError(f"`original_entry` {entry!r} is not an entry for {model_name}; there are {names}")
        return entry
    if len(names) > 1:
        names = [name for name in names if MODEL_ENTRIES[name].file == file] or names
    if len(names) != 1:
        raise ValueError(
            f"`original_config` has {len(names)} entries for {model_name} ({names}): say which with `original_entry`"
            if names
            else f"`original_config` has no entry for {model_name}"
        )
    return names[0]
