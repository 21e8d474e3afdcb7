"""SparseVAE: the variational autoencoder of sparse signed distance fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..checks import check_integer, check_number
from ..ops.coordinates import MAX_RESOLUTION, check_coords, invert_permutation, subdivide_coords
from ..sparse_tensor import CoordinateCache
from .cache_rows import compare_rows, nan_unless
from .embeddings import coordinate_embedding
from .hub import HubModelMixin
from .input_checks import check_features
from .outputs import SparseAutoencoderKLOutput, SparseDecoderOutput, SparseGaussianDistribution
from .planning import PlannedAutoencoderMixin, checks_values, plan_blocks
from .single_file import OriginalCheckpointMixin
from .sparse_blocks import SparseDownBlock, SparseUpBlock, make_window_block


NUM_LEVELS = 3
COMPRESSION_RATIO = 2**NUM_LEVELS
VOXELS_PER_LATENT = COMPRESSION_RATIO**3
# Margin around a tile, in latent cells, in which the input of each up block must be known for an exact output in the
# tile. Each block sees one cell further, by its convolutions before and after the split. The output needs no margin.
UP_BLOCK_HALOS = (3, 2, 1, 0)


class SparseEncoder(nn.Module):
    """Encoder of features `[N, in_channels]` to moments `[M, 2 * latent_channels]` on the grid 8 times coarser."""

    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: int,
        num_layers: int,
        num_attention_heads: int,
        window_size: int,
        norm_num_groups: int,
        exact_mean: bool,
    ):
        super().__init__()
        block_channels = (channels // 16, channels // 8, channels // 4, channels)
        self.conv_in = nn.Linear(in_channels, block_channels[0])
        self.down_blocks = nn.ModuleList(
            SparseDownBlock(block_channels[i], block_channels[i + 1], norm_num_groups, exact_mean)
            for i in range(NUM_LEVELS)
        )
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            make_window_block(channels, num_attention_heads, window_size, window_shift=window_size // 2 * (i % 2))
            for i in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(channels, eps=1e-5, elementwise_affine=False)
        self.proj_out = nn.Linear(channels, 2 * latent_channels)
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: Tensor, cache: CoordinateCache, coord_scale: float
    ) -> tuple[Tensor, CoordinateCache]:
        hidden_states = self.conv_in(hidden_states)
        for block in self.down_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cache)
            else:
                hidden_states = block(hidden_states, cache)
            cache, _ = cache.downsample(2)

        hidden_states = self.proj_in(hidden_states)
        position = coordinate_embedding(cache.coords[:, 1:], hidden_states.shape[1], coord_scale)
        hidden_states = hidden_states + position.to(hidden_states.dtype)
        plan_blocks(self.transformer_blocks, hidden_states, cache)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cache)
            else:
                hidden_states = block(hidden_states, cache)
        return self.proj_out(self.norm_out(hidden_states)), cache


class SparseDecoder(nn.Module):
    """Decoder of latents `[M, latent_channels]` to the output `[512 M, out_channels]`, with the features that the last
    layer sees, `[512 M, channels // 16]`."""

    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        channels: int,
        num_layers: int,
        num_attention_heads: int,
        window_size: int,
    ):
        super().__init__()
        block_channels = (channels, channels // 4, channels // 8, channels // 16)
        self.proj_in = nn.Linear(latent_channels, channels)
        self.transformer_blocks = nn.ModuleList(
            make_window_block(channels, num_attention_heads, window_size, window_shift=window_size // 2 * (i % 2))
            for i in range(num_layers)
        )
        self.up_blocks = nn.ModuleList(
            SparseUpBlock(block_channels[i], block_channels[i + 1]) for i in range(NUM_LEVELS)
        )
        self.conv_out = nn.Linear(block_channels[-1], out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        latents: Tensor,
        cache: CoordinateCache,
        coord_scale: float,
        return_features: bool = False,
        tile_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_states = self.proj_in(latents)
        position = coordinate_embedding(cache.coords[:, 1:], hidden_states.shape[1], coord_scale)
        hidden_states = hidden_states + position.to(hidden_states.dtype)
        plan_blocks(self.transformer_blocks, hidden_states, cache)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cache)
            else:
                hidden_states = block(hidden_states, cache)

        if tile_size is not None and cache.partition(tile_size).coords.shape[0] > 1:
            return self.upsample_tiled(hidden_states, cache, return_features, tile_size)

        for level, block in enumerate(self.up_blocks):
            if level > 0:
                cache = cache.subdivide()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cache)
            else:
                hidden_states = block(hidden_states, cache)
        sample = torch.tanh(self.conv_out(hidden_states))
        return sample, hidden_states if return_features else None

    def upsample_tiled(
        self, hidden_states: Tensor, cache: CoordinateCache, return_features: bool, tile_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """The up blocks and the output layer, tile by tile.

        Args:
            hidden_states: `[M, channels]` after the transformer blocks.
            cache: the latent voxels.
            return_features: also return what the output layer sees.
            tile_size: edge of a tile in latent cells; a tile is computed with the margin that it depends on.

        Returns:
            The output `[512 M, out_channels]` and, if asked for, the features, in the order of the untiled result.
        """
        tiles = cache.partition(tile_size)
        tile_rows, samples, features = [], [], []
        for tile in tiles.coords:
            # The Chebyshev distance to the tile in latent cells, which is not positive inside.
            lower = cache.coords[:, 1:] - tile[1:] * tile_size
            distance = torch.maximum(-lower, lower - (tile_size - 1)).amax(1)
            distance = distance.masked_fill(cache.coords[:, 0] != tile[0], MAX_RESOLUTION)
            rows = (distance <= UP_BLOCK_HALOS[0]).nonzero()[:, 0]
            tile_states = hidden_states[rows]
            for level, block in enumerate(self.up_blocks):
                level_cache = CoordinateCache(cache.coords[rows], cache.batch_size)
                for _ in range(level):
                    level_cache = level_cache.subdivide()
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    tile_states = self._gradient_checkpointing_func(block, tile_states, level_cache)
                else:
                    tile_states = block(tile_states, level_cache)
                keep = distance[rows] <= UP_BLOCK_HALOS[level + 1]
                tile_states = tile_states.unflatten(0, (rows.numel(), -1))[keep].flatten(0, 1)
                rows = rows[keep]
            tile_rows.append(rows)
            samples.append(torch.tanh(self.conv_out(tile_states)))
            if return_features:
                features.append(tile_states)
        inverse = invert_permutation(torch.cat(tile_rows))

        def restore_order(values: list[Tensor]) -> Tensor:
            return torch.cat(values).unflatten(0, (-1, VOXELS_PER_LATENT))[inverse].flatten(0, 1)

        return restore_order(samples), restore_order(features) if return_features else None


class SparseVAE(PlannedAutoencoderMixin, HubModelMixin, PeftAdapterMixin, OriginalCheckpointMixin):
    r"""
    Variational autoencoder of a sparse signed distance field, on a latent grid that is 8 times coarser and as sparse.

    Voxels are packed: all samples of a batch share one row axis and are told apart by `coords[:, 0]`. The order of the
    rows does not matter. Direct3D-S2 (arXiv 2505.17412), section 3.1.

    This model inherits from [`~diffusers.ModelMixin`]; see there for loading, saving and the like.

    Parameters:
        in_channels (`int`, defaults to `1`): Channels of the input, signed distance over tau.
        out_channels (`int`, defaults to `1`): Channels of the output.
        latent_channels (`int`, defaults to `16`): Channels of the latents.
        sample_size (`int`, defaults to `64`): Resolution of the latent grid that the model is meant for, in cells.
        encoder_channels (`int`, defaults to `512`):
            Width of the encoder's transformer; its convolutions have 1/16, 1/8 and 1/4 of it on the finer levels.
        encoder_layers (`int`, defaults to `4`): Transformer blocks of the encoder.
        encoder_heads (`int`, defaults to `8`): Attention heads of the encoder.
        decoder_channels (`int`, defaults to `512`): As `encoder_channels`, for the decoder.
        decoder_layers (`int`, defaults to `4`): Transformer blocks of the decoder.
        decoder_heads (`int`, defaults to `8`): Attention heads of the decoder.
        window_size (`int`, defaults to `8`):
            Edge of the attention windows in latent cells; they are shifted by half of it in every odd block.
        norm_num_groups (`int`, defaults to `32`): Groups of the group norms; a divisor of `encoder_channels / 16`.
        scaling_factor (`float`, defaults to `1.0`): Latents of the diffusion model are
            `(latents - shift_factor) * scaling_factor`.
        shift_factor (`float`, defaults to `0.0`): See `scaling_factor`.
        exact_mean (`bool`, defaults to `False`):
            Pool by the mean of the children. The published model divides by their number plus one.
    """

    __module__ = "diffusers_sparse3d"  # the library that `model_index.json` names, not this file
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SparseWindowBlock", "ShiftedSparseWindowBlock", "SparseDownBlock", "SparseUpBlock"]
    _repeated_blocks = ["SparseWindowBlock", "ShiftedSparseWindowBlock"]
    _skip_layerwise_casting_patterns = ["norm"]
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        latent_channels: int = 16,
        sample_size: int = 64,
        encoder_channels: int = 512,
        encoder_layers: int = 4,
        encoder_heads: int = 8,
        decoder_channels: int = 512,
        decoder_layers: int = 4,
        decoder_heads: int = 8,
        window_size: int = 8,
        norm_num_groups: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        exact_mean: bool = False,
    ):
        super().__init__()
        self.spatial_compression_ratio = COMPRESSION_RATIO
        self.encoder = SparseEncoder(
            in_channels,
            latent_channels,
            encoder_channels,
            encoder_layers,
            encoder_heads,
            window_size,
            norm_num_groups,
            exact_mean,
        )
        self.decoder = SparseDecoder(
            out_channels, latent_channels, decoder_channels, decoder_layers, decoder_heads, window_size
        )
        self.use_tiling = False
        self.tile_size = 32

    def enable_tiling(self, tile_size: int | None = None) -> None:
        """Decode in spatial chunks: the same result (up to rounding) in a fraction of the memory.

        Args:
            tile_size (`int`, *optional*): Edge of a chunk in latent cells; 32 at first.

        Raises:
            ValueError: if `tile_size` is not positive.
        """
        if tile_size is not None:
            self.tile_size = check_integer("tile_size", tile_size, 1)
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Decode in one step again."""
        self.use_tiling = False

    @apply_forward_hook
    def encode(
        self,
        feats: Tensor,
        coords: Tensor,
        coord_scale: float = 1.0,
        return_dict: bool = True,
        check_inputs: bool = True,
        cache: CoordinateCache | None = None,
    ) -> SparseAutoencoderKLOutput | tuple[SparseGaussianDistribution, Tensor]:
        """
        Encode sparse signed distance fields.

        Args:
            feats (`torch.Tensor` of shape `(N, in_channels)`): Signed distance over tau, in (-1, 1).
            coords (`torch.Tensor` of shape `(N, 4)`): int32 (batch, x, y, z), distinct rows in any order.
            coord_scale (`float`, defaults to `1.0`):
                Multiplies the latent coordinates before the position embedding.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.
            check_inputs (`bool`, defaults to `True`): Check the values of the arguments (reductions, at most a sort).
            cache (`CoordinateCache`, *optional*): What is derived from `coords`, from `plan_encode`.

        Returns:
            [`SparseAutoencoderKLOutput`] or `tuple`: `latent_dist` and the latent `coords`, ascending.

        Raises:
            ValueError: if a shape or dtype does not fit; with `check_inputs` also if `coords` is out of range or has
                duplicates, or `feats` is not finite.
        """
        check_inputs = checks_values(check_inputs)
        check_features(feats, coords, "feats", self.config.in_channels, check_inputs, cache)
        batch_size = None
        if check_inputs:
            batch_size = check_coords(coords, MAX_RESOLUTION)
            check_number("coord_scale", coord_scale)
        feats = nan_unless(feats, compare_rows("cache", cache, coords))
        cache = CoordinateCache(coords, batch_size) if cache is None else cache
        moments, cache = self.encoder(feats.to(self.dtype), cache, coord_scale)
        posterior = SparseGaussianDistribution(moments.to(torch.promote_types(moments.dtype, torch.float32)))
        if not return_dict:
            return (posterior, cache.coords)
        return SparseAutoencoderKLOutput(latent_dist=posterior, coords=cache.coords)

    @apply_forward_hook
    def decode(
        self,
        latents: Tensor,
        coords: Tensor,
        coord_scale: float = 1.0,
        return_features: bool = False,
        return_dict: bool = True,
        check_inputs: bool = True,
        cache: CoordinateCache | None = None,
    ) -> SparseDecoderOutput | tuple[Tensor, ...]:
        """
        Decode latents to a signed distance for each of the 512 voxels of every latent voxel.

        Args:
            latents (`torch.Tensor` of shape `(M, latent_channels)`): Latents, not normalised.
            coords (`torch.Tensor` of shape `(M, 4)`): int32 (batch, x, y, z), distinct rows in any order.
            coord_scale (`float`, defaults to `1.0`): Multiplies the coordinates before the position embedding.
            return_features (`bool`, defaults to `False`): Also return the features before the last layer.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.
            check_inputs (`bool`, defaults to `True`): Check the values of the arguments (reductions, at most a sort).
            cache (`CoordinateCache`, *optional*): What is derived from `coords`, from `plan_decode`.

        Returns:
            [`SparseDecoderOutput`] or `tuple`: `sample`, `coords` and, if asked for, `features`.

        Raises:
            ValueError: if a shape or dtype does not fit; with `check_inputs` also if `coords` is out of range or has
                duplicates, or `latents` is not finite.
        """
        check_inputs = checks_values(check_inputs)
        check_features(latents, coords, "latents", self.config.latent_channels, check_inputs, cache)
        batch_size = None
        if check_inputs:
            batch_size = check_coords(coords, MAX_RESOLUTION // COMPRESSION_RATIO)
            check_number("coord_scale", coord_scale)
        latents = nan_unless(latents, compare_rows("cache", cache, coords))
        sample, features = self.decoder(
            latents.to(self.dtype),
            CoordinateCache(coords, batch_size) if cache is None else cache,
            coord_scale,
            return_features,
            self.tile_size if self.use_tiling else None,
        )
        for _ in range(NUM_LEVELS):
            coords = subdivide_coords(coords)
        if not return_dict:
            return (sample, coords, features) if return_features else (sample, coords)
        return SparseDecoderOutput(sample=sample, coords=coords, features=features)

    def forward(
        self,
        feats: Tensor,
        coords: Tensor,
        coord_scale: float = 1.0,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        cache: CoordinateCache | None = None,
    ) -> SparseDecoderOutput | tuple[Tensor, ...]:
        """
        Encode and decode; `sample_posterior` draws latents with `generator` instead of taking the mean. `cache` is of
        `coords`, from `plan`.
        """
        posterior, latent_coords = self.encode(feats, coords, coord_scale, return_dict=False, cache=cache)
        cache = None if cache is None else self.latent_cache(cache)
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        options = {"return_dict": return_dict, "check_inputs": False, "cache": cache}
        return self.decode(latents, latent_coords, coord_scale, **options)
