"""Trains a refiner of what a SparseVAE decodes: of the signed distances (SDFRefiner) or of the signs (SDFSignRefiner).

    accelerate launch training/train_refiner.py --config training/configs/published/refiner.yaml
    accelerate launch training/train_refiner.py --config training/configs/published/refiner_1024.yaml

The true volumes of a dataset are encoded and decoded by the frozen VAE, and the refiner learns to make the true one of
the decoded one, in one patch of each sample at a time. OUTPUT_DIR/refiner receives the averaged weights, and the logs
have the losses of the decoded volume as it is under `unrefined_...`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import SDFRefiner, SDFSignRefiner, SparseVAE
from ..geometry.sdf import narrow_band_width
from ..models.kernel_examples import refiner as refiner_example
from ..models.kernel_examples import sparse_autoencoder
from ..models.refiner_sdf import OUTSIDE, SIGN_DOWNSAMPLING
from ..ops.pooling import sparse_mean_pool
from ..sparse_tensor import CoordinateCache
from .balancing import make_schedule
from .batches import BlockDataset, encoder_input, expand_blocks, pack
from .configuration import TrainingConfig, check_choice, check_model_config, loading, parse_config
from .dataset import BLOCK_SIZE, open_splits
from .distributed import on_main_process
from .gradient_checkpointing import set_gradient_checkpointing
from .kernel_compilation import ModelExample, trained_examples
from .losses import Loss, whole_number
from .noise import Draw, batch_seeds, normal_like, uniform
from .phases import read_phases
from .pictures import picture_grid, sdf_reliefs
from .refiner_start import start_from_input
from .task import Task
from .trainer import Trainer, make_accelerator


logger = logging.getLogger(__name__)

# The sign of a refined distance is its logit times this: a tenth of the band is told apart.
SIGN_SHARPNESS = 10.0
REFINERS: dict[str, type[SDFRefiner] | type[SDFSignRefiner]] = {"distance": SDFRefiner, "sign": SDFSignRefiner}


@dataclass
class RefinerConfig(TrainingConfig):
    """Settings of the training of a refiner.

    Attributes:
        refiner: "distance" (SDFRefiner, for the first sparse stage) or "sign" (SDFSignRefiner, for the second).
        vae: Folder of the trained SparseVAE whose output is refined.
        model: Arguments of the refiner; with `pretrained`, those that are to be others.
        pretrained: Folder of a refiner to start from, instead of new weights.
        resolution: Samples per axis of the SDFs; 8 times the VAE's `sample_size` if not given.
        latent_noise: Deviation of the noise that is added to the normalised latents before they are decoded, so that
            the refiner sees volumes like those of generated latents.
        distance_scale: Factor from distances over tau to refined ones, which are cut off at 1. The pipeline takes the
            surface of a refined volume at twice the level, which this must be for both to be the same surface.
        sign_weight: Weight of the cross-entropy of the sign of refined distances, beside their squared error.
        start_from_input: Whether a new refiner of distances starts with weights that give back the decoded distances,
            rather than random ones; where a group of its finest norms has two channels, as by default.
    """

    refiner: str = "distance"
    vae: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    resolution: int | None = None
    latent_noise: float = 0.0
    distance_scale: float = 2.0
    sign_weight: float = 0.1
    start_from_input: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("refiner", self.refiner, tuple(REFINERS))
        if not self.vae:
            raise ValueError("`vae` must be the folder of the trained VAE, got nothing")
        if self.phases:
            raise ValueError("`phases` must be empty for a refiner, which has one resolution")
        if self.latent_noise < 0 or self.distance_scale <= 0 or self.sign_weight < 0:
            raise ValueError(
                "`latent_noise` and `sign_weight` must not be negative and `distance_scale` must be positive, got"
                f" {self.latent_noise}, {self.sign_weight} and {self.distance_scale}"
            )


@dataclass
class VolumePair:
    """A decoded volume and the true one in a window of each sample.

    Attributes:
        coords: Voxels `[N, 4]` int32 (sample, x, y, z), counted from the corners of the windows.
        decoded: Decoded distances over tau, `[N, 1]`.
        features: Features of the decoder, `[N, F]`.
        target: True distances over tau, `[N, 1]`; +1 and -1 outside of the narrow band.
    """

    coords: Tensor
    decoded: Tensor
    features: Tensor
    target: Tensor


class RefinerTask(Task):
    """A refiner with its losses on pairs of decoded and true volumes.

    Args:
        refiner: The refiner to train.
        vae: The frozen VAE.
        config: The configuration of the training.
    """

    vae: SparseVAE

    def __init__(self, refiner: SDFRefiner | SDFSignRefiner, vae: SparseVAE, config: RefinerConfig):
        super().__init__()
        self.refiner, self.config = refiner, config
        self.keep_frozen(vae=vae)
        self.of_distances = config.refiner == "distance"
        self.loss_weights = {"distance": 1.0, "sign": config.sign_weight} if self.of_distances else {"sign": 1.0}
        # Voxels of the decoded volume along the edge of a patch.
        self.window = refiner.config["patch_size"] * (1 if self.of_distances else SIGN_DOWNSAMPLING)

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the number of samples for each loss: the patches of all samples count alike."""
        samples = whole_number(len(batch["resolution"]), batch["coords"].device)
        return dict.fromkeys(self.loss_weights, samples)

    @torch.no_grad()
    def decode(self, batch: dict[str, Any]) -> VolumePair:
        """Returns what the VAE makes of a batch of blocks, beside the truth, in a random window of each sample."""
        coords, target, is_input, _ = expand_blocks(batch)
        seeds = batch_seeds(batch, len(batch["resolution"]), coords.device)
        encoded = self.vae.encode(*encoder_input(batch["coords"], target, is_input), check_inputs=False)
        latents = encoded.latent_dist.mode()
        noise = normal_like(latents, seeds, Draw.NOISE, batch["coords"]).to(latents.dtype)
        latents = latents + self.config.latent_noise / self.vae.config["scaling_factor"] * noise
        decoded = self.vae.decode(latents, batch["coords"], return_features=self.of_distances, check_inputs=False)
        corners = window_corners(batch["coords"], seeds, int(batch["resolution"][0]), self.window)
        local = coords[:, 1:] - corners[coords[:, 0].long()]
        rows = ((local >= 0) & (local < self.window)).all(dim=1).nonzero()[:, 0]
        features = decoded.features if self.of_distances else decoded.sample
        return VolumePair(
            torch.cat([coords[rows, :1], local[rows]], dim=1),
            decoded.sample[rows].float(),
            features[rows].float(),
            target[rows],
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, Loss]:
        """Returns the losses of a batch of M blocks: `coords` `[M, 4]`, `values` `[M, 512]` and `resolution` `[B]`."""
        pair, count = self.decode(batch), len(batch["resolution"])
        return self.distance_losses(pair, count) if self.of_distances else self.sign_losses(pair, count)

    def distance_losses(self, pair: VolumePair, count: int) -> dict[str, Loss]:
        """Returns the squared error of refined distances and the cross-entropy and errors of their signs."""
        refined = self.refine(pair, count)
        scale, outside = self.config.distance_scale, (pair.target > 0).float()
        target, unrefined = (scale * pair.target).clamp(-1, 1), (scale * pair.decoded).clamp(-1, 1)
        entropy = F.binary_cross_entropy_with_logits(SIGN_SHARPNESS * refined, outside, reduction="none")
        values = {
            "distance": (refined - target).square(),
            "sign": entropy,
            "sign_error": ((refined > 0) != (target > 0)).float(),
            "unrefined_distance": (unrefined - target).square(),
            "unrefined_sign_error": ((unrefined > 0) != (target > 0)).float(),
        }
        samples = pair.coords[:, 0].long()
        return {name: patch_loss(value[:, 0], samples, count) for name, value in values.items()}

    def refine(self, pair: VolumePair, count: int) -> Tensor:
        """Returns the refined distances `[N, 1]` at the voxels of the windows, in float32."""
        output = self.refiner.refine(
            pair.decoded,
            pair.coords,
            pair.features,
            resolution=self.window,
            patch_batch_size=count,
            check_inputs=False,
        )
        return output.sample.float()

    def sign_losses(self, pair: VolumePair, count: int) -> dict[str, Loss]:
        """Returns the cross-entropy and the errors of the sign where the pipeline asks for it.

        That is in the voxels without a distance, in the grid of half the resolution, which touch one with a distance.
        Without the refiner all of them are outside.
        """
        sample, asked, outside = sign_patches(pair, count, self.refiner.config["patch_size"])
        logits = self.refiner(sample).sample.float()
        places = asked.nonzero()[:, 0]
        logits, outside = logits[asked], outside[asked]
        entropy = F.binary_cross_entropy_with_logits(logits, outside.float(), reduction="none")
        values = {
            "sign": entropy,
            "sign_error": ((logits >= 0) != outside).float(),
            "unrefined_sign_error": (~outside).float(),
        }
        return {name: patch_loss(value, places, count) for name, value in values.items()}

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> Image.Image:
        """Draws the window of each sample: the true volume, the decoded and the refined one, from the front."""
        pair, resolution, count = self.decode(batch), int(batch["resolution"][0]), len(batch["resolution"])
        if self.of_distances:
            refined, coords = self.refine(pair, count) / self.config.distance_scale, pair.coords
        else:
            output = self.refiner.refine(pair.decoded, pair.coords, resolution=self.window, check_inputs=False)
            refined, coords = output.sample, output.coords
        # The band in units of the window's edge, whatever share of the volume it is.
        tau = narrow_band_width(resolution) * (resolution - 1) / (self.window - 1)
        volumes = [(pair.target, pair.coords), (pair.decoded, pair.coords), (refined, coords)]
        rows = []
        for index in range(count):
            parts = [(values[places[:, 0] == index], places[places[:, 0] == index, 1:]) for values, places in volumes]
            rows.append([sdf_reliefs(*part, self.window, tau, ("front",))[0] for part in parts])
        return picture_grid(rows, ["data", "decoded", "refined"])

    def kernel_examples(self, validates: bool) -> list[ModelExample]:
        """Returns the refinement of a patch, and what the VAE makes of a sample."""
        samples = min(2, self.config.batch_size)
        decode = partial(sparse_autoencoder, self.vae, samples)
        refine = partial(refiner_example, self.refiner, self.of_distances)
        examples = trained_examples("refiner", self.refiner, refine, (), validates)
        return [*examples, ModelExample("autoencoder", self.vae, decode, (samples,))]

    def models(self) -> dict[str, Any]:
        """Returns the refiner."""
        return {"refiner": self.refiner}


