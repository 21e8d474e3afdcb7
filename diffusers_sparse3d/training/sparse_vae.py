"""Trains a SparseVAE, which compresses the sparse SDF of the sparse stages, on a prepared dataset.

    accelerate launch training/train_sparse_vae.py --config training/configs/small/vae_sparse.yaml
    python training/train_sparse_vae.py --config FILE --override model.decoder_layers=2 learning_rate=2e-4

OUTPUT_DIR/vae receives the averaged weights and, as `shift_factor` and `scaling_factor`, the normalisation of the
latents over the training split. These latents are cached for the training of the transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import SparseVAE
from ..checks import check_number
from ..data.records import unpack_bits
from ..geometry.sdf import narrow_band_width
from ..models.kernel_examples import sparse_autoencoder
from .balancing import make_schedule
from .batches import BlockDataset, block_grids, encoder_input, expand_blocks, pack, vae_targets
from .configuration import VAETrainingConfig, check_model_config, parse_config
from .dataset import BLOCK_SIZE, open_splits
from .kernel_compilation import ModelExample, trained_examples
from .latents import save_with_statistics
from .loose_cells import encoder_rows
from .losses import Loss, has_normal, mean_loss, normal_loss, sign_loss, sparse_sdf_losses, whole_number
from .noise import Draw, batch_seeds, normal_like
from .phases import phase_resolutions, read_phases
from .pictures import picture_grid, sdf_reliefs
from .task import Task
from .trainer import Trainer, make_accelerator
from .vaes import make_vae


@dataclass
class SparseVAEConfig(VAETrainingConfig):
    """Settings of the training of a SparseVAE.

    Attributes:
        resolutions: Samples per axis of the SDFs; each is used for whole batches, every sample once at each of them.
            If empty, all that the dataset has, or those of `phases`. Latents are cached at the first one.
        input_weight: Weight of the reconstruction loss on the input voxels.
        extra_weight: Weight of the reconstruction loss on the voxels that the decoder adds.
        sharp_weight: Weight of the reconstruction loss on the voxels near sharp edges.
        normal_weight: Weight of the error of the normals in the narrow band, one minus the cosine of the angle between
            the gradients of the distances; 0 leaves it out.
        sign_weight: Weight of the loss on the voxels that the decoder adds on the wrong side of the surface; 0 leaves
            it out.
        loose_cells: Largest share of the cells around a shape that it is given in addition, for a transformer that is
            trained with the same, see `loosen_cells`; validation has the exact cells.
    """

    resolutions: list[int] = field(default_factory=list)
    input_weight: float = 1.0
    extra_weight: float = 0.1
    sharp_weight: float = 1.0
    normal_weight: float = 0.0
    sign_weight: float = 0.0
    loose_cells: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("loose_cells", self.loose_cells, 0, 1)


class SparseVAETask(Task):
    """A SparseVAE with the losses of arXiv 2505.17412, section 3.1: L = L_in + 0.1 L_extra + L_sharp + 1e-3 KL.

    Losses of normals and of signs, which are not the paper's, are added where they have a weight.
    """

    def __init__(self, vae: SparseVAE, config: SparseVAEConfig):
        super().__init__()
        self.vae, self.config = vae, config
        self.loss_weights = {
            "input": config.input_weight,
            "extra": config.extra_weight,
            "sharp": config.sharp_weight,
            "kl": config.kl_weight,
        }
        more = {"normal": config.normal_weight, "sign": config.sign_weight}
        self.loss_weights |= {name: weight for name, weight in more.items() if weight > 0}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the numbers of input, added and sharp voxels, of those with a normal, and of blocks for the KL."""
        is_input = encoder_rows(batch["values"].unflatten(1, (BLOCK_SIZE,) * 3)).flatten(1)
        blocks = whole_number(len(is_input), is_input.device)
        inputs = is_input.sum()
        extra = is_input.numel() - inputs
        counts = {
            "input": inputs,
            "extra": extra,
            "sharp": unpack_bits(batch["sharp"]).sum(),
            "kl": blocks,
            "sign": extra,
        }
        if "normal" in self.loss_weights:
            counts["normal"] = has_normal(is_input.unflatten(1, (BLOCK_SIZE,) * 3)).sum()
        return {name: counts[name] for name in self.loss_weights}

    def forward(self, batch: dict[str, Any]) -> dict[str, Loss]:
        """Returns the losses of a batch of M blocks: `coords` `[M, 4]`, `values` and `sharp` `[M, 512]`."""
        target, is_input, is_sharp = vae_targets(batch["values"].float(), batch["sharp"])
        posterior = self.vae.encode(*encoder_input(batch["coords"], target, is_input), check_inputs=False).latent_dist
        seeds = batch_seeds(batch, len(batch["resolution"]), target.device)
        noise = normal_like(posterior.mean, seeds, Draw.POSTERIOR, batch["coords"])
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        sample = self.vae.decode(latents, batch["coords"], check_inputs=False).sample
        input_loss, extra_loss, sharp_loss = sparse_sdf_losses(sample, target, is_input, is_sharp)
        kl_loss = mean_loss(posterior.kl(), whole_number(len(batch["coords"]), target.device))
        losses = {"input": input_loss, "extra": extra_loss, "sharp": sharp_loss, "kl": kl_loss}
        if "normal" in self.loss_weights:
            grids = (block_grids(rows) for rows in (sample[:, 0], target[:, 0], is_input))
            losses["normal"] = normal_loss(*grids)
        if "sign" in self.loss_weights:
            losses["sign"] = sign_loss(sample, target, is_input)
        return losses

    def kernel_examples(self, validates: bool) -> list[ModelExample]:
        """Returns the encoding and decoding of samples."""
        samples = min(2, self.config.batch_size)
        call = partial(sparse_autoencoder, self.vae, samples)
        return trained_examples("autoencoder", self.vae, call, (samples,), validates)

    def models(self) -> dict[str, Any]:
        """Returns the VAE."""
        return {"vae": self.vae}

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> Image.Image:
        """Draws each shape beside its reconstruction, from the front and from the side."""
        coords, target, is_input, _ = expand_blocks(batch)
        encoded = self.vae.encode(*encoder_input(batch["coords"], target, is_input), check_inputs=False)
        latents = encoded.latent_dist.mode()
        sample = self.vae.decode(latents, batch["coords"], check_inputs=False).sample.float()
        resolution = int(batch["resolution"][0])
        tau, rows = narrow_band_width(resolution), []
        for index in range(len(batch["resolution"])):
            one = coords[:, 0] == index
            rows.append(
                [
                    picture
                    for values in (target, sample)
                    for picture in sdf_reliefs(values[one], coords[one, 1:], resolution, tau, ("front", "side"))
                ]
            )
        return picture_grid(rows, ["data", "data, side", "reconstruction", "reconstruction, side"])


def train(config: SparseVAEConfig) -> None:
    """Trains the SparseVAE of a configuration and saves it in OUTPUT_DIR/vae."""
    check_model_config(SparseVAE, config.model)
    accelerator = make_accelerator(config)
    resolutions = phase_resolutions(read_phases(config, config.resolutions))
    splits = open_splits(config, resolutions or None)
    data = splits["train"]
    config.resolutions = data.resolutions
    phases = read_phases(config, config.resolutions)
    counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
    validation_schedule = None
    if validation := splits.get("val"):
        validation_schedule = make_schedule(phases, validation.num_blocks, validation.ids, config.seed)
    task = SparseVAETask(make_vae(SparseVAE, config), config)
    trainer = Trainer(
        config,
        accelerator,
        task,
        BlockDataset(data, loose_cells=config.loose_cells),
        pack,
        make_schedule(phases, data.num_blocks, data.ids, config.seed, *counts),
        None if validation is None else BlockDataset(validation),
        validation_schedule,
    )
    trainer.train()
    trainer.finish(lambda: save_with_statistics(task.vae, data, config, accelerator, config.loose_cells))
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `train`."""
    train(parse_config(SparseVAEConfig, __doc__, arguments, prog))
