"""Losses of the VAEs, and the distribution of noise levels that the transformers are trained at."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of `values` where `mask` is true, 0 if it is true nowhere, without waiting for the GPU."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def sparse_sdf_losses(
    sample: Tensor, target: Tensor, is_input: Tensor, is_sharp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the reconstruction losses of the sparse VAE (arXiv 2505.17412, section 3.1), each over its own voxels.

    Args:
        sample: Output of the decoder, `[V, 1]`.
        target: True values s / tau, `[V, 1]`; +1 and -1 outside of the narrow band.
        is_input: Whether a voxel is one of the encoder's input, `[V]` bool; the decoder adds all others.
        is_sharp: Whether a voxel is near a sharp edge, `[V]` bool.

    Returns:
        The mean squared errors over input, added and sharp voxels, three scalars.
    """
    error = F.mse_loss(sample.float(), target.float(), reduction="none")[:, 0]
    return masked_mean(error, is_input), masked_mean(error, ~is_input), masked_mean(error, is_sharp)


def dice_loss(logits: Tensor, occupancy: Tensor) -> Tensor:
    """Returns one minus the Dice coefficient of logits and occupancy, `[B, 1, X, Y, Z]`, averaged over samples."""
    probability, occupancy = logits.sigmoid().flatten(1), occupancy.flatten(1)
    overlap = (probability * occupancy).sum(1)
    return (1 - (2 * overlap + 1) / (probability.sum(1) + occupancy.sum(1) + 1)).mean()


def sample_sigmas(num_samples: int, sampling: str, shift: float, device: torch.device) -> Tensor:
    """Draws the noise levels in (0, 1) that a rectified flow is trained at.

    Args:
        num_samples: Number of noise levels.
        sampling: "logit_normal" (arXiv 2403.03206, section 3.1; mean 0, deviation 1) or "uniform".
        shift: Moves the levels towards noise, as `FlowMatchEulerDiscreteScheduler(shift=...)` does in sampling.
        device: Device of the result.

    Returns:
        `[num_samples]` float32.
    """
    if sampling == "logit_normal":
        sigmas = torch.randn(num_samples, device=device).sigmoid()
    else:
        sigmas = torch.rand(num_samples, device=device)
    return shift * sigmas / (1 + (shift - 1) * sigmas)
