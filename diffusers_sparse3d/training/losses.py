"""The training objectives."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` holds, 0 if it holds nowhere; without a transfer from the GPU."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def sparse_sdf_losses(
    sample: Tensor, target: Tensor, is_input: Tensor, is_sharp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reconstruction terms of the sparse VAE (arXiv 2505.17412, section 3.1), each the mean over its own voxels.

    Args:
        sample: `[V, 1]`, the decoder's output.
        target: `[V, 1]`, s / tau, +1 and -1 outside of the band.
        is_input: `[V]` bool, voxels of the encoder's input; all others were added by the decoder.
        is_sharp: `[V]` bool, voxels near sharp edges.

    Returns:
        The mean squared errors of input, added and sharp voxels.
    """
    error = F.mse_loss(sample.float(), target.float(), reduction="none")[:, 0]
    return masked_mean(error, is_input), masked_mean(error, ~is_input), masked_mean(error, is_sharp)


def dice_loss(logits: Tensor, occupancy: Tensor) -> Tensor:
    """One minus the Dice coefficient of the predicted and the true occupancy, `[B, 1, X, Y, Z]`, mean over samples."""
    probability, occupancy = logits.sigmoid().flatten(1), occupancy.flatten(1)
    overlap = (probability * occupancy).sum(1)
    return (1 - (2 * overlap + 1) / (probability.sum(1) + occupancy.sum(1) + 1)).mean()


def sample_sigmas(num_samples: int, sampling: str, shift: float, device: torch.device) -> Tensor:
    """Noise levels in (0, 1) for training a rectified flow.

    Args:
        num_samples: how many.
        sampling: "logit_normal" (arXiv 2403.03206, section 3.1; mean 0, deviation 1) or "uniform".
        shift: moves them towards noise, as `FlowMatchEulerDiscreteScheduler(shift=...)` does in sampling.
        device: where.

    Returns:
        `[num_samples]` float32.
    """
    if sampling == "logit_normal":
        sigmas = torch.randn(num_samples, device=device).sigmoid()
    else:
        sigmas = torch.rand(num_samples, device=device)
    return shift * sigmas / (1 + (shift - 1) * sigmas)
