"""Exponential moving averages of weights, on shards where the weights are sharded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .shards import local


class WeightAverages:
    """Exponential moving averages of parameters at several rates, in float32.

    The decay of update n is min(decay, n / (9 + n)), and 0 at the first, so that initial weights are soon forgotten.

    Args:
        parameters: The parameters by their names, tensors or DTensors.
        decays: Decay of each average.

    Attributes:
        values: For each decay, the average of each parameter, laid out over processes as the parameter.
        updates: Number of updates so far.
    """

    def __init__(self, parameters: dict[str, Tensor], decays: Sequence[float]):
        self.parameters, self.decays, self.updates = parameters, list(decays), 0
        self.values = [
            {name: parameter.detach().float().clone() for name, parameter in parameters.items()} for _ in decays
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the current parameters."""
        self.updates += 1
        current = [local(parameter).float() for parameter in self.parameters.values()]
        warm_up = self.updates / (9 + self.updates) if self.updates > 1 else 0.0
        for decay, values in zip(self.decays, self.values):
            torch._foreach_lerp_([local(value) for value in values.values()], current, 1 - min(decay, warm_up))

    @contextmanager
    def applied(self, index: int = 0) -> Iterator[None]:
        """Puts an average in place of the current parameters, which are kept on the CPU meanwhile."""
        if not self.decays:
            yield
            return
        kept = {name: local(parameter.detach()).cpu().clone() for name, parameter in self.parameters.items()}
        self.apply(index)
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                local(parameter.detach()).copy_(kept[name])

    def apply(self, index: int = 0) -> None:
        """Puts an average in place of the current parameters for good; does nothing if there is none."""
        if self.decays:
            for name, parameter in self.parameters.items():
                local(parameter.detach()).copy_(local(self.values[index][name]))
