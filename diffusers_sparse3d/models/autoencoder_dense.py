"""DenseVAE: the variational autoencoder of the dense occupancy grid (first stage)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..checks import check_integer
from ..ops.checks import check_floating
from .dense_tiling import apply_in_slices, apply_in_tiles
from .hub import HubModelMixin
from .normalization import ChannelLayerNorm
from .single_file import OriginalCheckpointMixin


class DenseResnetBlock(nn.Module):
    """Residual block of two layer norms, each with SiLU and a convolution: `[B, C, X, Y, Z]` in and out."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels, eps=eps)
        self.conv1 = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = ChannelLayerNorm(channels, eps=eps)
        self.conv2 = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        # The block starts as the identity.
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return residual + hidden_states


class DenseDownsample(nn.Module):
    """Strided 2x2x2 convolution that halves the resolution: `[B, in, X, Y, Z]` to `[B, out, X/2, Y/2, Z/2]`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(hidden_states)


class DenseUpsample(nn.Module):
    """3x3x3 convolution to 8 times the channels, then a pixel shuffle: `[B, in, X, ...]` to `[B, out, 2X, ...]`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.conv(hidden_states).unflatten(1, (-1, 2, 2, 2))
        batch_size, channels, _, _, _, x, y, z = hidden_states.shape
        hidden_states = hidden_states.permute(0, 1, 5, 2, 6, 3, 7, 4)
        return hidden_states.reshape(batch_size, channels, 2 * x, 2 * y, 2 * z)


