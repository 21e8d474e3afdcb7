"""Makes a folder in the layout of the published Direct3D-S2 checkpoints, with random weights, to try things out on.

    python conversion/make_random_release.py --output DIR [--layout v1.0] [--tiny]

The sizes are the published ones, or with `--tiny` small enough for tests. Beside `config.yaml` and the
`.ckpt` files there is torch.hub's state dict of an image encoder, which the published folders do not have.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from ..models.embeddings import coordinate_embedding
from .convert import MODEL_CLASSES
from .original_config import (
    CHECKPOINT_KEYS,
    MODEL_ENTRIES,
    MODEL_TARGETS,
    model_config,
    target_class,
)
from .original_names import restore_state_dict


# What differs between the published versions: the attention and the conditioning of the sparse transformers.
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "v1.0": {
        "sparse_dit_512": {"compression_block_size": 4, "compression_version": "v2", "topk": 32},
        "sparse_dit_1024": {"compression_block_size": 4, "compression_version": "v2", "topk": 8},
        "both": {"sparse_conditions": True},
    },
    "v1.1": {
        "sparse_dit_512": {"compression_block_size": 8, "compression_version": "v1", "topk": 8},
        "sparse_dit_1024": {"compression_block_size": 8, "compression_version": "v1", "topk": 8},
        "both": {"sparse_conditions": False},
    },
}
IMAGE_ENCODER_FILE = "dinov2_vitl14_reg4_pretrain.pth"


def release_config(layout: str = "v1.1", tiny: bool = False) -> dict[str, dict[str, Any]]:
    """Returns the contents of `config.yaml` of a published version, or the same with small sizes.

    Args:
        layout: "v1.0" or "v1.1".
        tiny: 64^3 and 128^3 instead of 512^3 and 1024^3, two blocks, narrow.
    """
    latent_size, width, blocks, cond_channels = (2, 32, 2, 128) if tiny else (16, 1024, 24, 1024)
    dense_channels = ([4, 8, 8], [8, 8, 4]) if tiny else ([32, 128, 512], [512, 128, 64])
    dense_blocks = (1, 1, 2, 2) if tiny else (2, 2, 4, 4)
    vae_width, vae_heads, vae_blocks = (64, 2, 2) if tiny else (512, 8, 4)

    def sparse_vae(resolution: int) -> dict[str, Any]:
        return {
            "target": "direct3d_s2.models.autoencoders.ss_vae.SparseSDFVAE",
            "params": {
                "use_checkpoint": True,
                "embed_dim": 4 if tiny else 16,
                "num_head_channels_encoder": vae_width // vae_heads,
                "model_channels_encoder": vae_width,
                "num_heads_encoder": vae_heads,
                "num_blocks_encoder": vae_blocks,
                "num_head_channels_decoder": vae_width // vae_heads,
                "model_channels_decoder": vae_width,
                "num_heads_decoder": vae_heads,
                "num_blocks_decoder": vae_blocks,
                "resolution": resolution,
                "out_channels": 1,
                "use_fp16": True,
                "latents_scale": 1.0,
                "latents_shift": 0.0,
                "chunk_size": 4,
            },
        }

    def sparse_dit(entry: str, resolution: int, factor: float) -> dict[str, Any]:
        return {
            "target": "direct3d_s2.models.transformers.sparse_dit.SparseDiT",
            "params": {
                "resolution": resolution,
                "in_channels": 4 if tiny else 16,
                "out_channels": 4 if tiny else 16,
                "model_channels": width,
                "cond_channels": cond_channels,
                "num_blocks": blocks,
                "num_heads": 4 if tiny else 32,
                "num_kv_heads": 2,
                "selection_block_size": 8,
                **LAYOUTS[layout][entry],
                **LAYOUTS[layout]["both"],
                "pe_mode": "ape",
                "factor": factor,
                "qk_rms_norm": True,
                "use_shift": True,
                "use_checkpoint": True,
                "use_fp16": True,
            },
        }

    def refiner(class_name: str, patch_size: int) -> dict[str, Any]:
        layers = 1 if tiny else 2
        return {
            "target": f"direct3d_s2.models.refiner.unet_refiner.{class_name}",
            "params": {
                "in_channels": 1,
                "out_channels": 1,
                "layers_per_block": layers,
                "layers_mid_block": layers,
                "patch_size": patch_size,
                "use_fp16": True,
                **({"res": 64} if tiny else {}),
            },
        }

    def scheduler(shift: float) -> dict[str, Any]:
        return {
            "target": "diffusers.schedulers.FlowMatchEulerDiscreteScheduler",
            "params": {"num_train_timesteps": 1000, "shift": shift},
        }

    def image_encoder() -> dict[str, Any]:
        return {
            "target": "direct3d_s2.models.conditioner.DinoEncoder",
            "params": {
                "model": "facebookresearch/dinov2",
                "version": "dinov2_vitl14_reg",
                "size": 56 if tiny else 518,
            },
        }

    return {
        "dense_vae": {
            "target": "direct3d_s2.models.autoencoders.dense_vae.DenseShapeVAE",
            "params": {
                "use_checkpoint": True,
                "embed_dim": 2 if tiny else 8,
                "in_channels": 1,
                "out_channels": 1,
                "model_channels_encoder": dense_channels[0],
                "num_res_blocks_encoder": dense_blocks[0],
                "num_res_blocks_middle_encoder": dense_blocks[1],
                "model_channels_decoder": dense_channels[1],
                "num_res_blocks_decoder": dense_blocks[2],
                "num_res_blocks_middle_decoder": dense_blocks[3],
                "use_fp16": True,
                "latents_scale": 1.0,
                "latents_shift": 0.0,
            },
        },
        "dense_dit": {
            "target": "direct3d_s2.models.transformers.dense_dit.DenseDiT",
            "params": {
                "resolution": latent_size,
                "in_channels": 2 if tiny else 8,
                "out_channels": 2 if tiny else 8,
                "model_channels": width,
                "cond_channels": cond_channels,
                "num_blocks": blocks,
                "num_heads": 2 if tiny else 16,
                "mlp_ratio": 4,
                "patch_size": 1,
                "pe_mode": "ape",
                "qk_rms_norm": True,
                "use_checkpoint": True,
                "use_fp16": True,
                "latent_shape": [2 if tiny else 8, latent_size, latent_size, latent_size],
            },
        },
        "dense_image_encoder": image_encoder(),
        "dense_scheduler": scheduler(6.0),
        "sparse_vae_512": sparse_vae(4 * latent_size),
        "sparse_dit_512": sparse_dit("sparse_dit_512", 4 * latent_size, 1.0),
        "sparse_scheduler_512": scheduler(6.0),
        "sparse_vae_1024": sparse_vae(8 * latent_size),
        "sparse_dit_1024": sparse_dit("sparse_dit_1024", 8 * latent_size, 0.5),
        "sparse_scheduler_1024": scheduler(8.0),
        "sparse_image_encoder": image_encoder(),
        "refiner": refiner("Voxel_RefinerXL", 24 if tiny else 192),
        "refiner_1024": refiner("Voxel_RefinerXL_sign", 32 if tiny else 256),
    }


def random_parameters(state_dict: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random values for parameters in the original layout, whose shapes `state_dict` has; none is zero or one.

    Activations keep their size through layers with SiLU or GELU in between, so that no part of a model is without
    effect, and the decoded distances have both signs.
    """
    values = {}
    for name, tensor in state_dict.items():
        noise = torch.randn(tensor.shape, generator=generator)
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("weight", "kernel") and noise.ndim > 1:
            fan_in = math.prod(noise.shape[:-1] if leaf == "kernel" else noise.shape[1:])
            values[name] = noise.mul_(math.sqrt(2 / fan_in))
        else:
            values[name] = noise.mul_(0.1).add_(1.0 if leaf in ("weight", "gamma") else 0.0)
    return values


