"""What a checkpoint holds: weights, their averages, the optimizer's state, counters and random states.

All tensors are whole, whatever way they were sharded, and known by the names of the parameters, so that a training can
go on with another number of processes, and under DDP or FSDP2 whichever it was before.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from . import deepspeed_state
from .averages import WeightAverages
from .checkpoints import RANDOM_STATE
from .distributed import on_main_process
from .losses import LossSums
from .random_state import gather_random_states, set_random_state
from .sampler import derive_seed
from .schedule import Clock
from .shards import clean_name, gather, scatter, share


logger = logging.getLogger(__name__)

STATE = "state.json"


@dataclass
class TrainingState:
    """The parts of a training that change from step to step.

    Attributes:
        accelerator: Accelerator of the training.
        task: The module that is trained, after `prepare`.
        optimizer: Its optimizer, after `prepare`.
        averages: Averages of its parameters.
        clock: Counts steps and seconds.
        losses: Sums of the losses since the last entry of the log.
        seed: Seed of the training.
    """

    accelerator: Accelerator
    task: nn.Module
    optimizer: Optimizer
    averages: WeightAverages
    clock: Clock
    losses: LossSums = field(default_factory=LossSums)
    seed: int = 0

    def files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Gives name and contents of each file of a checkpoint, tensors on the CPU or values of JSON.

        All processes must go through them together; in all but the main one they are empty.
        """
        accelerator, parameters = self.accelerator, trained_parameters(self.task)
        weights = model_tensors(self.task)
        numbers: dict[str, float] = {}
        if deepspeed_state.uses_deepspeed(accelerator):
            weights |= deepspeed_state.master_weights(parameters)
            moments = deepspeed_state.moments(parameters, self.optimizer)
        else:
            moments, numbers = optimizer_state(parameters, self.optimizer)
        files: dict[str, dict[str, Tensor]] = {"model.safetensors": weights}
        for decay, values in zip(self.averages.decays, self.averages.values):
            files[average_file(decay)] = values
        files["optimizer.safetensors"] = moments
        # One file after the other, so that the CPU never has to hold more than one.
        for name, tensors in files.items():
            yield name, gather(tensors, accelerator.is_main_process)
        yield RANDOM_STATE, gather_random_states(accelerator)
        sums = {name: accelerator.reduce(pair).tolist() for name, pair in self.losses.sums.items()}
        yield (
            STATE,
            {
                **self.clock.state_dict(),
                "average_updates": self.averages.updates,
                "losses": sums,
                "optimizer": numbers,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
            },
        )

    def load(self, folder: Path | None) -> None:
        """Continues from the state in a folder; all processes must call this together, all but the main one with None.

        Raises:
            ValueError: if it is the state of another model.
        """
        accelerator, parameters = self.accelerator, trained_parameters(self.task)
        deepspeed = deepspeed_state.uses_deepspeed(accelerator)
        state: Any = share(self._read(folder, STATE))
        self.clock.load_state_dict(state)
        weights = model_tensors(self.task)
        if deepspeed:
            weights |= {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
        scatter(weights, self._read(folder, "model.safetensors"))
        if deepspeed:
            deepspeed_state.set_master_weights(parameters, weights)
        for decay, values in zip(self.averages.decays, self.averages.values):
            name = average_file(decay)
            if share(folder is not None and (folder / name).exists()):
                scatter(values, self._read(folder, name))
            else:
                self._warn(f"The checkpoint has no average of decay {decay:g}: it starts from the weights")
                for value, parameter in zip(values.values(), self.averages.parameters.values()):
                    value.copy_(parameter.detach())
        self.averages.updates = state["average_updates"]
        moments = scatter_optimizer_state(parameters, self._read(folder, "optimizer.safetensors"))
        if deepspeed:
            deepspeed_state.set_moments(parameters, self.optimizer, moments)
        else:
            set_optimizer_state(parameters, self.optimizer, {**moments, **state["optimizer"]})
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        # The sums of all processes; those of the others are zero from here on.
        share_of_sums = float(accelerator.is_main_process)
        self.losses.sums = {
            name: share_of_sums * torch.tensor(pair, dtype=torch.float64, device=accelerator.device)
            for name, pair in state["losses"].items()
        }
        self._load_random_state(folder)

    def _load_random_state(self, folder: Path | None) -> None:
        """Sets the random generators of all processes, to new states if the checkpoint has none for them."""
        accelerator = self.accelerator
        found = share(folder is not None and (folder / RANDOM_STATE).exists())
        states: Any = share(self._read(folder, RANDOM_STATE)) if found else {}
        count = len(states["torch"]) if states else 0
        if count == accelerator.num_processes:
            index = accelerator.process_index
            set_random_state({name: part[index] for name, part in states.items()}, accelerator.device)
            return
        described = f"random states of {count} processes" if count else "no random states"
        self._warn(
            f"The checkpoint has {described}, and there are {accelerator.num_processes}: generators start anew. Noise,"
            " order and views of the samples are the same; dropout inside of models, where there is any, is not"
        )
        set_seed(derive_seed(self.seed, self.clock.step, accelerator.process_index))

    def _read(self, folder: Path | None, name: str) -> dict[str, Any]:
        """The contents of a file in the main process, nothing in the others; an error is raised in all."""

        def read() -> dict[str, Any]:
            path = cast(Path, folder) / name
            return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))

        return on_main_process(self.accelerator, read) or {}

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning("%s.", message)


def average_file(decay: float) -> str:
    """The name of the file of an average."""
    return f"average-{decay:g}.safetensors"


def trained_parameters(task: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that require gradients by their names."""
    return {clean_name(name): parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def model_tensors(task: nn.Module) -> dict[str, Tensor]:
    """Returns the trained parameters and the buffers that are saved, by their names."""
    saved = {clean_name(name) for name in task.state_dict()}
    buffers = {clean_name(name): buffer for name, buffer in task.named_buffers()}
    return {**trained_parameters(task), **{name: buffer for name, buffer in buffers.items() if name in saved}}


def optimizer_state(
    parameters: dict[str, nn.Parameter], optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns the tensors and the numbers in an optimizer's state by PARAMETER/KEY."""
    tensors, numbers = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def scatter_optimizer_state(parameters: dict[str, nn.Parameter], full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns whole tensors of `optimizer_state`, which the main process has, laid out as their parameters."""
    layout: Any = share({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in full.items()})
    device = next(iter(parameters.values())).device
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in layout.items():
        parameter = parameters.get(name.rpartition("/")[0])
        if parameter is not None and tuple(parameter.shape) == shape:
            tensors[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
    scatter(tensors, full)
    return tensors


def set_optimizer_state(
    parameters: dict[str, nn.Parameter], optimizer: Optimizer, values: dict[str, Tensor | float]
) -> None:
    """Sets an optimizer's state to tensors and numbers by PARAMETER/KEY; its settings stay, which may be new ones."""
    by_parameter: dict[str, dict[str, Any]] = {}
    for place, value in values.items():
        name, _, key = place.rpartition("/")
        by_parameter.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        index: by_parameter[names[id(parameter)]]
        for index, parameter in enumerate(order)
        if names[id(parameter)] in by_parameter
    }
    optimizer.load_state_dict(state)
