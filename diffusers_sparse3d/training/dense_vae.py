"""Trains a DenseVAE, which compresses the occupancy grid of the dense stage, on a prepared dataset.

    accelerate launch training/train_dense_vae.py --config training/configs/small/vae_dense.yaml

OUTPUT_DIR/vae receives the averaged weights and, as `shift_factor` and `scaling_factor`, the normalisation of the
latents over the training split. These latents are cached for the training of the transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from .. import DenseVAE
from ..models.kernel_examples import dense_autoencoder
from .batches import OccupancyDataset, pack
from .configuration import VAETrainingConfig, check_model_config, parse_config
from .dataset import check_dense_resolution, open_splits
from .kernel_compilation import ModelExample, trained_examples
from .latents import OCCUPANCY_THRESHOLD, save_with_statistics
from .losses import Loss, dice_loss, mean_loss, whole_number
from .noise import Draw, batch_seeds, normal_like
from .pictures import occupancy_reliefs, picture_grid
from .task import Task
from .trainer import Trainer, make_accelerator
from .vaes import make_vae


@dataclass
class DenseVAEConfig(VAETrainingConfig):
    """Settings of the training of a DenseVAE.

    Attributes:
        dice_weight: Weight of the Dice loss, which is added to the binary cross-entropy.
    """

    dice_weight: float = 0.0


class DenseVAETask(Task):
    """A DenseVAE with its losses: binary cross-entropy and Dice loss of the occupancy, and the KL divergence."""

    def __init__(self, vae: DenseVAE, config: DenseVAEConfig):
        super().__init__()
        self.vae, self.config = vae, config
        self.loss_weights = {"bce": 1.0, "dice": config.dice_weight, "kl": config.kl_weight}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the number of samples for each loss: all grids have one size."""
        samples = whole_number(len(batch["occupancy"]), batch["occupancy"].device)
        return {"bce": samples, "dice": samples, "kl": samples}

    def forward(self, batch: dict[str, Any]) -> dict[str, Loss]:
        """Returns the losses of a batch with `occupancy` `[B, 1, R, R, R]` bool.

        "iou" is the intersection over union at the threshold that the pipeline uses.
        """
        occupancy = batch["occupancy"].float()
        posterior = self.vae.encode(occupancy).latent_dist
        # In float32, even if the encoder computes in half precision: the divergence is a sum over many elements.
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        seeds = batch_seeds(batch, len(occupancy), occupancy.device)
        latents = posterior.mean + posterior.std * normal_like(posterior.mean, seeds, Draw.POSTERIOR)
        logits = self.vae.decode(latents).sample.float()
        samples = self.counts(batch)["kl"]
        bce_loss = mean_loss(F.binary_cross_entropy_with_logits(logits, occupancy, reduction="none"), samples)
        kl_loss = Loss(posterior.kl().sum() / posterior.mean[0].numel(), samples)
        predicted, actual = logits >= torch.tensor(OCCUPANCY_THRESHOLD).logit(), occupancy > 0.5
        iou = Loss((predicted & actual).sum().float(), (predicted | actual).sum())
        return {"bce": bce_loss, "dice": mean_loss(dice_loss(logits, occupancy)), "kl": kl_loss, "iou": iou}

    def kernel_examples(self, validates: bool) -> list[ModelExample]:
        """Returns the encoding and decoding of samples."""
        samples = min(2, self.config.batch_size)
        call = partial(dense_autoencoder, self.vae, samples)
        return trained_examples("autoencoder", self.vae, call, (samples,), validates)

    def models(self) -> dict[str, Any]:
        """Returns the VAE."""
        return {"vae": self.vae}

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> Image.Image:
        """Draws each shape beside its reconstruction, from the front and from the side."""
        occupancy = batch["occupancy"].float()
        logits = self.vae.decode(self.vae.encode(occupancy).latent_dist.mode()).sample.float()
        grids = torch.stack([occupancy[:, 0] > 0.5, logits[:, 0].sigmoid() >= OCCUPANCY_THRESHOLD], dim=1)
        rows = [[view for grid in pair for view in occupancy_reliefs(grid, ("front", "side"))] for pair in grids]
        return picture_grid(rows, ["data", "data, side", "reconstruction", "reconstruction, side"])


def train(config: DenseVAEConfig) -> None:
    """Trains the DenseVAE of a configuration and saves it in OUTPUT_DIR/vae.

    Raises:
        ValueError: if there are phases, or the VAE is for grids of another size than those of the dataset.
    """
    if config.phases:
        raise ValueError("`phases` must be empty for a dense VAE, which has one resolution")
    check_model_config(DenseVAE, config.model)
    accelerator = make_accelerator(config)
    splits = open_splits(config, sdf=False)
    data, vae = splits["train"], make_vae(DenseVAE, config)
    check_dense_resolution(data, vae.config.sample_size)
    task = DenseVAETask(vae, config)
    trainer = Trainer(
        config,
        accelerator,
        task,
        OccupancyDataset(data),
        pack,
        validation_dataset=OccupancyDataset(splits["val"]) if "val" in splits else None,
    )
    trainer.train()
    trainer.finish(lambda: save_with_statistics(task.vae, data, config, accelerator))
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `train`."""
    train(parse_config(DenseVAEConfig, __doc__, arguments, prog))
