"""An autoencoder of mixed formats: features of the surface pooled to sparse latents, signed distances out.

As in TRELLIS (arXiv 2412.01506), whose features are those of an image encoder seen from many sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.claims.surface_points import SurfacePoints
from diffusers_sparse3d.models.autoencoder_sparse import SparseDecoder
from diffusers_sparse3d.models.embeddings import coordinate_embedding
from diffusers_sparse3d.models.outputs import SparseGaussianDistribution
from diffusers_sparse3d.models.planning import plan_blocks
from diffusers_sparse3d.models.sparse_blocks import make_window_block
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from diffusers_sparse3d.training.dataset import BLOCK_SIZE


class MixedFormatVAE(nn.Module):
    """
    Autoencoder with the latents and the decoder of SparseVAE, and an encoder of points.

    Args:
        latent_channels: channels of a latent.
        encoder_channels, encoder_layers, encoder_heads: of the encoder's transformer in windows.
        point_channels: width of the two layers that each point passes before it is pooled.
        decoder_channels, decoder_layers, decoder_heads: as of SparseVAE.
        window_size: edge of the windows in latent cells.
    """

    def __init__(
        self,
        latent_channels: int = 8,
        encoder_channels: int = 192,
        encoder_layers: int = 5,
        encoder_heads: int = 6,
        point_channels: int = 96,
        decoder_channels: int = 256,
        decoder_layers: int = 2,
        decoder_heads: int = 8,
        window_size: int = 8,
    ):
        super().__init__()
        self.point_in, self.point_out = nn.Linear(6, point_channels), nn.Linear(point_channels, point_channels)
        self.proj_in = nn.Linear(point_channels, encoder_channels)
        self.encoder = nn.ModuleList(
            make_window_block(encoder_channels, encoder_heads, window_size, window_size // 2 * (layer % 2))
            for layer in range(encoder_layers)
        )
        self.moments = nn.Sequential(
            nn.LayerNorm(encoder_channels, elementwise_affine=False), nn.Linear(encoder_channels, 2 * latent_channels)
        )
        self.decoder = SparseDecoder(1, latent_channels, decoder_channels, decoder_layers, decoder_heads, window_size)

    def encode(self, points: SurfacePoints, cache: CoordinateCache) -> SparseGaussianDistribution:
        """
        Args:
            points: on the surfaces of the batch, each from one of the cells.
            cache: the cells, latent coordinates `[M, 4]`.

        Returns:
            The posterior; its moments are `[M, 2 latent_channels]`.
        """
        inside = (points.places - BLOCK_SIZE * cache.coords[points.rows, 1:]) / BLOCK_SIZE - 0.5
        features = self.point_out(F.silu(self.point_in(torch.cat([inside, points.normals], dim=1))))
        sums = torch.zeros(len(cache.coords), features.shape[1], device=features.device)
        sums = sums.index_add(0, points.rows, features.float())
        counts = torch.bincount(points.rows, minlength=len(sums))[:, None]
        tokens = self.proj_in(F.silu(sums / counts.clamp(min=1)))
        tokens = tokens + coordinate_embedding(cache.coords[:, 1:], tokens.shape[1], 1.0).to(tokens.dtype)
        plan_blocks(self.encoder, tokens, cache)
        for block in self.encoder:
            tokens = block(tokens, cache)
        return SparseGaussianDistribution(self.moments(tokens).float())

    def decode(self, latents: Tensor, cache: CoordinateCache) -> Tensor:
        """Latents `[M, latent_channels]` to s / tau `[512 M, 1]`, in the row order of SparseVAE's decoder."""
        return self.decoder(latents, cache, 1.0)[0]
