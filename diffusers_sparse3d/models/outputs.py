"""Outputs of the sparse VAE and of the refiners."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch import Tensor


class SparseGaussianDistribution(DiagonalGaussianDistribution):
    """Diagonal Gaussian over packed latents, from `[M, 2 C]` moments: mean and log-variance (clamped to [-30, 20])."""

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, element by element: `[M, C]`, nats.

        Sum over the last axis for the divergence of a latent voxel; the published loss takes the mean of all.
        """
        return 0.5 * (self.mean.square() + self.var - 1 - self.logvar)


@dataclass
class SparseAutoencoderKLOutput(BaseOutput):
    """Output of `SparseVAE.encode`.

    Args:
        latent_dist (`SparseGaussianDistribution`): Distribution of the latents `[M, latent_channels]`.
        coords (`torch.Tensor`): `[M, 4]` int32 latent coordinates (batch, x, y, z), in ascending order.
    """

    latent_dist: SparseGaussianDistribution
    coords: Tensor


@dataclass
class SparseDecoderOutput(BaseOutput):
    """Output of `SparseVAE.decode`.

    Args:
        sample (`torch.Tensor`): `[512 * M, out_channels]`, signed distance over tau, in (-1, 1), positive outside.
        coords (`torch.Tensor`):
            `[512 * M, 4]` int32 (batch, x, y, z): latent i has rows 512 * i to 512 * i + 511, nested subdivisions
            into eight, child 4 x + 2 y + z.
        features (`torch.Tensor`, *optional*): `[512 * M, decoder_channels // 16]`, what the last layer sees.
    """

    sample: Tensor
    coords: Tensor
    features: Tensor | None = None


@dataclass
class SDFRefinerPatchOutput(BaseOutput):
    """Output of a refiner's `forward`.

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, X, Y, Z)`): Signed distance over tau, or logits of the sign.
    """

    sample: Tensor


@dataclass
class SDFRefinerOutput(BaseOutput):
    """Output of a refiner's `refine`.

    Args:
        sample (`torch.Tensor` of shape `(M, out_channels)`): Signed distance over tau, positive outside.
        coords (`torch.Tensor` of shape `(M, 4)`): int32 (batch, x, y, z) of the rows.
    """

    sample: Tensor
    coords: Tensor
