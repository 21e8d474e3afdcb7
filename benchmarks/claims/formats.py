"""
Claim 2: one sparse format in the autoencoder gives faster and steadier training than rivals at equal minutes.

    python -m benchmarks.claims.formats --data data/small --json benchmarks/results/claims_formats.json \\
        --plot docs/claims_formats.png

Three autoencoders of about the same number of parameters are trained on the same shapes with the same loss, optimizer,
batches, precision and minutes of one GPU:

- `sparse`: SparseVAE, signed distances of the narrow band in and out.
- `mixed`: points on the surface with normals, pooled to the latents of SparseVAE's cells; SparseVAE's decoder.
- `vector_set`: points with normals to a set of latents without places; distances at query points.

At a quarter, a half and the end of the minutes, shapes of the validation split are reconstructed with the averaged
weights and compared with the surface of their own signed distances: F1, L1 Chamfer distance and normal error.
Every file of `--json` may be filled in several runs: rows that it has are kept.

In favour of the rivals: both take exact points and normals from the same distances, not features seen by cameras;
`mixed` has SparseVAE's decoder and no rendering losses, which TRELLIS needs; `vector_set` is asked only in the cells
near the true surface, which the latents of the others carry and its own do not. In favour of `sparse`: the loss is
that of its paper, and its settings are the project's own; those of the rivals have had no search. `vector_set` trains
at some of the samples of a shape in each step, as is usual, and with a lower learning rate, as published.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.comparison import Comparison
from benchmarks.claims.mixed_format_vae import MixedFormatVAE
from benchmarks.claims.surface_points import SurfacePoints, draw, surface_points
from benchmarks.claims.timed_training import TimedTrainer, add_options, compare_trainings, training_options
from benchmarks.claims.vector_set_vae import VectorSetVAE
from benchmarks.result_files import parse_arguments
from diffusers_sparse3d import SparseVAE
from diffusers_sparse3d.models.outputs import SparseGaussianDistribution
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from diffusers_sparse3d.training.balancing import make_schedule
from diffusers_sparse3d.training.batches import BlockDataset, expand_blocks, pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.distributed import autocast, make_accelerator
from diffusers_sparse3d.training.evaluation.shapes import Shape, dataset_mesh, to_shape
from diffusers_sparse3d.training.losses import Loss, mean_loss, sparse_sdf_losses
from diffusers_sparse3d.training.phases import read_phases
from diffusers_sparse3d.training.sparse_vae import SparseVAEConfig, SparseVAETask


MODELS = ("sparse", "mixed", "vector_set")
# Points that the rivals see of a shape in a step, and samples that `vector_set` is asked for.
POINTS, SET_POINTS, QUERIES = 32_768, 8_192, 16_384
QUERY_CHUNK = 1 << 16
LEARNING_RATES = {"sparse": 5e-4, "mixed": 5e-4, "vector_set": 2e-4}
SPARSE = {
    "latent_channels": 8,
    "encoder_channels": 192,
    "encoder_layers": 2,
    "encoder_heads": 6,
    "decoder_channels": 256,
    "decoder_layers": 2,
    "decoder_heads": 8,
    "norm_num_groups": 4,
}
# The defaults of the rivals have as many parameters as SparseVAE.
SIZES: dict[str, dict[str, int]] = {"sparse": SPARSE, "mixed": {}, "vector_set": {}}
TINY: dict[str, dict[str, int]] = {
    "sparse": {
        "latent_channels": 4,
        "encoder_channels": 32,
        "encoder_layers": 1,
        "encoder_heads": 2,
        "decoder_channels": 32,
        "decoder_layers": 1,
        "decoder_heads": 2,
        "norm_num_groups": 2,
    },
    "mixed": {
        "latent_channels": 4,
        "encoder_channels": 32,
        "encoder_layers": 1,
        "encoder_heads": 2,
        "point_channels": 16,
        "decoder_channels": 32,
        "decoder_layers": 1,
        "decoder_heads": 2,
    },
    "vector_set": {"num_latents": 16, "channels": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1},
}


class FormatTask(SparseVAETask):
    """The loss of SparseVAE for an autoencoder of any of the formats."""

    vae: Any

    def forward(self, batch: dict[str, Any]) -> dict[str, Loss]:
        """Returns the losses of a batch, as of `SparseVAETask`; means over the samples that the model is asked for."""
        coords, target, is_input, is_sharp = expand_blocks(batch)
        posterior, sample, rows = self.reconstruct(batch, coords, target, is_input, training=True)
        if rows is not None:
            target, is_input, is_sharp = target[rows], is_input[rows], is_sharp[rows]
        counts = self.counts(batch)
        found = dict(zip(("input", "extra", "sharp"), sparse_sdf_losses(sample, target, is_input, is_sharp)))
        losses = {name: Loss(loss.mean * counts[name], counts[name]) for name, loss in found.items()}
        return {**losses, "kl": mean_loss(posterior.kl(), counts["kl"])}

    def reconstruct(
        self, batch: dict[str, Any], coords: Tensor, target: Tensor, is_input: Tensor, training: bool
    ) -> tuple[SparseGaussianDistribution, Tensor, Tensor | None]:
        """
        Encode and decode a batch.

        Args:
            batch: `coords [M, 4]`, `values [M, 512]`, `resolution [B]`.
            coords, target, is_input: of `expand_blocks`.
            training: draw latents from the posterior, and let `vector_set` decode some of the samples alone.

        Returns:
            The posterior; s / tau `[V, 1]`; and the rows of `coords` that these are, all in their order if None.
        """
        raise NotImplementedError

    def latents(self, posterior: SparseGaussianDistribution, training: bool) -> Tensor:
        """Latents drawn from the posterior in training, else its mean."""
        return posterior.sample() if training else posterior.mode()


class SparseTask(FormatTask):
    """SparseVAE."""

    def reconstruct(self, batch: Any, coords: Tensor, target: Tensor, is_input: Tensor, training: bool) -> Any:
        posterior = self.vae.encode(target[is_input], coords[is_input], check_inputs=False).latent_dist
        latents = self.latents(posterior, training)
        return posterior, self.vae.decode(latents, batch["coords"], check_inputs=False).sample, None


def draw_points(batch: dict[str, Any], count: int) -> SurfacePoints:
    """Points on the surface of each shape of a batch at random, the fields `[B, count, ...]`."""
    points = surface_points(batch["values"], batch["coords"], int(batch["resolution"][0]))
    return points.take(draw(points.samples, len(batch["resolution"]), count))


class MixedTask(FormatTask):
    """MixedFormatVAE."""

    def reconstruct(self, batch: Any, coords: Tensor, target: Tensor, is_input: Tensor, training: bool) -> Any:
        points = SurfacePoints(*(field.flatten(0, 1) for field in draw_points(batch, POINTS)))
        cache = CoordinateCache(batch["coords"], len(batch["resolution"]))
        posterior = self.vae.encode(points, cache)
        return posterior, self.vae.decode(self.latents(posterior, training), cache), None


class VectorSetTask(FormatTask):
    """VectorSetVAE."""

    def reconstruct(self, batch: Any, coords: Tensor, target: Tensor, is_input: Tensor, training: bool) -> Any:
        points = draw_points(batch, SET_POINTS)
        half = (int(batch["resolution"][0]) - 1) / 2
        posterior = self.vae.encode(points.places / half - 1, points.normals)
        tokens = self.vae.decode(self.latents(posterior, training))
        places, batch_size = coords[:, 1:] / half - 1, len(tokens)
        if training:
            rows = draw(coords[:, 0].long(), batch_size, QUERIES)
            return posterior, self.vae.query(tokens, places[rows]).view(-1, 1), rows.flatten()
        samples = []
        for index, own in enumerate(places.split(torch.bincount(coords[:, 0].long()).tolist())):
            parts = (self.vae.query(tokens[index : index + 1], part[None])[0] for part in own.split(QUERY_CHUNK))
            samples += list(parts)
        return posterior, torch.cat(samples)[:, None], None


TASKS: dict[str, type[FormatTask]] = {"sparse": SparseTask, "mixed": MixedTask, "vector_set": VectorSetTask}


def make_model(name: str, tiny: bool = False) -> Any:
    """A new autoencoder of one of the formats."""
    classes: dict[str, Any] = {"sparse": SparseVAE, "mixed": MixedFormatVAE, "vector_set": VectorSetVAE}
    return classes[name](**(TINY if tiny else SIZES)[name])


def make_trainer(args: argparse.Namespace, name: str, seed: int, folder: str) -> TimedTrainer:
    """The trainer of an autoencoder; batches, order and seeds are the same for all of them."""
    learning_rate = 3e-3 if args.tiny else LEARNING_RATES[name]
    options = {
        **training_options(args, seed, folder),
        "resolutions": [args.resolution],
        "learning_rate": learning_rate,
    }
    config = build_config(SparseVAEConfig, options)
    accelerator = make_accelerator(config)
    train, validation = (SparseSDFDataset(args.data, split, args.resolution) for split in ("train", "val"))
    phases = read_phases(config, config.resolutions)
    return TimedTrainer(
        config,
        accelerator,
        TASKS[name](make_model(name, args.tiny), config),
        BlockDataset(train),
        pack,
        make_schedule(phases, train.num_blocks, train.ids, seed),
        BlockDataset(validation),
        make_schedule(phases, validation.num_blocks, validation.ids, seed),
    )


def measure(args: argparse.Namespace, trainer: TimedTrainer) -> dict[str, Any]:
    """The comparisons of reconstructed shapes with their references, to be run later."""
    task: Any = trainer.task
    dataset: Any = trainer.validation and trainer.validation.dataset
    comparisons = []
    for index in range(min(args.val_shapes, len(dataset))):
        device = trainer.accelerator.device
        batch = {name: value.to(device) for name, value in pack([dataset[index, args.resolution]]).items()}
        coords, target, is_input, _ = expand_blocks(batch)
        with autocast(trainer.accelerator):
            _, sample, _ = task.reconstruct(batch, coords, target, is_input, training=False)
        name = dataset.data.ids[index]
        prediction = to_shape(sample.float(), coords, args.resolution, 0.0)
        reference: Shape = functools.partial(dataset_mesh, args.data, "val", name, args.resolution)
        comparisons.append(Comparison(prediction, reference, args.num_samples))
    return {"comparisons": comparisons}


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    last = row["points"][-1]
    return (
        f"{row['model']:>10} {row['seed']:4} {row['parameters'] / 1e6:7.2f} M {row['steps']:6} steps"
        f" {row['milliseconds']:7.1f} ms  loss {last['losses']['loss']:.4f}  F1(0.01) {last['f1_0.01']:.3f}"
        f"  Chamfer {last.get('chamfer_l1', float('nan')):.4f}  normals {last['normal_error']:.1f} deg"
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, MODELS)
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train all models and seeds, and write the report."""
    panels = {"f1_0.01": "F1(0.01)", "chamfer_l1": "L1 Chamfer distance", "loss": "validation loss"}
    return compare_trainings(args, make_trainer, measure, describe, panels)


if __name__ == "__main__":
    main(parse_args())
