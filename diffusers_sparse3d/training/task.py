"""What the training loop trains: a module that computes the losses of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from .files import complete_folder
from .losses import Loss


if TYPE_CHECKING:
    from .kernel_compilation import ModelExample


class Task(nn.Module):
    """A module to train, whose forward pass computes the losses of a batch.

    Attributes:
        loss_weights: Weights of the losses that are minimised, by their names: of each, the mean over all of its
            elements in the global batch.
    """

    loss_weights: dict[str, float]
    # Classes of blocks that FSDP2 shards one by one, where the launcher names none.
    _no_split_modules: list[str] | None = None

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the number of elements of each loss in `loss_weights`, scalars, from the batch alone."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> dict[str, Loss]:
        """Returns the losses of a batch, always under the same names; those of `loss_weights` have its `counts`."""
        raise NotImplementedError

    def kernel_examples(self, validates: bool) -> list[ModelExample]:
        """Returns examples of what a step does, and a validation if there will be any, with kernels of our own."""
        return []

    def models(self) -> dict[str, Any]:
        """Returns what is saved after training, objects with `save_pretrained`, by the names of their folders."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Saves what `models` returns, each in a folder of its own, which is complete or as it was."""
        for name, model in self.models().items():
            with complete_folder(folder / name) as partial:
                model.save_pretrained(partial)

    def pictures(self, batch: dict[str, Any]) -> Image.Image:
        """Draws what the model makes of a validation batch."""
        raise NotImplementedError

    def keep_frozen(self, **models: nn.Module) -> None:
        """Makes frozen models attributes that are no submodules, hence not wrapped, sharded, averaged or saved."""
        for name, model in models.items():
            self.__dict__[name] = model.requires_grad_(False).eval()

    def move(self, device: torch.device) -> None:
        """Moves the module and its frozen models; `to` moves the module alone, which FSDP2 does by way of "meta"."""
        self.to(device)
        for value in list(vars(self).values()):
            if isinstance(value, nn.Module):
                value.to(device)


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Returns the sum of the weighted means of losses, which is what is minimised."""
    return torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()
