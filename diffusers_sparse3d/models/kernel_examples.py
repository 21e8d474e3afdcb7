"""Examples of what models do, by which kernels are compiled before their first launch.

Each function here plans for real and returns a function that calls a model on new tensors, which need no values:
`ops.runtime.compile_ahead` collects the kernels that it would launch. Cells are those of a sphere, of which there are
about as many as of an object, so that the same kernels are chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparse_tensor import CoordinateCache
from .cuda_graphs import differs_from_its_class
from .refiner_patches import coarse_volume
from .refiner_sdf import SIGN_DOWNSAMPLING


# Blocks of a transformer are all alike, but for those of the sparse one, of which every second one shifts its windows.
_BLOCKS = 2
# Of the grid that a sparse VAE is shown, whose kernels are the same for more cells.
_DECODER_CELLS = 32
_ENCODER_VOXELS = 128
# A picture of 518 pixels in patches of 14; of these, an object covers about a half.
_PATCHES = 37
# Of the volume that a sign refiner looks at.
_FIELD_RESOLUTION = 32


def described(model: Any) -> Any:
    """What the kernels of a model depend on: not where its weights are from."""
    if model is None:
        return None
    config = sorted((name, value) for name, value in model.config.items() if not name.startswith("_"))
    processors = sorted({type(part.processor).__name__ for part in model.modules() if hasattr(part, "processor")})
    return type(model).__name__, config, processors, model.dtype, str(model.device)


def is_plain(model: Any, device: torch.device) -> bool:
    """Whether a call of a model does nothing but compute, with weights that are plain tensors on a device."""
    # Of context parallelism, each call is an exchange with other processes.
    effects = (getattr(model, name, None) for name in ("hf_quantizer", "_parallel_config"))
    if model.device != device or any(effect is not None for effect in effects):
        return False
    return not any(differs_from_its_class(part) for part in model.modules())


def sphere_cells(resolution: int, samples: int, device: torch.device) -> Tensor:
    """`[N, 4]` int32 (sample, x, y, z): the cells near a sphere, the same for each sample."""
    axis = torch.arange(resolution, dtype=torch.int32, device=device)
    cells = torch.cartesian_prod(axis, axis, axis)
    distance = (cells - (resolution - 1) / 2).norm(dim=1) - 0.4 * resolution
    cells = cells[distance.abs() < 0.75]
    return torch.cat([F.pad(cells, (1, 0), value=sample) for sample in range(samples)])


def first_blocks(transformer: Any) -> Any:
    """A transformer with the first blocks of another one alone, and else its parts."""
    short = copy.copy(transformer)
    short._modules = dict(transformer._modules)
    short._modules["transformer_blocks"] = nn.ModuleList(list(transformer.transformer_blocks)[:_BLOCKS])
    return short


def dense_transformer(original: Any, samples: int, unconditional: int = 0) -> Callable[[], Any]:
    """A step of the dense stage, of whose samples some are predicted without an image."""
    transformer, config = first_blocks(original), original.config
    place: dict[str, Any] = {"dtype": transformer.dtype, "device": transformer.device}

    def call() -> Any:
        latents = torch.empty(samples, config.in_channels, *(config.sample_size,) * 3, **place)
        tokens = torch.empty(samples - unconditional, 1 + _PATCHES**2, config.cross_attention_dim, **place)
        timestep = torch.empty(samples, device=transformer.device)
        return transformer(latents, timestep, tokens, num_unconditional=unconditional)

    return call


def dense_decoder(vae: Any, latent_resolution: int) -> Callable[[], Any]:
    """The decoding of a dense grid."""
    size = (1, vae.config.latent_channels, *(latent_resolution,) * 3)
    return lambda: vae.decode(torch.empty(size, dtype=vae.dtype, device=vae.device))


def dense_autoencoder(vae: Any, samples: int) -> Callable[[], Any]:
    """The encoding of dense grids and the decoding of their latents."""
    size = (samples, vae.config.in_channels, *(vae.config.sample_size,) * 3)
    return lambda: vae(torch.empty(size, dtype=vae.dtype, device=vae.device))


def sparse_transformer(original: Any, samples: int) -> Callable[[], Any]:
    """A step of a sparse stage."""
    transformer, config = first_blocks(original), original.config
    place: dict[str, Any] = {"dtype": transformer.dtype, "device": transformer.device}
    coords = sphere_cells(config.sample_size, samples, transformer.device)
    encoder_coords: Tensor | None = None
    tokens_shape: tuple[int, ...] = (samples, 1 + _PATCHES**2, config.cross_attention_dim)
    if config.sparse_conditioning:
        side = torch.arange(int(_PATCHES / 2**0.5), dtype=torch.int32, device=transformer.device)
        patches = F.pad(torch.cartesian_prod(side, side), (1, 1))
        encoder_coords = torch.cat([patches + patches.new_tensor([sample, 0, 0, 0]) for sample in range(samples)])
        tokens_shape = (len(encoder_coords), config.cross_attention_dim)
    cache, encoder_cache = transformer.plan(coords, samples, encoder_coords)

    def call() -> Any:
        return transformer(
            torch.empty(len(coords), config.in_channels, **place),
            cache.coords,
            torch.empty(samples, device=transformer.device),
            torch.empty(tokens_shape, **place),
            encoder_coords=None if encoder_cache is None else encoder_cache.coords,
            check_inputs=False,
            cache=cache,
            encoder_cache=encoder_cache,
        )

    return call


def sparse_decoder(
    vae: Any, latent_resolution: int, return_features: bool = False, samples: int = 1
) -> Callable[[], Any]:
    """The decoding of sparse latents."""
    coords = sphere_cells(min(_DECODER_CELLS, latent_resolution), samples, vae.device)
    cache = vae.plan_decode(coords, samples)

    def call() -> Any:
        latents = torch.empty(len(coords), vae.config.latent_channels, dtype=vae.dtype, device=vae.device)
        options = {"return_features": return_features, "check_inputs": False, "cache": cache}
        return vae.decode(latents, cache.coords, **options)

    return call


def sparse_encoder(vae: Any, samples: int) -> Callable[[], Any]:
    """The encoding of narrow bands."""
    coords = sphere_cells(_ENCODER_VOXELS, samples, vae.device)
    cache = vae.plan_encode(coords, samples)
    return lambda: _encoded(vae, cache)


def sparse_autoencoder(vae: Any, samples: int) -> Callable[[], Any]:
    """The encoding of narrow bands and the decoding of their latents."""
    coords = sphere_cells(_ENCODER_VOXELS, samples, vae.device)
    cache = vae.plan(coords, samples)
    latent_cache = vae.latent_cache(cache)

    def call() -> Any:
        latents = _encoded(vae, cache).latent_dist.mode()
        return vae.decode(latents, latent_cache.coords, check_inputs=False, cache=latent_cache)

    return call


def _encoded(vae: Any, cache: CoordinateCache) -> Any:
    feats = torch.empty(len(cache.coords), vae.config.in_channels, dtype=vae.dtype, device=vae.device)
    return vae.encode(feats, cache.coords, check_inputs=False, cache=cache)


def refiner(model: Any, takes_features: bool) -> Callable[[], Any]:
    """The refinement of a patch."""
    config, place = model.config, {"dtype": model.dtype, "device": model.device}

    def patch(channels: int) -> Tensor:
        # The channels are last in memory, as `scatter_to_patches` lays them out.
        return torch.empty(1, *(config.patch_size,) * 3, channels, **place).movedim(-1, 1)

    if takes_features:
        return lambda: model(patch(config.in_channels), patch(config.feature_channels))
    cells = sphere_cells(_FIELD_RESOLUTION, 1, model.device)
    coarse_volume(torch.zeros(len(cells), config.in_channels, **place), cells, SIGN_DOWNSAMPLING)
    return lambda: model(patch(config.in_channels))
