"""A vector-set autoencoder: points in, a set of latents, distances at query points out (arXiv 2301.11445)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_sparse3d.models.outputs import SparseGaussianDistribution


class SetBlock(nn.Module):
    """Transformer block over sets: attention to another set or to itself, and an MLP; `[B, L, dim]` in and out."""

    def __init__(self, dim: int, heads: int, cross: bool = False):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.to_q, self.to_kv, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        normed = self.norm1(tokens)
        source = normed if context is None or self.norm_context is None else self.norm_context(context)
        parts = (self.to_q(normed), *self.to_kv(source).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.to_out(attended)
        return tokens + self.ff(self.norm2(tokens))


class VectorSetVAE(nn.Module):
    """
    Autoencoder with a set of latents without places.

    The first of the points are the queries of the encoder, as in 3DShape2VecSet, whose farthest points are replaced by
    random ones.

    Args:
        num_latents: latents of a shape.
        latent_channels: channels of a latent.
        channels: width of the transformer.
        heads: attention heads.
        encoder_layers, decoder_layers: self-attention blocks of the encoder and the decoder.
        num_frequencies: octaves of the embedding of places.
    """

    def __init__(
        self,
        num_latents: int = 512,
        latent_channels: int = 24,
        channels: int = 192,
        heads: int = 6,
        encoder_layers: int = 1,
        decoder_layers: int = 7,
        num_frequencies: int = 8,
    ):
        super().__init__()
        self.num_latents, self.num_frequencies = num_latents, num_frequencies
        embedded = 3 * (2 * num_frequencies + 1)
        self.point_in, self.query_in = nn.Linear(embedded + 3, channels), nn.Linear(embedded, channels)
        self.read = SetBlock(channels, heads, cross=True)
        self.encoder = nn.ModuleList(SetBlock(channels, heads) for _ in range(encoder_layers))
        self.moments = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 2 * latent_channels))
        self.latent_in = nn.Linear(latent_channels, channels)
        self.decoder = nn.ModuleList(SetBlock(channels, heads) for _ in range(decoder_layers))
        self.write = SetBlock(channels, heads, cross=True)
        self.distance_out = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 1))

    def embed(self, places: Tensor) -> Tensor:
        """Places `[..., 3]` in [-1, 1] and their sines and cosines, `[..., 3 (2 F + 1)]`."""
        octaves = math.pi * 2 ** torch.arange(self.num_frequencies, device=places.device)
        angles = (places[..., None] * octaves).flatten(-2)
        return torch.cat([places, angles.sin(), angles.cos()], dim=-1)

    def encode(self, places: Tensor, normals: Tensor) -> SparseGaussianDistribution:
        """
        Args:
            places: `[B, P, 3]` in [-1, 1], points on the surface in random order, at least `num_latents`.
            normals: `[B, P, 3]`.

        Returns:
            The posterior; its moments are `[B * num_latents, 2 latent_channels]`.
        """
        points = self.point_in(torch.cat([self.embed(places), normals], dim=-1))
        tokens = self.read(points[:, : self.num_latents], points)
        for block in self.encoder:
            tokens = block(tokens)
        return SparseGaussianDistribution(self.moments(tokens).flatten(0, 1).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B * num_latents, latent_channels]` to what queries attend to, `[B, num_latents, channels]`."""
        tokens = self.latent_in(latents).unflatten(0, (-1, self.num_latents))
        for block in self.decoder:
            tokens = block(tokens)
        return tokens

    def query(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Distances s / tau in (-1, 1) at `places [B, Q, 3]` in [-1, 1]: `[B, Q]`; `tokens` are of `decode`."""
        hidden = self.write(self.query_in(self.embed(places)), tokens)
        return torch.tanh(self.distance_out(hidden)[..., 0])
