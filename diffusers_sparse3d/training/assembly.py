"""Assembles trained parts to the folder of a pipeline.

    python training/assemble_pipeline.py --output outputs/small/pipeline --dtype float16 \\
        --image_encoder outputs/small/dit_dense/image_encoder \\
        --dense_vae outputs/small/vae_dense/vae --dense_dit outputs/small/dit_dense \\
        --vae outputs/small/vae_sparse/vae --sparse_dit outputs/small/dit_sparse \\
        --config default_num_inference_steps=15 default_guidance_scale=2.0

`--config` sets arguments of `Direct3DS2Pipeline`, among them the defaults of its calls.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import Dinov2WithRegistersModel

from .. import DenseDiT, DenseVAE, Direct3DS2Pipeline, SparseDiT, SparseVAE


def setting(text: str) -> tuple[str, Any]:
    """Parses an argument NAME=VALUE, with the value in YAML."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, yaml.safe_load(value)


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_encoder", type=Path, required=True)
    parser.add_argument("--dense_vae", type=Path, required=True)
    parser.add_argument("--dense_dit", type=Path, required=True, help="with the folders transformer and scheduler")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--sparse_dit", type=Path, required=True, help="with the folders transformer and scheduler")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the files")
    parser.add_argument("--config", type=setting, nargs="+", default=[], metavar="NAME=VALUE")
    return parser.parse_args(arguments)


def assemble(args: argparse.Namespace) -> None:
    """Loads the parts that `parse_arguments` names and saves the pipeline."""
    # Untyped, as diffusers' top level hides the types of its pipelines.
    pipeline: Any = Direct3DS2Pipeline(
        image_encoder=Dinov2WithRegistersModel.from_pretrained(args.image_encoder),
        dense_vae=DenseVAE.from_pretrained(args.dense_vae),
        dense_transformer=DenseDiT.from_pretrained(args.dense_dit / "transformer"),
        dense_scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(args.dense_dit / "scheduler"),
        vae=SparseVAE.from_pretrained(args.vae),
        transformer=SparseDiT.from_pretrained(args.sparse_dit / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(args.sparse_dit / "scheduler"),
        **dict(args.config),
    )
    pipeline.to(getattr(torch, args.dtype)).save_pretrained(args.output)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `assemble`."""
    assemble(parse_arguments(arguments, prog))
