"""A pipeline of real components at tiny size: 8^3 cells in the dense stage, 64^3 samples, random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_sparse3d import (
    DenseDiT,
    DenseVAE,
    Direct3DS2Pipeline,
    SDFRefiner,
    SDFSignRefiner,
    SparseDiT,
    SparseVAE,
)


LATENT_SIZE = 8
SECOND_LATENT_SIZE = 12


def tiny_components(sparse_conditioning: bool = True) -> dict:
    """The components of `Direct3DS2Pipeline`, without the zero initialisation of the DiTs: all inputs matter."""
    torch.manual_seed(0)
    components = {
        "image_encoder": Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
                initializer_range=0.5,
            )
        ),
        "dense_vae": DenseVAE(
            latent_channels=2,
            encoder_block_out_channels=(4, 8),
            decoder_block_out_channels=(8, 4),
            layers_per_block=1,
            mid_layers=1,
            sample_size=LATENT_SIZE,
        ),
        "dense_transformer": DenseDiT(
            sample_size=LATENT_SIZE // 2,
            in_channels=2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=16,
        ),
        "dense_scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": SparseVAE(
            latent_channels=4,
            sample_size=LATENT_SIZE,
            encoder_channels=32,
            encoder_layers=1,
            encoder_heads=2,
            decoder_channels=64,
            decoder_layers=2,
            decoder_heads=2,
            norm_num_groups=2,
            scaling_factor=0.5,
            shift_factor=0.1,
        ),
        "transformer": SparseDiT(
            sample_size=LATENT_SIZE,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_key_value_heads=2,
            cross_attention_dim=16,
            topk=2,
            norm_num_groups=2,
            sparse_conditioning=sparse_conditioning,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0),
    }
    for name in ("dense_vae", "dense_transformer", "vae", "transformer"):
        for parameter in components[name].parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    # A signed distance of both signs.
    components["vae"].decoder.conv_out.weight.data.mul_(4)
    components["vae"].decoder.conv_out.bias.data.zero_()
    return {name: c.eval() if isinstance(c, torch.nn.Module) else c for name, c in components.items()}


def tiny_second_stage(sparse_conditioning: bool = True) -> dict:
    """The components of the second sparse stage on a finer grid: 12^3 cells, 96^3 samples."""
    torch.manual_seed(1)
    components = tiny_components(sparse_conditioning)
    vae = {**components["vae"].config, "sample_size": SECOND_LATENT_SIZE, "decoder_channels": 32, "decoder_layers": 1}
    transformer = {**components["transformer"].config, "sample_size": SECOND_LATENT_SIZE, "num_layers": 1}
    stage = {
        "vae_1024": SparseVAE.from_config(vae).eval(),
        "transformer_1024": SparseDiT.from_config(transformer).eval(),
        "scheduler_1024": FlowMatchEulerDiscreteScheduler(shift=1.5),
    }
    for name in ("vae_1024", "transformer_1024"):
        for parameter in stage[name].parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    stage["vae_1024"].decoder.conv_out.bias.data.zero_()
    return stage


def tiny_refiners() -> dict:
    """Both refiners, for the pipeline with the second stage, in several patches each."""
    torch.manual_seed(2)
    common = {"block_out_channels": (4, 8), "layers_per_block": 1, "mid_layers": 0, "norm_num_groups": 2}
    refiners = {
        "refiner": SDFRefiner(
            feature_channels=4,
            feature_mlp_dim=4,
            sample_size=8 * LATENT_SIZE,
            patch_size=24,
            patch_stride=20,
            **common,
        ),
        "refiner_1024": SDFSignRefiner(sample_size=4 * SECOND_LATENT_SIZE, patch_size=24, patch_stride=12, **common),
    }
    # Both signs here too, and values that fill the band.
    for name, scale in (("refiner", 5e4), ("refiner_1024", 50)):
        refiners[name].conv_out.weight.data.mul_(scale)
        refiners[name].conv_out.bias.data.zero_()
    return {name: refiner.eval() for name, refiner in refiners.items()}


def tiny_pipeline(**kwargs) -> Direct3DS2Pipeline:
    """The pipeline of `tiny_components`, with two steps per stage and guidance as its own defaults."""
    defaults = {
        "default_dense_num_inference_steps": 2,
        "default_num_inference_steps": 2,
        "default_dense_guidance_scale": 2.0,
        "default_guidance_scale": 3.0,
        "default_num_inference_steps_1024": 1,
        "default_guidance_scale_1024": 4.0,
        "occupancy_threshold": 0.72,  # about 3 % of the cells, with these weights
    }
    pipe = Direct3DS2Pipeline(**{**tiny_components(), **defaults, **kwargs})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_image(color: str = "red", box: tuple[int, int, int, int] = (8, 12, 40, 50)) -> Image.Image:
    """RGBA disc."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse(box, fill=color)
    return image


def tiny_coords(counts: tuple[int, ...] = (7,), seed: int = 0) -> torch.Tensor:
    """`[sum(counts), 4]` int32: distinct cells of the latent grid, grouped by sample, otherwise unsorted."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(LATENT_SIZE**3, generator=generator)[:count]
        xyz = torch.stack([cells // LATENT_SIZE**2, cells // LATENT_SIZE % LATENT_SIZE, cells % LATENT_SIZE], dim=1)
        rows.append(torch.nn.functional.pad(xyz, (1, 0), value=sample))
    return torch.cat(rows).int()
