"""Losses as sums over elements, and those of the VAEs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """A loss as its sum over elements and their number, so that means over batches and processes are exact.

    Attributes:
        total: Sum over the elements, a scalar.
        number: Number of the elements, a scalar.
    """

    total: Tensor
    number: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over the elements; 0 if there are none."""
        return self.total / self.number.clamp(min=1)


def whole_number(number: int, device: torch.device) -> Tensor:
    """Returns a number as a scalar int64 tensor, for which a GPU is not waited for as it is for a copy to it."""
    return torch.full((), number, dtype=torch.int64, device=device)


def masked_loss(values: Tensor, mask: Tensor) -> Loss:
    """Returns the loss over the elements where `mask` is true, without waiting for the GPU."""
    return Loss((values * mask).sum(), mask.sum())


def mean_loss(values: Tensor, count: Tensor | None = None) -> Loss:
    """Returns the loss over all of `values`; as a mean over `count` elements if that is given."""
    if count is None:
        count = whole_number(values.numel(), values.device)
    return Loss(values.float().mean() * count, count)


class LossSums:
    """Running sums of losses over batches, which become means over all processes when they are read.

    Attributes:
        sums: Sum and number of the elements of each loss, `[2]` float64.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Loss]) -> None:
        """Adds the losses of a batch."""
        for name, loss in losses.items():
            pair = torch.stack([loss.total.detach().double(), loss.number.double()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self, reduce: Callable[[Tensor], Tensor], weights: dict[str, float]) -> dict[str, float]:
        """Returns the mean of each loss that has elements and, as "loss", their weighted sum.

        Args:
            reduce: Adds a tensor up over all processes, which have the same names.
            weights: Weights of the losses that are minimised.
        """
        totals, counts = reduce(torch.stack(list(self.sums.values()))).cpu().unbind(1)
        means = dict(zip(self.sums, (totals / counts.clamp(min=1e-12)).tolist()))
        loss = sum(weight * means[name] for name, weight in weights.items())
        present = zip(means.items(), (counts > 0).tolist())
        return {"loss": loss, **{name: mean for (name, mean), found in present if found and name != "loss"}}


def sparse_sdf_losses(sample: Tensor, target: Tensor, is_input: Tensor, is_sharp: Tensor) -> tuple[Loss, Loss, Loss]:
    """Returns the reconstruction losses of the sparse VAE (arXiv 2505.17412, section 3.1), each over its own voxels.

    Args:
        sample: Output of the decoder, `[V, 1]`.
        target: True values s / tau, `[V, 1]`; +1 and -1 outside of the narrow band.
        is_input: Whether a voxel is one of the encoder's input, `[V]` bool; the decoder adds all others.
        is_sharp: Whether a voxel is near a sharp edge, `[V]` bool.

    Returns:
        The squared errors over input, added and sharp voxels.
    """
    error = F.mse_loss(sample.float(), target.float(), reduction="none")[:, 0]
    return masked_loss(error, is_input), masked_loss(error, ~is_input), masked_loss(error, is_sharp)


def sign_loss(sample: Tensor, target: Tensor, is_input: Tensor) -> Loss:
    """Returns how far added voxels are on the wrong side of the surface: 0 for the right sign, else the value's size.

    Args:
        sample, target, is_input: See `sparse_sdf_losses`.
    """
    wrong = F.relu(-sample.float() * target.float().sign())[:, 0]
    return masked_loss(wrong, ~is_input)


def has_normal(in_band: Tensor) -> Tensor:
    """Returns where the samples `[M, 8, 8, 8]` of blocks and the next ones in x, y and z are all in the band.

    `[M, 7, 7, 7]` bool, without the last sample of each axis, whose neighbour is in another block.
    """
    first = in_band[:, :-1, :-1, :-1]
    return first & in_band[:, 1:, :-1, :-1] & in_band[:, :-1, 1:, :-1] & in_band[:, :-1, :-1, 1:]


def normal_loss(sample: Tensor, target: Tensor, in_band: Tensor) -> Loss:
    """Returns one minus the cosine of the angle between the gradients of two SDFs, by forward differences in blocks.

    Args:
        sample: Distances that the decoder gives, `[M, 8, 8, 8]`.
        target: True distances, `[M, 8, 8, 8]`.
        in_band: Whether samples are in the narrow band, `[M, 8, 8, 8]` bool; the loss is over those of `has_normal`.
    """

    def gradients(grid: Tensor) -> Tensor:
        first = grid[:, :-1, :-1, :-1]
        neighbours = (grid[:, 1:, :-1, :-1], grid[:, :-1, 1:, :-1], grid[:, :-1, :-1, 1:])
        return torch.stack([neighbour - first for neighbour in neighbours])

    cosine = F.cosine_similarity(gradients(sample.float()), gradients(target.float()), dim=0, eps=1e-4)
    return masked_loss(1 - cosine, has_normal(in_band))


def dice_loss(logits: Tensor, occupancy: Tensor) -> Tensor:
    """Returns one minus the Dice coefficient of logits and occupancy, `[B, 1, X, Y, Z]`, for each sample: `[B]`."""
    probability, occupancy = logits.sigmoid().flatten(1), occupancy.flatten(1)
    overlap = (probability * occupancy).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + occupancy.sum(1) + 1)
