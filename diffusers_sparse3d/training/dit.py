"""Trains the diffusion transformer of the dense or of the sparse stage as a rectified flow from noise to latents.

    accelerate launch training/train_dit.py --config training/configs/small/dit_dense.yaml
    accelerate launch training/train_dit.py --config training/configs/small/dit_sparse.yaml

Latents and conditioning images are prepared once, before training starts, and cached. OUTPUT_DIR/transformer receives
the averaged weights, OUTPUT_DIR/scheduler the noise schedule and, if the image encoder is trained too or is an adapted
one, OUTPUT_DIR/image_encoder its weights.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .. import DenseDiT, DenseVAE, SparseDiT, SparseVAE
from ..geometry.sdf import narrow_band_width
from ..models.kernel_examples import dense_decoder, dense_transformer, sparse_decoder, sparse_transformer
from ..models.pixel_alignment import PixelAlignment
from ..pipelines.conditioning import encode_image, sparse_conditioning
from ..pipelines.image_processor import Sparse3DImageProcessor
from ..pipelines.timesteps import set_timesteps
from .balancing import make_schedule
from .batches import pack
from .cameras import NEEDED_COLUMNS, PictureCameras, camera_errors
from .configuration import check_model_config, loading, parse_config
from .dataset import check_dense_resolution, data_folder, open_splits
from .distributed import on_main_process
from .dit_configuration import DiTConfig
from .gradient_checkpointing import set_gradient_checkpointing
from .image_encoder import ImageEncoder, image_and_patch_size, load_image_encoder
from .images import ConditionedLatentDataset, cache_images, needed_orientations, normalize_images
from .kernel_compilation import ModelExample, trained_examples
from .latents import OCCUPANCY_THRESHOLD, cache_latents
from .losses import Loss, masked_loss, mean_loss, whole_number
from .noise import Draw, batch_seeds, normal_like, uniform
from .noise_levels import losses_by_level
from .phases import phase_resolutions, read_phases
from .pictures import occupancy_reliefs, picture_grid, sdf_reliefs
from .task import Task
from .trainer import Trainer, make_accelerator


class DiTTask(Task):
    """A diffusion transformer with its image encoder, and the flow-matching loss on batches of latents and images.

    Args:
        transformer: The DenseDiT or SparseDiT to train.
        image_encoder: The image encoder; it is trained too if its parameters require gradients.
        vae: The frozen VAE of the same stage, which normalises latents and decodes samples for pictures.
        config: The configuration of the training.

    Raises:
        ValueError: if cameras have a weight, and the transformer predicts none.
    """

    vae: DenseVAE | SparseVAE
    image_encoder: ImageEncoder

    def __init__(
        self,
        transformer: DenseDiT | SparseDiT,
        image_encoder: ImageEncoder,
        vae: DenseVAE | SparseVAE,
        config: DiTConfig,
    ):
        super().__init__()
        self.transformer, self.config = transformer, config
        self.keep_frozen(vae=vae)
        if config.train_image_encoder:
            self.image_encoder = image_encoder
        else:
            self.keep_frozen(image_encoder=image_encoder)
        self.loss_weights = {"loss": 1.0}
        if config.camera_weight:
            if getattr(transformer, "pixel_alignment", None) is None:
                raise ValueError("`model.pixel_aligned` must be true with `camera_weight`, got a model without")
            self.loss_weights["camera"] = config.camera_weight
        self.noise_levels = config.noise_levels
        self.scheduler = self.noise_levels.scheduler()

    def condition(self, images: Tensor, color_factors: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the image tokens of prepared images `[B, 4, S, S]` uint8, and their coordinates.

        Tokens are `[B, L, D]` with coordinates None or, with sparse conditioning, packed `[M, D]` with coordinates
        `[M, 4]` int32.
        """
        pixel_values, mask = normalize_images(images, color_factors)
        tokens = encode_image(self.image_encoder, pixel_values)
        if self.config.stage == "dense" or not self.transformer.config["sparse_conditioning"]:
            return tokens, None
        _, patch_size = image_and_patch_size(self.image_encoder)
        num_prefix_tokens = tokens.shape[1] - (mask.shape[-1] // patch_size) ** 2
        return sparse_conditioning(tokens, mask, patch_size, num_prefix_tokens)

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        tokens: Tensor,
        token_coords: Tensor | None,
        coords: Tensor | None,
    ) -> Tensor:
        """Returns the velocity that the transformer of either stage predicts, in the shape of `latents`."""
        if self.config.stage == "dense":
            return self.transformer(latents, timestep, tokens).sample
        return self.transformer(
            latents, coords, timestep, tokens, encoder_coords=token_coords, check_inputs=False
        ).sample

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the number of tokens: latent voxels in the sparse stage, samples in the dense one; and of cameras.

        These are the known ones of samples whose conditioning is not dropped.
        """
        counts = {"loss": whole_number(len(batch["mean"]), batch["mean"].device)}
        if "camera" in self.loss_weights:
            camera = batch["camera"]
            kept = self.keeps_conditioning(batch_seeds(batch, len(camera), camera.device))
            counts["camera"] = (kept & camera.isfinite().all(1)).sum()
        return counts

    def keeps_conditioning(self, seeds: Tensor) -> Tensor:
        """Returns which samples keep their conditioning, `[B]` bool: not a share of them in training."""
        if not self.training:
            return torch.ones_like(seeds, dtype=torch.bool)
        return uniform(seeds, Draw.CONDITIONING)[:, 0] >= self.config.conditioning_dropout

    def forward(self, batch: dict[str, Any]) -> dict[str, Loss]:
        """Returns the flow-matching loss of a batch: `mean`, `logvar`, `image` and, in the sparse stage, `coords`.

        Beside it are the losses at the noise levels of each interval of `losses_by_level` and, with `camera_weight`,
        that of the cameras which the transformer predicts: the batch has `camera` `[B, 6]`, NaN where it is not known.

        With latents x and noise e, the transformer sees (1 - sigma) x + sigma e at timestep 1000 sigma, and its target
        is the velocity e - x, as `FlowMatchEulerDiscreteScheduler` integrates it.
        """
        config, coords = self.config, batch.get("coords")
        mean, logvar = batch["mean"].float(), batch["logvar"].float()
        batch_size, device = batch["image"].shape[0], mean.device
        seeds = batch_seeds(batch, batch_size, device)
        if config.sample_posterior:
            latents = mean + torch.exp(0.5 * logvar) * normal_like(mean, seeds, Draw.POSTERIOR, coords)
        else:
            latents = mean
        latents = (latents - self.vae.config["shift_factor"]) * self.vae.config["scaling_factor"]

        color_factors = None
        if self.training and config.color_jitter > 0:
            color_factors = 1 + config.color_jitter * (2 * uniform(seeds, Draw.COLOR, 3) - 1)
        tokens, token_coords = self.condition(batch["image"], color_factors)
        kept = self.keeps_conditioning(seeds)
        if self.training:
            keep = kept.to(tokens.dtype)
            tokens = tokens * (keep[:, None, None] if token_coords is None else keep[token_coords[:, 0], None])

        samples = torch.arange(batch_size, device=device) if coords is None else coords[:, 0].long()
        if coords is None:
            num_tokens = torch.full_like(samples, mean[0, 0].numel())
        else:
            num_tokens = samples.new_zeros(batch_size).index_add(0, samples, torch.ones_like(samples))
        quantiles = batch["quantile"] if "quantile" in batch else uniform(seeds, Draw.NOISE_LEVEL)[:, 0]
        sigma = self.noise_levels.at(quantiles, num_tokens)
        sigma_rows = sigma[samples].view(-1, *(1,) * (mean.ndim - 1))
        noise = normal_like(latents, seeds, Draw.NOISE, coords)
        noisy = (1 - sigma_rows) * latents + sigma_rows * noise
        velocity = self.predict(noisy, 1000 * sigma, tokens, token_coords, coords)
        error = F.mse_loss(velocity.float(), noise - latents, reduction="none")
        by_level = losses_by_level(error.flatten(1).mean(1), sigma[samples])
        losses = {"loss": mean_loss(error, whole_number(len(mean), device)), **by_level}
        if "camera" in self.loss_weights:
            camera, alignment = batch["camera"], cast(DenseDiT, self.transformer).pixel_alignment
            errors = camera_errors(cast(PixelAlignment, alignment).camera(tokens), camera)
            losses["camera"] = masked_loss(errors, kept & camera.isfinite().all(1))
        return losses

    @torch.no_grad()
    def sample(self, images: Tensor, shape: tuple[int, ...], coords: Tensor | None) -> Tensor:
        """Samples latents of a shape for images, with the guidance of the configuration; they are not normalised."""
        tokens, token_coords = self.condition(images)
        latents = torch.randn(shape, device=images.device)
        num_tokens = latents[0, 0].numel() if coords is None else len(latents) / len(images)
        set_timesteps(self.scheduler, self.config.num_inference_steps, num_tokens, images.device)
        for timestep in self.scheduler.timesteps:
            timesteps = timestep.expand(images.shape[0])
            velocity = self.predict(latents, timesteps, tokens, token_coords, coords).float()
            unconditional = self.predict(latents, timesteps, 0 * tokens, token_coords, coords).float()
            velocity = unconditional + self.config.guidance_scale * (velocity - unconditional)
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        return latents / self.vae.config["scaling_factor"] + self.vae.config["shift_factor"]

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> Image.Image:
        """Draws images beside the true shape and a sample; the sparse stage is given the true coordinates."""
        mean = batch["mean"].float()
        views = [
            self.reliefs(latents, batch)
            for latents in (mean, self.sample(batch["image"], mean.shape, batch.get("coords")))
        ]
        images = F.interpolate(batch["image"][:, :3].float() / 255, size=(192, 192), mode="bilinear", antialias=True)
        rows = [[image.cpu(), *truth, *sample] for image, truth, sample in zip(images, *views)]
        return picture_grid(rows, ["image", "truth", "truth, side", "sample", "sample, side"])

    def reliefs(self, latents: Tensor, batch: dict[str, Any]) -> list[list[Tensor]]:
        """Draws the shape that latents decode to from the front and from the side, for each sample of the batch."""
        views = ("front", "side")
        if self.config.stage == "dense":
            occupied = self.vae.decode(latents).sample[:, 0].float().sigmoid() >= OCCUPANCY_THRESHOLD
            return [occupancy_reliefs(grid, views) for grid in occupied]
        resolution = int(batch["resolution"][0])
        decoded = self.vae.decode(latents, batch["coords"], check_inputs=False)
        rows = [decoded.coords[:, 0] == index for index in range(batch["image"].shape[0])]
        tau = narrow_band_width(resolution)
        return [
            sdf_reliefs(decoded.sample[row].float(), decoded.coords[row, 1:], resolution, tau, views) for row in rows
        ]

    def kernel_examples(self, validates: bool) -> list[ModelExample]:
        """Returns steps of the transformer and, for the pictures of a validation, the decoding of latents."""
        transformer, vae, size = self.transformer, self.vae, self.transformer.config["sample_size"]
        samples = min(2, self.config.batch_size)
        if self.config.stage == "dense":
            predict, decode = partial(dense_transformer, transformer, samples), partial(dense_decoder, vae, size)
        else:
            predict = partial(sparse_transformer, transformer, samples)
            decode = partial(sparse_decoder, vae, size, samples=samples)
        examples = trained_examples("transformer", transformer, predict, (samples,), validates)
        return [*examples, ModelExample("decoder", vae, decode, (samples, size))] if validates else examples

    def models(self) -> dict[str, Any]:
        """Returns the transformer, its scheduler and the image encoder, unless it is as configured."""
        models = {"transformer": self.transformer, "scheduler": self.scheduler}
        if self.config.train_image_encoder or self.config.image_encoder_model:
            models["image_encoder"] = self.image_encoder.requires_grad_(True)
        return models


def make_datasets(
    config: DiTConfig,
    accelerator: Accelerator,
    vae: DenseVAE | SparseVAE,
    processor: Sparse3DImageProcessor,
    resolutions: list[int],
) -> dict[str, ConditionedLatentDataset]:
    """Returns the latents and images of the training split and, if there is one, of the validation split.

    Those that are not cached yet are prepared. Resolutions are those of the SDFs, and 0 alone in the dense stage.
    """
    dense = config.stage == "dense"
    cache_dir = data_folder(config, config.cache_dir or Path(config.output_dir) / "cache")
    latents_dir = data_folder(config, config.latents_dir or Path(config.vae).parent / "latents")
    datasets = {}
    columns = NEEDED_COLUMNS if config.camera_weight else ()
    for split, data in open_splits(config, None if dense else resolutions, not dense, dense, columns).items():
        if dense:
            check_dense_resolution(data, vae.config["sample_size"])
        encode = partial(
            cache_latents, vae, data, latents_dir, accelerator, config.encode_batch_size, config.num_workers
        )
        latents = {
            (resolution, orientation): encode(
                orientation=orientation,
                resolution=resolution or None,
                loose_cells=config.loose_cells if split == "train" else 0.0,
            )
            for resolution in resolutions
            for orientation in needed_orientations(data, config.face_camera, config.mirror and split == "train")
        }
        images = cache_images(data, processor, cache_dir, accelerator, config.num_workers)
        cameras = PictureCameras(data, processor) if config.camera_weight else None
        datasets[split] = ConditionedLatentDataset(latents, images, data, cameras)
    return datasets


def load_transformer(config: DiTConfig) -> DenseDiT | SparseDiT:
    """Returns the transformer of a configuration, with pretrained weights or new ones."""
    model_class = DenseDiT if config.stage == "dense" else SparseDiT
    check_model_config(model_class, config.model)
    if config.pretrained:
        # Never a pickle: weights may come from a stranger.
        with loading("pretrained", config.pretrained):
            return model_class.from_pretrained(config.pretrained, use_safetensors=True, **config.model)
    return model_class(**config.model)


def prepare_blocks(transformer: SparseDiT | DenseDiT, config: DiTConfig) -> None:
    """Sets gradient checkpointing as configured and, with `config.compile`, has torch.compile compile the blocks."""
    set_gradient_checkpointing(transformer, config)
    if config.compile:
        # Each batch of the sparse stage has a number of tokens of its own, which its graphs leave open.
        transformer.compile_repeated_blocks(dynamic=None if config.stage == "dense" else True)


def make_trainer(
    config: DiTConfig,
    accelerator: Accelerator,
    transformer: DenseDiT | SparseDiT,
    trainer_class: type[Trainer] = Trainer,
) -> Trainer:
    """Returns the trainer of a transformer, with the data of a configuration and a `DiTTask`.

    Args:
        config: Configuration of the training.
        accelerator: Accelerator of `make_accelerator`.
        transformer: Transformer of `load_transformer`, of which the parameters that require gradients are trained.
        trainer_class: `Trainer` or a class derived from it.

    Raises:
        ValueError: if the transformer does not fit the VAE or the resolutions of the configuration, or the VAE of the
            dense stage is for grids of another size than those of the dataset.
    """
    dense = config.stage == "dense"
    with loading("vae", config.vae):
        vae = (DenseVAE if dense else SparseVAE).from_pretrained(config.vae, use_safetensors=True)
    vae.to(accelerator.device).eval()
    if transformer.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"`model.in_channels` must be {vae.config.latent_channels}, the VAE's latent channels, got"
            f" {transformer.config.in_channels}"
        )
    prepare_blocks(transformer, config)
    encoder = load_image_encoder(config)
    processor = Sparse3DImageProcessor(*image_and_patch_size(encoder))
    largest = 8 * transformer.config.sample_size
    phases = [] if dense else read_phases(config, [config.resolution or largest])
    resolutions = [0] if dense else phase_resolutions(phases)
    if max(resolutions) > largest:
        raise ValueError(
            f"`model.sample_size` must be an eighth of the largest resolution, {max(resolutions)}, or more, got"
            f" {transformer.config.sample_size}"
        )
    datasets = make_datasets(config, accelerator, vae, processor, resolutions)
    training, validation = datasets["train"], datasets.get("val")
    schedule = validation_schedule = None
    if not dense:
        counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
        schedule = make_schedule(phases, training.sizes, training.data.ids, config.seed, *counts)
        if validation is not None:
            validation_schedule = make_schedule(phases, validation.sizes, validation.data.ids, config.seed)
    task = DiTTask(transformer, encoder, vae, config)
    return trainer_class(config, accelerator, task, training, pack, schedule, validation, validation_schedule)


def train(config: DiTConfig) -> None:
    """Trains the transformer of a configuration and saves it in OUTPUT_DIR."""
    accelerator = make_accelerator(config)
    trainer = make_trainer(config, accelerator, load_transformer(config))
    trainer.train()
    trainer.finish(lambda: on_main_process(accelerator, lambda: trainer.task.save_pretrained(Path(config.output_dir))))
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `train`."""
    train(parse_config(DiTConfig, __doc__, arguments, prog))