class CheckpointedBlocks(nn.Module):
    """Base of encoder and decoder: runs blocks one after the other, with gradient checkpointing if it is on."""

    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def run_blocks(self, blocks: Iterable[nn.Module], hidden_states: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states


class DenseEncoder(CheckpointedBlocks):
    """`[B, in_channels, R, R, R]` to the moments `[B, 2 * latent_channels, r, r, r]`."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        mid_layers: int,
        norm_eps: float,
    ):
        super().__init__()
        self.conv_in = nn.Conv3d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        # One flat list, in the order of execution, as in the original parameter names.
        self.down_blocks = nn.ModuleList()
        for level, channels in enumerate(block_out_channels):
            self.down_blocks.extend(DenseResnetBlock(channels, norm_eps) for _ in range(layers_per_block))
            if level < len(block_out_channels) - 1:
                self.down_blocks.append(DenseDownsample(channels, block_out_channels[level + 1]))
        channels = block_out_channels[-1]
        self.mid_blocks = nn.ModuleList(DenseResnetBlock(channels, norm_eps) for _ in range(mid_layers))
        self.norm_out = ChannelLayerNorm(channels, eps=norm_eps)
        self.conv_out = nn.Conv3d(channels, 2 * latent_channels, kernel_size=3, padding=1)

    def forward(self, sample: Tensor, tile_size: int | None = None) -> Tensor:
        """With `tile_size`, in cells, the finest level is computed tile by tile."""
        blocks = list(self.down_blocks)
        first_level = next((i + 1 for i, block in enumerate(blocks) if isinstance(block, DenseDownsample)), 0)
        finest, coarser = blocks[:first_level], [*blocks[first_level:], *self.mid_blocks]

        def run_finest(sample: Tensor) -> Tensor:
            return self.run_blocks(finest, self.conv_in(sample))

        if tile_size is None or first_level == 0:
            hidden_states = run_finest(sample)
        else:
            # A cell of margin for each convolution, an even number of them.
            halo = 2 * first_level
            hidden_states = apply_in_tiles(run_finest, sample, tile_size, halo, Fraction(1, 2))
        return self.conv_out(F.silu(self.norm_out(self.run_blocks(coarser, hidden_states))))


class DenseDecoder(CheckpointedBlocks):
    """Latents `[B, latent_channels, r, r, r]` to logits `[B, out_channels, R, R, R]`."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        mid_layers: int,
        norm_eps: float,
    ):
        super().__init__()
        channels = block_out_channels[0]
        self.conv_in = nn.Conv3d(latent_channels, channels, kernel_size=3, padding=1)
        self.mid_blocks = nn.ModuleList(DenseResnetBlock(channels, norm_eps) for _ in range(mid_layers))
        self.up_blocks = nn.ModuleList()
        for level, channels in enumerate(block_out_channels):
            self.up_blocks.extend(DenseResnetBlock(channels, norm_eps) for _ in range(layers_per_block))
            if level < len(block_out_channels) - 1:
                self.up_blocks.append(DenseUpsample(channels, block_out_channels[level + 1]))
        self.norm_out = ChannelLayerNorm(block_out_channels[-1], eps=norm_eps)
        self.conv_out = nn.Conv3d(block_out_channels[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, latents: Tensor, tile_size: int | None = None) -> Tensor:
        """With `tile_size`, in cells of the output, the finest level is computed tile by tile."""
        blocks = list(self.up_blocks)
        levels = [i for i, block in enumerate(blocks) if isinstance(block, DenseUpsample)]
        last_level = levels[-1] if levels else len(blocks)
        finest = blocks[last_level:]

        def run_finest(hidden_states: Tensor) -> Tensor:
            return self.conv_out(F.silu(self.norm_out(self.run_blocks(finest, hidden_states))))

        hidden_states = self.run_blocks([*self.mid_blocks, *blocks[:last_level]], self.conv_in(latents))
        if tile_size is None or not levels:
            return run_finest(hidden_states)
        # A cell of margin for the convolution before the resolution doubles, half a cell for each one after it.
        halo = 1 + len(finest)
        return apply_in_tiles(run_finest, hidden_states, tile_size // 2, halo, Fraction(2))


class DenseVAE(HubModelMixin, PeftAdapterMixin, OriginalCheckpointMixin):
    r"""
    Variational autoencoder of a dense occupancy grid, which gives the active cells of the sparse stage.

    Cells of the grid `sample_size`^3 are the latent cells of the sparse VAE: with the published 64^3 grid those of the
    512^3 volume. Every level but the last halves the resolution.

    This model inherits from [`~diffusers.ModelMixin`]; see there for loading, saving and the like.

    Parameters:
        in_channels (`int`, defaults to `1`): Channels of the occupancy.
        out_channels (`int`, defaults to `1`): Channels of the logits.
        latent_channels (`int`, defaults to `8`): Channels of the latents.
        encoder_block_out_channels (`tuple[int, ...]`, defaults to `(32, 128, 512)`):
            Channels of the encoder's levels, finest first.
        decoder_block_out_channels (`tuple[int, ...]`, defaults to `(512, 128, 32)`):
            Channels of the decoder's levels, coarsest first.
        layers_per_block (`int`, defaults to `2`): Residual blocks of each encoder level.
        mid_layers (`int`, defaults to `2`): Residual blocks at the encoder's coarsest resolution, after the levels.
        decoder_layers_per_block (`int`, *optional*): The same for the decoder; `layers_per_block` if not given.
        decoder_mid_layers (`int`, *optional*): The same for the decoder; `mid_layers` if not given.
        sample_size (`int`, defaults to `64`): Resolution of the occupancy grid, in cells.
        norm_eps (`float`, defaults to `1e-5`): Epsilon of the channel layer norms, which compute in float32.
        scaling_factor (`float`, defaults to `1.0`): Latents of the diffusion model are
            `(latents - shift_factor) * scaling_factor`.
        shift_factor (`float`, defaults to `0.0`): See `scaling_factor`.
    """

    __module__ = "diffusers_sparse3d"  # the library that `model_index.json` names, not this file
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DenseResnetBlock"]
    _skip_layerwise_casting_patterns = ["norm"]
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        latent_channels: int = 8,
        encoder_block_out_channels: tuple[int, ...] = (32, 128, 512),
        decoder_block_out_channels: tuple[int, ...] = (512, 128, 32),
        layers_per_block: int = 2,
        mid_layers: int = 2,
        decoder_layers_per_block: int | None = None,
        decoder_mid_layers: int | None = None,
        sample_size: int = 64,
        norm_eps: float = 1e-5,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        if len(encoder_block_out_channels) != len(decoder_block_out_channels):
            raise ValueError(
                "`encoder_block_out_channels` and `decoder_block_out_channels` must have the same length, got"
                f" {len(encoder_block_out_channels)} and {len(decoder_block_out_channels)}"
            )
        self.spatial_compression_ratio = 2 ** (len(encoder_block_out_channels) - 1)
        self.encoder = DenseEncoder(
            in_channels, latent_channels, encoder_block_out_channels, layers_per_block, mid_layers, norm_eps
        )
        self.decoder = DenseDecoder(
            out_channels,
            latent_channels,
            decoder_block_out_channels,
            layers_per_block if decoder_layers_per_block is None else decoder_layers_per_block,
            mid_layers if decoder_mid_layers is None else decoder_mid_layers,
            norm_eps,
        )
        self.use_slicing = False
        self.use_tiling = False
        self.tile_size = 32

    def enable_tiling(self, tile_size: int | None = None) -> None:
        """Compute the finest level in spatial chunks: the same result (up to rounding) in less memory.

        Args:
            tile_size (`int`, *optional*): Edge of a chunk in cells of the occupancy grid, even; 32 at first.

        Raises:
            ValueError: if `tile_size` is not positive and even.
        """
        if tile_size is not None:
            if check_integer("tile_size", tile_size) < 2 or tile_size % 2:
                raise ValueError(f"`tile_size` must be positive and even, got {tile_size}")
            self.tile_size = tile_size
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode in one piece again."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode one sample of a batch after the other: the same result in less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches again."""
        self.use_slicing = False

    def _run_network(self, network: DenseEncoder | DenseDecoder, volume: Tensor) -> Tensor:
        """The result of the encoder or the decoder, in the pieces that are asked for."""
        run = partial(network, tile_size=self.tile_size if self.use_tiling else None)
        return apply_in_slices(run, volume) if self.use_slicing and len(volume) > 1 else run(volume)

    @apply_forward_hook
    def encode(
        self, occupancy: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """
        Encode occupancy grids.

        Args:
            occupancy (`torch.Tensor` of shape `(B, in_channels, R, R, R)`):
                0 (empty) or 1 (occupied), any dtype; mapped to -1 and 1 for the network.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.

        Returns:
            [`~diffusers.models.modeling_outputs.AutoencoderKLOutput`] or `tuple`: `latent_dist`, a diagonal Gaussian
            over `(B, latent_channels, r, r, r)`. Its `kl()` sums over all axes but the first and the last: take its
            `sum()`.

        Raises:
            TypeError: if `occupancy` is no tensor of real numbers.
            ValueError: if its shape does not fit.
        """
        if not isinstance(occupancy, Tensor) or occupancy.is_complex():
            kind = getattr(occupancy, "dtype", type(occupancy))
            raise TypeError(f"`occupancy` must be a tensor of real numbers, got {kind}")
        channels, ratio = self.config.in_channels, self.spatial_compression_ratio
        if occupancy.ndim != 5 or occupancy.shape[1] != channels or any(size % ratio for size in occupancy.shape[2:]):
            raise ValueError(
                f"`occupancy` must have shape [B, {channels}, X, Y, Z] with sizes that are multiples of {ratio}, got"
                f" {list(occupancy.shape)}"
            )
        posterior = DiagonalGaussianDistribution(self._run_network(self.encoder, occupancy.to(self.dtype) * 2 - 1))
        if not return_dict:
            return (posterior,)
        return AutoencoderKLOutput(latent_dist=posterior)

    @apply_forward_hook
    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """
        Decode latents to occupancy logits.

        Args:
            latents (`torch.Tensor` of shape `(B, latent_channels, r, r, r)`): Latents, not normalised.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: `sample`, logits of shape
            `(B, out_channels, R, R, R)`; a cell is taken as occupied from sigmoid 0.1 on.

        Raises:
            TypeError: if `latents` is no tensor.
            ValueError: if its shape or dtype does not fit.
        """
        check_floating(latents=latents)
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"`latents` must have shape [B, {self.config.latent_channels}, X, Y, Z], got {list(latents.shape)}"
            )
        sample = self._run_network(self.decoder, latents)
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def forward(
        self,
        occupancy: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode; `sample_posterior` draws latents with `generator` instead of taking the mean."""
        posterior = self.encode(occupancy).latent_dist
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)
