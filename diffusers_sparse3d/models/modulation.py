"""Adaptive layer norm of the diffusion transformers, and their initialisation (DiT, arXiv 2212.09748)."""

from __future__ import annotations

from torch import nn

from .sparse_layers import SparseConv3d


class Modulation(nn.Sequential):
    """SiLU and a linear layer: timestep embedding `[B, dim]` to `[B, 6 * dim]`.

    The result is shift, scale and gate of attention, then those of the MLP.
    """

    def __init__(self, dim: int):
        super().__init__(nn.SiLU(), nn.Linear(dim, 6 * dim))


def initialize_weights(model: nn.Module, time_embedding: nn.Module, output_layer: nn.Linear) -> None:
    """Initialise a diffusion transformer as DiT does, in place.

    Linear layers are Xavier uniform without bias, those of the timestep embedding normal with deviation 0.02. The
    modulations and the output layer are zero, so that every gate is closed and the model returns zeros.

    Args:
        model: the transformer.
        time_embedding: its timestep embedding.
        output_layer: its last layer.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SparseConv3d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for layer in time_embedding.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    for module in (output_layer, *(module for module in model.modules() if isinstance(module, Modulation))):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