def window_corners(blocks: Tensor, seeds: Tensor, resolution: int, size: int) -> Tensor:
    """Returns the corners of random windows of a batch, `[B, 3]` int32, multiples of 8, each around a block.

    Args:
        blocks: Blocks of all samples, `[M, 4]` int32, sample by sample.
        seeds: Seeds of the samples, `[B]`.
        resolution: Samples per axis of the volume.
        size: Edge of the windows in samples.
    """
    counts = torch.bincount(blocks[:, 0], minlength=len(seeds))
    picked = counts.cumsum(0) - counts + (uniform(seeds, Draw.PATCH)[:, 0] * counts).long()
    centers = BLOCK_SIZE * blocks[picked, 1:] + BLOCK_SIZE // 2
    corners = (centers - size // 2).clamp(0, max(0, resolution - size))
    return corners // BLOCK_SIZE * BLOCK_SIZE


def sign_patches(pair: VolumePair, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the patches that the sign refiner sees, and what it is asked for.

    Args:
        pair: The volumes in windows of twice the size.
        count: Number of samples B.
        size: Edge of a patch.

    Returns:
        sample `[B, 1, size, size, size]` as `SDFSignRefiner.refine` makes it; asked, bool: voxels without a distance
        that touch one with a distance and lie on one side of the surface beyond doubt; outside, bool: on which.
    """
    cache = CoordinateCache(pair.coords, count)
    coarse, _ = cache.downsample(SIGN_DOWNSAMPLING)
    places = coarse.coords.long().unbind(1)
    batch, x, y, z = places
    sample = pair.decoded.new_full((count, 1, size, size, size), OUTSIDE)
    sample[batch, :, x, y, z] = sparse_mean_pool(pair.decoded, cache, SIGN_DOWNSAMPLING)
    signs = sparse_mean_pool(pair.target.sign(), cache, SIGN_DOWNSAMPLING, exact_mean=True)
    known, certain = torch.zeros_like(sample), torch.zeros_like(sample)
    known[batch, :, x, y, z] = 1
    # A voxel of half the resolution is on one side where all of its eight are.
    certain[batch, :, x, y, z] = signs * (signs.abs() == 1)
    touches, outside, inside = (F.max_pool3d(grid, 3, stride=1, padding=1) > 0 for grid in (known, certain, -certain))
    return sample, touches & (known == 0) & (outside ^ inside), outside


def patch_loss(values: Tensor, samples: Tensor, count: int) -> Loss:
    """Returns the loss over patches, of each the mean over its values; values `[N]` of samples `[N]`."""
    totals = values.new_zeros(count).index_add(0, samples, values)
    numbers = values.new_zeros(count).index_add(0, samples, torch.ones_like(values))
    return Loss((totals / numbers.clamp(min=1)).sum(), whole_number(count, values.device))


def load_refiner(config: RefinerConfig) -> SDFRefiner | SDFSignRefiner:
    """Returns the refiner of a configuration, with pretrained weights or new ones."""
    model_class = REFINERS[config.refiner]
    check_model_config(model_class, config.model)
    if config.pretrained:
        # Never a pickle: weights may come from a stranger.
        with loading("pretrained", config.pretrained):
            return model_class.from_pretrained(config.pretrained, use_safetensors=True, **config.model)
    refiner = model_class(**config.model)
    wanted = config.start_from_input and isinstance(refiner, SDFRefiner)
    if wanted and not start_from_input(refiner, config.distance_scale):
        logger.warning(
            "The refiner starts with random weights: `start_from_input` needs the first of"
            " `model.block_out_channels` to be twice `model.norm_num_groups`."
        )
    return refiner


def train(config: RefinerConfig) -> None:
    """Trains the refiner of a configuration and saves it in OUTPUT_DIR/refiner."""
    accelerator = make_accelerator(config)
    refiner = load_refiner(config)
    with loading("vae", config.vae):
        vae = SparseVAE.from_pretrained(config.vae, use_safetensors=True)
    features = vae.config["decoder_channels"] // 16
    if config.refiner == "distance" and refiner.config["feature_channels"] != features:
        raise ValueError(
            f"`model.feature_channels` must be {features}, the features of the VAE's decoder, got"
            f" {refiner.config['feature_channels']}"
        )
    set_gradient_checkpointing(refiner, config)
    resolution = config.resolution or vae.spatial_compression_ratio * vae.config["sample_size"]
    phases = read_phases(config, [resolution])
    counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
    splits = open_splits(config, resolution)
    data = splits["train"]
    schedule = make_schedule(phases, data.num_blocks, data.ids, config.seed, *counts)
    validation_schedule = None
    if validation := splits.get("val"):
        validation_schedule = make_schedule(phases, validation.num_blocks, validation.ids, config.seed)
    task = RefinerTask(refiner, vae, config)
    trainer = Trainer(
        config,
        accelerator,
        task,
        BlockDataset(data),
        pack,
        schedule,
        None if validation is None else BlockDataset(validation),
        validation_schedule,
    )
    trainer.train()
    trainer.finish(lambda: on_main_process(accelerator, lambda: task.save_pretrained(Path(config.output_dir))))
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `train`."""
    train(parse_config(RefinerConfig, __doc__, arguments, prog))
