"""Configuration of the training of the diffusion transformers."""

from dataclasses import dataclass, field
from typing import Any

from ..checks import check_number
from .configuration import TrainingConfig, check_choice
from .noise_levels import NoiseLevels


# What `image_encoder_model` may change of a trained image encoder.
ENCODER_CHANGES = ("num_hidden_layers", "image_size")


@dataclass
class DiTConfig(TrainingConfig):
    """Settings of the training of a DenseDiT or a SparseDiT.

    Attributes:
        stage: "dense" or "sparse".
        vae: Folder of the trained VAE of this stage.
        model: Arguments of DenseDiT or SparseDiT; with `pretrained`, those that are to be others.
        pretrained: Folder of a transformer to start from, instead of new weights.
        image_encoder: Folder or hub id of a trained image encoder, a `Dinov2Model` or `Dinov2WithRegistersModel`.
        image_encoder_model: Arguments of a new image encoder (`Dinov2WithRegistersConfig`), in place of a folder. With
            `image_encoder`, what is to be other in it: `num_hidden_layers`, of which the first are kept, and
            `image_size`, at which its position embeddings are interpolated.
        train_image_encoder: Whether the image encoder is trained too; otherwise it is frozen.
        conditioning_dropout: Share of samples whose conditioning is replaced by zeros, for classifier-free guidance.
        color_jitter: Brightness, contrast and saturation of the images are multiplied by random factors from
            [1 - color_jitter, 1 + color_jitter].
        mirror: Whether half of the samples are mirrored, shape and image, so that left becomes right.
        face_camera: Whether shapes are turned about the vertical axis by the multiple of 90 degrees that brings their
            front nearest to the camera; otherwise they stand as in the dataset, as published.
        camera_weight: Weight of the loss of the predicted cameras, for a dense `model` with `pixel_aligned`; none if
            0. It is over the pictures whose cameras the dataset has, as far as they are in front of the shape.
        loose_cells: Largest share of the cells around a shape that it is given in addition in the sparse stage, so
            that the transformer knows cells as the dense stage makes them, see `loosen_cells`; the VAE must have been
            trained with the same. Validation has the exact cells.
        sample_posterior: Whether to train on samples of the VAE's posterior; otherwise on its means, of which there is
            less to learn where the posterior is wide.
        sigma_sampling: Distribution of the noise levels, "logit_normal" or "uniform". Those of a global batch are
            stratified: one in each of as many intervals of equal probability as it has samples.
        shift: Shift of the noise levels towards noise, in training and in the scheduler that is saved.
        shift_scaling: How the shift depends on the length of a sample: "constant", not at all; "sqrt", with the root
            of its number of tokens, as in Stable Diffusion 3, in training alone; "exponential", by which the logarithm
            of the shift is linear in the number of tokens, as in Flux, in training and in the scheduler that is saved.
        shift_base_tokens: Tokens (latent cells) of a sample that has `shift`; needed unless `shift_scaling` is
            "constant".
        max_shift: With "exponential", shift of a sample of `shift_max_tokens` tokens.
        shift_max_tokens: See `max_shift`.
        resolution: Samples per axis of the SDFs that the sparse stage is trained on; 8 times `sample_size` if not
            given, or those of `phases`.
        cache_dir: Folder in which the prepared images are cached; OUTPUT_DIR/cache if not given.
        latents_dir: Folder of the cached latents; if not given, the folder `latents` beside the VAE's, where the
            training of the VAE puts them.
        encode_batch_size: Samples per forward pass of the VAE.
        compile: Whether to compile the transformer with torch.compile; worth it for the dense stage, where all batches
            have one shape.
        num_inference_steps: Denoising steps of the samples in pictures.
        guidance_scale: Scale of classifier-free guidance of the samples in pictures.
    """

    stage: str = "dense"
    vae: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    image_encoder: str | None = None
    image_encoder_model: dict[str, Any] = field(default_factory=dict)
    train_image_encoder: bool = False
    conditioning_dropout: float = 0.1
    color_jitter: float = 0.0
    mirror: bool = False
    face_camera: bool = False
    camera_weight: float = 0.0
    loose_cells: float = 0.0
    sample_posterior: bool = True
    sigma_sampling: str = "logit_normal"
    shift: float = 1.0
    shift_scaling: str = "constant"
    shift_base_tokens: int | None = None
    max_shift: float | None = None
    shift_max_tokens: int | None = None
    resolution: int | None = None
    cache_dir: str | None = None
    latents_dir: str | None = None
    encode_batch_size: int = 16
    compile: bool = False
    num_inference_steps: int = 25
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stage", self.stage, ("dense", "sparse"))
        check_choice("sigma_sampling", self.sigma_sampling, ("logit_normal", "uniform"))
        check_choice("shift_scaling", self.shift_scaling, ("constant", "sqrt", "exponential"))
        self._check_shift()
        if self.checkpointing_keeps_attention and self.compile:
            raise ValueError("`checkpointing_keeps_attention` must be false with `compile`: graphs keep nothing")
        if not self.vae:
            raise ValueError("`vae` must be the folder of the trained VAE, got nothing")
        if self.image_encoder is None and not self.image_encoder_model:
            raise ValueError("`image_encoder` (a folder) or `image_encoder_model` (a configuration) must be given")
        if self.image_encoder is not None and not set(self.image_encoder_model) <= set(ENCODER_CHANGES):
            raise ValueError(
                f"`image_encoder_model` must have keys of {ENCODER_CHANGES} beside `image_encoder`, got"
                f" {sorted(self.image_encoder_model)}"
            )
        if self.image_encoder is None and not self.train_image_encoder:
            raise ValueError("`train_image_encoder` must be true for a new image encoder, got false")
        if self.camera_weight < 0 or (self.camera_weight and self.stage != "dense"):
            raise ValueError(
                f"`camera_weight` must be 0 in the sparse stage and not negative in the dense one, got"
                f" {self.camera_weight} for {self.stage!r}"
            )
        check_number("loose_cells", self.loose_cells, 0, 1)
        if self.stage == "dense" and self.loose_cells:
            raise ValueError(
                f"`loose_cells` must be 0 in the dense stage, which makes the cells, got {self.loose_cells}"
            )
        if self.stage == "dense" and self.phases:
            raise ValueError("`phases` must be empty in the dense stage, which has one resolution")

    def _check_shift(self) -> None:
        """Raises a ValueError unless the settings of the shift fit each other."""
        values: dict[str, float | None] = {"shift": self.shift}
        if self.shift_scaling != "constant":
            values["shift_base_tokens"] = self.shift_base_tokens
        if self.shift_scaling == "exponential":
            values |= {"max_shift": self.max_shift, "shift_max_tokens": self.shift_max_tokens}
        for name, value in values.items():
            if value is None or value <= 0:
                raise ValueError(f"`{name}` must be positive with `shift_scaling` {self.shift_scaling!r}, got {value}")
        if self.shift_scaling == "exponential" and (self.shift_max_tokens or 0) <= (self.shift_base_tokens or 0):
            raise ValueError(
                f"`shift_max_tokens` must be more than `shift_base_tokens`, {self.shift_base_tokens}, got"
                f" {self.shift_max_tokens}"
            )

    @property
    def noise_levels(self) -> NoiseLevels:
        """The noise levels that are trained at."""
        return NoiseLevels(
            self.sigma_sampling,
            self.shift,
            self.shift_scaling,
            self.shift_base_tokens or 1,
            self.max_shift or self.shift,
            self.shift_max_tokens or (self.shift_base_tokens or 1) + 1,
        )
