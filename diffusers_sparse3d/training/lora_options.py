"""The command line of the fine-tuning of a pipeline, in the manner of diffusers' training scripts."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..command_parser import CommandParser
from ..loaders.lora import LORA_COMPONENTS
from .preparation.index import parse_up_axis


EXAMPLE = """example:
  accelerate launch training/train_lora.py --pretrained_model_name_or_path checkpoints/direct3d-s2-small \\
      --instance_data_dir meshes --output_dir outputs/style --components transformer dense_transformer \\
      --rank 16 --max_train_steps 500 --validation_image chair.png

  pipe.load_lora_weights("outputs/style")
"""
DEFAULT_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = CommandParser(
        prog=prog,
        description="LoRA, DoRA or full fine-tuning of a pipeline's transformers on a folder of meshes: one command"
        " prepares the meshes, trains, and writes weights that `pipe.load_lora_weights` takes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_data_options(parser.add_argument_group("data"))
    _add_adapter_options(parser.add_argument_group("adapter"))
    _add_training_options(parser.add_argument_group("training"))
    _add_optimizer_options(parser.add_argument_group("optimizer"))
    _add_output_options(parser.add_argument_group("checkpoints and logs"))
    _add_validation_options(parser.add_argument_group("validation"))
    _add_hub_options(parser.add_argument_group("hub"))
    args = parser.parse_args(arguments)
    for name in ("rank", "train_batch_size", "max_train_steps", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.full and (args.use_dora or args.use_rslora):
        parser.error("--full trains all weights: --use_dora and --use_rslora are of adapters")
    if args.validation_image is not None:
        for path in args.validation_image:
            if not path.is_file():
                parser.error(f"--validation_image must be files, got {str(path)!r}, which is none")
    return args


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, metavar="PIPELINE",
        help="folder or hub id of the pipeline to start from, for example checkpoints/direct3d-s2-small",
    )  # fmt: skip
    group.add_argument("--revision", help="branch, tag or commit of the pipeline on the hub")
    group.add_argument(
        "--components", nargs="+", choices=LORA_COMPONENTS, default=["transformer"], metavar="NAME",
        help="transformers to train, one after the other: `transformer` (the sparse stage: surface and detail),"
        " `dense_transformer` (which cells are occupied: the coarse shape), `transformer_1024` (the second sparse"
        " stage); default: transformer",
    )  # fmt: skip
    group.add_argument(
        "--full", action="store_true",
        help="train all weights of the transformers, not adapters; OUTPUT_DIR/pipeline receives a whole pipeline",
    )  # fmt: skip


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--instance_data_dir", type=Path, required=True, metavar="DIR",
        help="meshes to train on: a folder of meshes (glb, gltf, obj, off, ply, stl), a CSV index with the columns id"
        " and mesh, or a dataset that prepare_data.py wrote",
    )  # fmt: skip
    group.add_argument(
        "--instance_images_dir", type=Path, metavar="DIR",
        help="pictures of the meshes under their names (chair.glb: chair.png, .webp or .jpg), with alpha or a plain"
        " background, beside which each mesh is rendered",
    )  # fmt: skip
    group.add_argument(
        "--num_views", type=int, default=6, help="renders of each mesh; 0 if all have pictures; default: %(default)s"
    )
    group.add_argument(
        "--up_axis", type=parse_up_axis, nargs="+", default=[], metavar="[SOURCE=]AXIS",
        help="axis of the meshes that points up, for all or by the source in the index: x, y or z; default: y",
    )  # fmt: skip
    group.add_argument(
        "--num_validation_meshes", type=int,
        help="meshes to hold back for validation, if the index has no split; default: one in ten",
    )  # fmt: skip
    group.add_argument(
        "--face_camera", action=argparse.BooleanOptionalAction, default=True,
        help="turn shapes by the multiple of 90 degrees that brings their front nearest to the camera; the published"
        " pipeline was trained without; default: yes",
    )  # fmt: skip
    group.add_argument(
        "--shapes_per_mesh", type=int,
        help="shapes made of each mesh, which face their cameras exactly, as `prepare --augment` makes them, neither"
        " stretched nor bent; 0: the mesh as it stands. Default: 4 for a pipeline whose dense stage is pixel-aligned,"
        " as that of the small one, unless there are pictures of the meshes, whose cameras nobody knows; else 0",
    )  # fmt: skip
    group.add_argument("--mirror", action="store_true", help="mirror half of the samples, shape and picture")
    group.add_argument(
        "--color_jitter", type=float, default=0.0,
        help="change brightness, contrast and saturation of the pictures by up to this share; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--preparation_workers",
        type=int,
        default=os.cpu_count(),
        help="processes of the preparation; 0: this one, no timeout; default: one for each core",
    )
    group.add_argument("--preparation_timeout", type=float, default=600, help="seconds per mesh; default: %(default)s")


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices; default: %(default)s")
    group.add_argument(
        "--lora_alpha", type=float, help="the adapter is weighted with lora_alpha / rank; default: the rank"
    )
    group.add_argument("--lora_dropout", type=float, default=0.0, help="dropout before the adapter; default: 0")
    group.add_argument(
        "--lora_layers", nargs="+", default=list(DEFAULT_LAYERS), metavar="NAME",
        help="linear layers with an adapter, by the end of their names; the MLPs are ff.net.0.proj and ff.net.2;"
        f" default: {' '.join(DEFAULT_LAYERS)}",
    )  # fmt: skip
    group.add_argument("--use_dora", action="store_true", help="DoRA: train the magnitudes of the weights too")
    group.add_argument("--use_rslora", action="store_true", help="weight with lora_alpha / sqrt(rank) instead")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, default=0, help="of adapters, order and noise; default: %(default)s")
    group.add_argument(
        "--train_batch_size", type=int, default=4, help="samples per process and forward pass; default: %(default)s"
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        help="forward passes per step; default: the launcher's, or 1",
    )
    group.add_argument(
        "--max_tokens", type=int, help="largest number of tokens of a batch of a sparse stage; default: no limit"
    )
    group.add_argument(
        "--max_train_steps", type=int, default=500, help="optimizer steps of each transformer; default: %(default)s"
    )
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="compute activations again, to save memory"
    )
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: the launcher's, or no")
    group.add_argument(
        "--conditioning_dropout", type=float, default=0.1,
        help="share of samples without their picture, for classifier-free guidance; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--weighting_scheme", choices=("logit_normal", "uniform"), default="logit_normal",
        help="distribution of the noise levels, before the shift of the stage's scheduler; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--ema_decay", type=float, default=0.99,
        help="decay of the average of the trained weights, which is what is saved; 0: none; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--dataloader_num_workers", type=int, default=2, help="data-loading processes; default: %(default)s"
    )
    group.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


def _add_optimizer_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--learning_rate", type=float, default=1e-4, help="peak; default: %(default)s")
    group.add_argument("--lr_scheduler", choices=("constant", "cosine"), default="constant", help="default: constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="steps of linear rise; default: %(default)s")
    group.add_argument(
        "--optimizer", choices=("adamw", "adamw_8bit"), default="adamw",
        help="adamw_8bit keeps moments of 8 bits and needs bitsandbytes; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--use_8bit_adam", action="store_const", const="adamw_8bit", dest="optimizer", help="the same as adamw_8bit"
    )
    group.add_argument("--adam_beta1", type=float, default=0.9, help="default: %(default)s")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="default: %(default)s")
    group.add_argument("--adam_weight_decay", type=float, default=1e-4, help="default: %(default)s")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="default: %(default)s")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="default: %(default)s")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR",
        help="receives pytorch_lora_weights.safetensors, a model card, and checkpoints, logs and pictures in a folder"
        " for each transformer",
    )  # fmt: skip
    group.add_argument("--checkpointing_steps", type=int, help="steps between checkpoints; default: one at the end")
    group.add_argument(
        "--checkpoints_total_limit", type=int, default=2, help="checkpoints that are kept; default: %(default)s"
    )
    group.add_argument(
        "--resume_from_checkpoint",
        help='"latest", or the folder of a checkpoint of one transformer; finished ones are not trained again',
    )
    group.add_argument(
        "--report_to", nargs="+", choices=("tensorboard", "wandb", "trackio", "none"), default=["tensorboard"],
        help="where losses and pictures go, through Accelerate's trackers; OUTPUT_DIR/TRANSFORMER/logs always has them"
        " for TensorBoard; default: tensorboard",
    )  # fmt: skip
    group.add_argument(
        "--tracker_project_name", default="direct3d-s2-lora", help="project of the trackers; default: %(default)s"
    )
    group.add_argument("--logging_steps", type=int, default=10, help="steps between entries; default: %(default)s")


def _add_validation_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--validation_steps", type=int,
        help="steps between validations: losses and pictures of the meshes held back, and meshes of the validation"
        " images; default: one at the end",
    )  # fmt: skip
    group.add_argument(
        "--validation_image", type=Path, nargs="+", metavar="FILE",
        help="pictures of objects, of which the whole pipeline makes meshes, in OUTPUT_DIR/TRANSFORMER/meshes",
    )  # fmt: skip
    group.add_argument(
        "--num_pictures", type=int, default=4, help="meshes held back in a picture; default: %(default)s"
    )


def _add_hub_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--push_to_hub", action="store_true", help="upload the result when training is done")
    group.add_argument("--hub_model_id", help="repository; default: the name of OUTPUT_DIR")
    group.add_argument("--hub_private_repo", action="store_true", help="make the repository private, if it is new")
    group.add_argument("--hub_token", help="default: the one that `hf auth login` stored")
