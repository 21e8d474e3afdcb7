"""Assembles trained parts, and parts of an existing pipeline, to the folder of a pipeline.

    python training/assemble_pipeline.py --output outputs/small/pipeline --dtype float16 \\
        --image_encoder outputs/small/dit_dense/image_encoder \\
        --dense_vae outputs/small/vae_dense/vae --dense_dit outputs/small/dit_dense \\
        --vae outputs/small/vae_sparse/vae --sparse_dit outputs/small/dit_sparse \\
        --config default_num_inference_steps=15 default_guidance_scale=2.0

With `--base`, what is not given is that of an existing pipeline, its settings too:

    python training/assemble_pipeline.py --base checkpoints/direct3d-s2-small --output outputs/large \\
        --vae_1024 outputs/vae_1024/vae --sparse_dit_1024 outputs/dit_1024

`--config` sets arguments of `Direct3DS2Pipeline`, among them the defaults of its calls.
"""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from .. import DenseDiT, DenseVAE, Direct3DS2Pipeline, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE
from ..command_parser import CommandParser
from .image_encoder import load_pretrained_encoder


def setting(text: str) -> tuple[str, Any]:
    """Parses an argument NAME=VALUE, with the value in YAML."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, yaml.safe_load(value)


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline to write")
    parser.add_argument("--base", metavar="PIPELINE", help="folder or hub id of a pipeline, for the parts not given")
    parts = parser.add_argument_group("parts", "Folders of trained parts; without --base, the first five are needed.")
    parts.add_argument("--image_encoder", type=Path)
    parts.add_argument("--dense_vae", type=Path)
    parts.add_argument("--dense_dit", type=Path, help="with the folders transformer and scheduler")
    parts.add_argument("--vae", type=Path)
    parts.add_argument("--sparse_dit", type=Path, help="likewise")
    parts.add_argument("--refiner", type=Path, help="SDFRefiner of the first sparse stage")
    parts.add_argument("--vae_1024", type=Path, help="VAE of the second sparse stage")
    parts.add_argument(
        "--sparse_dit_1024", type=Path, help="of the second sparse stage, with transformer and scheduler"
    )
    parts.add_argument("--refiner_1024", type=Path, help="SDFSignRefiner of the second sparse stage")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the files")
    parser.add_argument("--config", type=setting, nargs="+", default=[], metavar="NAME=VALUE")
    return parser.parse_args(arguments)


def load_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the components of a pipeline that the arguments give, by name; pickled files are not read."""
    models = {
        "dense_vae": (DenseVAE, args.dense_vae),
        "dense_transformer": (DenseDiT, args.dense_dit and args.dense_dit / "transformer"),
        "vae": (SparseVAE, args.vae),
        "transformer": (SparseDiT, args.sparse_dit and args.sparse_dit / "transformer"),
        "refiner": (SDFRefiner, args.refiner),
        "vae_1024": (SparseVAE, args.vae_1024),
        "transformer_1024": (SparseDiT, args.sparse_dit_1024 and args.sparse_dit_1024 / "transformer"),
        "refiner_1024": (SDFSignRefiner, args.refiner_1024),
    }
    parts: dict[str, Any] = {
        name: model.from_pretrained(folder, use_safetensors=True) for name, (model, folder) in models.items() if folder
    }
    if args.image_encoder:
        parts["image_encoder"] = load_pretrained_encoder(str(args.image_encoder))
    folders = {
        "dense_scheduler": args.dense_dit,
        "scheduler": args.sparse_dit,
        "scheduler_1024": args.sparse_dit_1024,
    }
    for name, folder in folders.items():
        if folder:
            parts[name] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return parts


def check_parts(pipeline: Any) -> None:
    """Raises a ValueError unless the components of a pipeline fit each other."""
    stages = [("dense_vae", "dense_transformer"), ("vae", "transformer"), ("vae_1024", "transformer_1024")]
    width = pipeline.image_encoder.config.hidden_size
    for vae_name, name in stages:
        vae, transformer = getattr(pipeline, vae_name), getattr(pipeline, name)
        if (vae is None) != (transformer is None):
            raise ValueError(f"`{vae_name}` and `{name}` must be given together, got one of them")
        if transformer is None:
            continue
        if transformer.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"`{name}` must have {vae.config.latent_channels} channels, as the latents of `{vae_name}`, got"
                f" {transformer.config.in_channels}"
            )
        if transformer.config.cross_attention_dim != width:
            raise ValueError(
                f"`{name}` must have a cross_attention_dim of {width}, as `image_encoder`, got"
                f" {transformer.config.cross_attention_dim}"
            )
    if len(pipeline.resolutions) == 2 and pipeline.resolutions[1] <= pipeline.resolutions[0]:
        raise ValueError(
            f"`transformer_1024` must be of a higher resolution than `transformer`, {pipeline.resolutions[0]}, got"
            f" {pipeline.resolutions[1]}"
        )
    if pipeline.refiner_1024 is not None and pipeline.transformer_1024 is None:
        raise ValueError("`refiner_1024` must come with `transformer_1024`, got it alone")


def read_settings(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns settings of the pipeline as the types that it has them in.

    Raises:
        ValueError: for a name or a type that it does not have.
    """
    parameters = inspect.signature(Direct3DS2Pipeline.__init__).parameters
    types = {
        name: parameter.annotation for name, parameter in parameters.items() if parameter.annotation in (int, float)
    }
    settings = {}
    for name, value in pairs:
        if name not in types:
            raise ValueError(f"`config` must have names of {', '.join(types)}, got the unknown {name}")
        if isinstance(value, bool) or not isinstance(value, (int, types[name])):
            raise ValueError(f"`config` must have a number ({types[name].__name__}) for {name}, got {value!r}")
        settings[name] = types[name](value)
    return settings


def assemble(args: argparse.Namespace) -> None:
    """Loads the parts that `parse_arguments` names and saves the pipeline.

    Raises:
        ValueError: if a part or a setting is missing, unknown or does not fit the others.
    """
    if args.base is None:
        needed = ("image_encoder", "dense_vae", "dense_dit", "vae", "sparse_dit")
        if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
            raise ValueError(f"{', '.join(missing)} must be given, or `--base`, a pipeline that has them")
    parts, settings = load_parts(args), read_settings(args.config)
    # Untyped, as diffusers' top level hides the types of its pipelines.
    pipeline_class: Any = Direct3DS2Pipeline
    if args.base is None:
        pipeline = pipeline_class(**parts, **settings)
    else:
        pipeline = pipeline_class.from_pretrained(args.base, use_safetensors=True, **parts, **settings)
    check_parts(pipeline)
    pipeline.to(getattr(torch, args.dtype)).save_pretrained(args.output)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `assemble`."""
    assemble(parse_arguments(arguments, prog))