def random_state_dict(
    config: dict[str, dict[str, Any]], entry: str, model_name: str, tiny: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random parameters of one model of `config`, in the original layout."""
    ours = model_config(config, model_name, {}, entry=entry)
    if tiny and "Refiner" in model_name:
        ours["block_out_channels"] = [4, 4, 8, 8]
    if model_name == "SDFRefiner":
        ours["feature_channels"] = config["sparse_vae_512"]["params"]["model_channels_decoder"] // 16
    with torch.device("meta"):
        model = MODEL_CLASSES[model_name](**ours)
    state_dict = random_parameters(restore_state_dict(model_name, model.state_dict()), generator)
    if model_name == "SDFRefiner":
        # Its adaptive filters average values of both signs, which leaves little of them.
        state_dict["mid_conv.weight"] *= 100
        state_dict["conv_out.weight"] *= 100
    if model_name == "DenseDiT":
        axis = torch.arange(ours["sample_size"] // ours["patch_size"])
        width = config[entry]["params"]["model_channels"]
        state_dict["pos_emb"] = coordinate_embedding(torch.cartesian_prod(axis, axis, axis), width)
    return state_dict


def random_image_encoder(tiny: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random parameters of a DINOv2 with registers, in torch.hub's layout."""
    width, blocks, grid_size, patch_size = (128, 2, 4, 14) if tiny else (1024, 24, 37, 14)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid_size**2 + 1, width),
        "register_tokens": (1, 4, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(blocks):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
        shapes |= {f"blocks.{block}.{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
        for linear, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes[f"blocks.{block}.{linear}.weight"] = (outputs, inputs)
            shapes[f"blocks.{block}.{linear}.bias"] = (outputs,)
    shapes |= {f"norm.{leaf}": (width,) for leaf in ("weight", "bias")}
    return random_parameters({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, generator)


def make_release(output: str | os.PathLike, layout: str = "v1.1", tiny: bool = False, seed: int = 0) -> None:
    """
    Makes a release folder of random weights.

    Args:
        output: folder, made if it does not exist; files in it are replaced.
        layout: "v1.0" or "v1.1".
        tiny: small models instead of the published sizes.
        seed: of the random numbers.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    config = release_config(layout, tiny)
    (output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    for file in tqdm(dict.fromkeys(model.file for model in MODEL_ENTRIES.values()), unit="file"):
        checkpoint = {}
        for entry in (entry for entry, model in MODEL_ENTRIES.items() if model.file == file):
            model_name = MODEL_TARGETS[target_class(config[entry], entry)]
            checkpoint[CHECKPOINT_KEYS[model_name]] = random_state_dict(config, entry, model_name, tiny, generator)
        torch.save(checkpoint, output / file)
    torch.save(random_image_encoder(tiny, generator), output / IMAGE_ENCODER_FILE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of [`make_release`]."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="v1.1", help="published version; default: v1.1")
    parser.add_argument("--tiny", action="store_true", help="small models instead of the published sizes")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; default: 0")
    args = parser.parse_args(arguments)
    make_release(args.output, args.layout, args.tiny, args.seed)
