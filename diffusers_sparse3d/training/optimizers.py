"""The optimizers that all training scripts share."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .configuration import TrainingConfig


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Returns the trained weights of linear layers inside repeated blocks, the children of every `ModuleList`."""
    matrices: dict[int, nn.Parameter] = {}
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList):
            for layer in blocks.modules():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    matrices[id(layer.weight)] = layer.weight  # type: ignore[assignment]  # torch declares it a Tensor
    return list(matrices.values())


def make_optimizers(config: TrainingConfig, module: nn.Module, fused: bool) -> list[Optimizer]:
    """Makes the optimizers of all parameters that require gradients, with the peaks of the schedule as learning rates.

    Args:
        config: Configuration of the training.
        module: Module to train.
        fused: Whether AdamW runs as one kernel, for parameters on a GPU.

    Raises:
        ValueError: if `config.optimizer` is "muon", but torch does not have it, or there is nothing for it to train.
        ImportError: if it is "adamw_8bit" and bitsandbytes is missing.
    """
    optimizers: list[Optimizer] = []
    matrices = []
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"`optimizer` must be 'adamw' with torch before 2.9, got 'muon' with torch {torch.__version__}"
            )
        matrices = block_matrices(module)
        learning_rate = config.learning_rate if config.muon_learning_rate is None else config.muon_learning_rate
        if not matrices:
            raise ValueError(
                "`optimizer` must be 'adamw' for a model without linear layers in repeated blocks, got 'muon'"
            )
        # Updates of the size of AdamW's, so that its learning rates and weight decay carry over.
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    taken = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in taken]
    optimizers.append(make_adamw(config, others, fused))
    return optimizers


def make_adamw(config: TrainingConfig, parameters: list[nn.Parameter], fused: bool) -> Optimizer:
    """Makes AdamW, with moments of 8 bits if `config.optimizer` is "adamw_8bit".

    Raises:
        ImportError: if that is so and bitsandbytes is missing.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError("`optimizer` 'adamw_8bit' needs bitsandbytes: `pip install bitsandbytes`") from error
        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=fused, **settings)
