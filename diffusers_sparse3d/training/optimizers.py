"""The optimizers that all training scripts share."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .configuration import TrainingConfig, check_optimizer_support
from .muon import MuonAdamW


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Returns the trained weights of linear layers inside repeated blocks, the children of every `ModuleList`."""
    matrices: dict[int, nn.Parameter] = {}
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList):
            for layer in blocks.modules():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    matrices[id(layer.weight)] = layer.weight  # type: ignore[assignment]  # torch declares it a Tensor
    return list(matrices.values())


def make_optimizer(config: TrainingConfig, module: nn.Module, fused: bool) -> Optimizer:
    """Makes the optimizer of all parameters that require gradients, with the peaks of the schedule as learning rates.

    Args:
        config: Configuration of the training.
        module: Module to train.
        fused: Whether AdamW runs as one kernel, for parameters on a GPU.

    Raises:
        ValueError: if nothing is trained, or if `config.optimizer` is "muon" and there is nothing for it to train.
        ImportError: if it is "adamw_8bit" and bitsandbytes is missing.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("`task` must have parameters that require gradients, got none")
    if config.optimizer != "muon":
        return make_adamw(config, parameters, fused)
    matrices = block_matrices(module)
    if not matrices:
        raise ValueError(
            "`optimizer` must be 'adamw' for a model without linear layers in repeated blocks, got 'muon'"
        )
    taken = {id(parameter) for parameter in matrices}
    return MuonAdamW(
        matrices,
        [parameter for parameter in parameters if id(parameter) not in taken],
        muon_learning_rate=config.learning_rate if config.muon_learning_rate is None else config.muon_learning_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=fused,
    )


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
        check_optimizer_support(config.optimizer)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=fused, **settings)
