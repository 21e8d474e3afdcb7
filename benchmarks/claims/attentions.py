"""
Claim 4: Spatial Sparse Attention beside full attention, windows and one-dimensional sparse attention in the sparse
stage, at equal minutes.

    python -m benchmarks.claims.attentions --data data/small --vae outputs/small/vae_sparse/vae \\
        --image_encoder outputs/small/dit_dense/image_encoder --minutes 1 --seeds 0 \\
        --json benchmarks/results/claims_attentions.json --plot docs/claims_attentions.png

The same SparseDiT is trained with each attention on the same latents and images, with the same optimizer, batches,
noise and minutes of one GPU. At a quarter, a half and the end, latents of validation images are sampled in the true
cells with the averaged weights, decoded, and compared with the decoded true latents: F1 and the mean angle between
normals. The validation loss is that of the flow. Rows that the file of `--json` has are kept.

- `ssa`: compression, selection and windows of cubes, with a gate (arXiv 2505.17412, section 3.3).
- `full`: among all tokens of a shape, by PyTorch's fastest kernel.
- `window`: in shifted windows of 8^3 cells.
- `nsa_1d`: the parameters and kernels of `ssa` on runs of tokens in raster order, with as many tokens in a block.

`full` and `window` lack the few parameters of compression and gate. With some two thousand tokens of a shape at 256^3,
full attention is cheap, and a step is the slowest with SSA: what SSA saves shows at higher resolutions
(benchmarks/ssa.py). The settings are those that the project trains SSA with, which favours `ssa`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.claims.comparison import Comparison
from benchmarks.claims.line_attention import use_line_attention
from benchmarks.claims.timed_training import TimedTrainer, add_options, compare_trainings, training_options
from benchmarks.result_files import parse_arguments
from diffusers_sparse3d import SparseDiT
from diffusers_sparse3d.training import dit
from diffusers_sparse3d.training.batches import pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.distributed import autocast, make_accelerator
from diffusers_sparse3d.training.evaluation.shapes import to_shape
from diffusers_sparse3d.training.sampler import make_keys


MODELS = ("ssa", "full", "window", "nsa_1d")
MODEL = {
    "num_layers": 6,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "num_key_value_heads": 2,
    "compression_block_size": 4,
    "selection_block_size": 4,
    "topk": 8,
    "window_size": 8,
    "compression_version": "v1",
    "qk_norm": True,
    "qk_norm_cross": True,
    "share_mod": True,
}
TINY_MODEL = MODEL | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_key_value_heads": 1}
SAMPLING_STEPS = 15
# Shapes that are sampled at a time.
SAMPLING_BATCH = 8


def make_transformer(name: str, **sizes: Any) -> SparseDiT:
    """A new transformer with one of the attentions."""
    transformer = SparseDiT(attention_type="ssa" if name == "nsa_1d" else name, **sizes)
    if name == "nsa_1d":
        use_line_attention(transformer)
    return transformer


def make_trainer(args: argparse.Namespace, name: str, seed: int, folder: str) -> TimedTrainer:
    """The trainer of a transformer; batches, order and noise are the same for all."""
    encoder_size = {"image_size": args.image_size} if args.image_size else {}
    encoder_size |= {"num_hidden_layers": args.encoder_layers} if args.encoder_layers else {}
    options: dict[str, Any] = {
        **training_options(args, seed, folder),
        "stage": "sparse",
        "vae": str(args.vae),
        "image_encoder": str(args.image_encoder),
        "image_encoder_model": encoder_size,
        "cache_dir": str(args.cache_dir or Path(args.data, "images")),
        "latents_dir": args.latents_dir and str(args.latents_dir),
        "resolution": args.resolution,
        "optimizer": args.optimizer,
        "learning_rate": 1e-3,
        "muon_learning_rate": 2e-3,
        "conditioning_dropout": 0.1,
        "face_camera": True,
        "sample_posterior": False,
        "shift": 3.0,
        "guidance_scale": 1.0,
        "num_inference_steps": 2 if args.tiny else SAMPLING_STEPS,
    }
    config = build_config(dit.DiTConfig, options)
    accelerator = make_accelerator(config)
    width = AutoConfig.from_pretrained(args.image_encoder).hidden_size
    channels = dit.SparseVAE.load_config(args.vae)["latent_channels"]
    sizes = {"sample_size": args.resolution // 8, "in_channels": channels, "cross_attention_dim": width}
    transformer = make_transformer(name, **(TINY_MODEL if args.tiny else MODEL), **sizes)
    trainer = dit.make_trainer(config, accelerator, transformer, TimedTrainer)
    assert isinstance(trainer, TimedTrainer)
    return trainer


def measure(args: argparse.Namespace, trainer: TimedTrainer) -> dict[str, Any]:
    """The comparisons of sampled shapes with the decoded true latents, to be run later."""
    task: Any = trainer.task
    dataset: Any = trainer.validation and trainer.validation.dataset
    device, vae = trainer.accelerator.device, task.vae
    keys = make_keys([(index, args.resolution) for index in range(min(args.val_shapes, len(dataset)))], 0, 0)
    comparisons = []
    for start in range(0, len(keys), SAMPLING_BATCH):
        batch = pack([dataset[key] for key in keys[start : start + SAMPLING_BATCH]])
        batch = {name: value.to(device) for name, value in batch.items()}
        mean, coords = batch["mean"].float(), batch["coords"]
        with autocast(trainer.accelerator):
            found = [
                vae.decode(latents, coords) for latents in (task.sample(batch["image"], mean.shape, coords), mean)
            ]
        for index in range(len(batch["image"])):
            shapes = []
            for decoded in found:
                rows = decoded.coords[:, 0] == index
                shapes.append(to_shape(decoded.sample[rows].float(), decoded.coords[rows], args.resolution, 0.0))
            prediction, reference = shapes
            comparisons.append(Comparison(prediction, reference, args.num_samples))
    return {"comparisons": comparisons}


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    last = row["points"][-1]
    return (
        f"{row['model']:>7} {row['seed']:4} {row['parameters'] / 1e6:6.2f} M {row['steps']:6} steps"
        f" {row['milliseconds']:7.1f} ms  loss {last['losses']['loss']:.4f}  F1(0.01) {last['f1_0.01']:.3f}"
        f"  F1(0.05) {last['f1_0.05']:.3f}  normals {last['normal_error']:.1f} deg"
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, MODELS)
    parser.add_argument("--vae", type=Path, required=True, help="folder of a trained SparseVAE")
    parser.add_argument("--image_encoder", required=True, help="folder or hub id of a DINOv2")
    parser.add_argument("--encoder_layers", type=int, help="layers of it that are used; by default all")
    parser.add_argument("--image_size", type=int, help="edge of its images; by default its own")
    parser.add_argument("--cache_dir", type=Path, help="folder of prepared images; by default images in --data")
    parser.add_argument("--latents_dir", type=Path, help="folder of cached latents; by default beside --vae")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="default: %(default)s")
    parser.set_defaults(batch_size=20)
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train with all attentions and seeds, and write the report."""
    panels = {"loss": "validation loss", "f1_0.01": "F1(0.01)", "normal_error": "normal error, degrees"}
    return compare_trainings(args, make_trainer, measure, describe, panels)


if __name__ == "__main__":
    main(parse_args())
