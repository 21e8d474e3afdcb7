"""The kernels of a training, compiled before its first step: many at a time, where the step would wait for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from ..models.kernel_examples import described, is_plain
from ..ops.runtime.collection import Example, compile_examples
from .distributed import autocast, is_sharded


class ModelExample:
    """An example of a model in a training, for `compile_model_examples`.

    Args:
        name: of what the model does.
        model: the model.
        make: plans, and returns what calls the model, see `models.kernel_examples`.
        numbers: on which the kernels depend besides the model.
        trains: whether gradients follow.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        make: Callable[[], Callable[[], Any]],
        numbers: tuple[Any, ...] = (),
        trains: bool = False,
    ):
        self.name, self.model, self.make, self.numbers, self.trains = name, model, make, numbers, trains

    @property
    def key(self) -> str:
        """What tells examples with other kernels apart, the same in each process."""
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        checkpointing = getattr(self.model, "gradient_checkpointing", None)
        facts = (trained, checkpointing) if self.trains else ()
        return repr((self.name, described(self.model), self.numbers, facts))

    def under(self, accelerator: Accelerator) -> Example:
        """The example with the precision of the training, and with gradients if it trains."""

        def example() -> Callable[[], Any]:
            # What a backward pass needs is planned if gradients are enabled.
            with torch.set_grad_enabled(self.trains), autocast(accelerator):
                call = self.make()
            return lambda: self._run(call, accelerator)

        return example

    def _run(self, call: Callable[[], Any], accelerator: Accelerator) -> None:
        if not self.trains:
            with autocast(accelerator):
                call()
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Of this thread are the kernels that are collected.
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            with autocast(accelerator):
                output = call()
            # Not `backward`, which would leave gradients without values in the parameters.
            torch.autograd.grad(_total(output), parameters, allow_unused=True)


def trained_examples(
    name: str, model: Any, make: Callable[[], Callable[[], Any]], numbers: tuple[Any, ...], validates: bool
) -> list[ModelExample]:
    """Examples of a model that is trained and, if there is a validation, of the same without gradients."""
    return [ModelExample(name, model, make, numbers, trains) for trains in ([True, False] if validates else [True])]


def compile_model_examples(examples: Iterable[ModelExample], accelerator: Accelerator) -> None:
    """Compile the kernels of models, and wait for them; does nothing where `compile_examples` does nothing.

    All processes call it, as they wait for the first one of each machine. Models that are sharded, have hooks, are
    compiled or quantised are left out, as their calls may have effects, and so are models that are not of diffusers.

    Args:
        examples: what the training does with its models.
        accelerator: of the training.
    """
    if is_sharded(accelerator):
        return
    # A task may have a model of its user's. The accelerator's device may have no index.
    ours = [example for example in examples if isinstance(example.model, ModelMixin)]
    plain = [example for example in ours if is_plain(example.model, example.model.device)]
    description = repr((accelerator.mixed_precision, sorted(example.key for example in plain)))

    def show_progress(total: int) -> Any:
        # Kernels in triton's cache take less than a second.
        return tqdm(total=total, desc="Compiling kernels", delay=1.0, disable=not accelerator.is_main_process)

    if plain:
        # What one process of a machine compiles, the others find.
        with accelerator.local_main_process_first():
            device, call = plain[0].model.device, lambda: [example.under(accelerator) for example in plain]
            compile_examples(description, call, device, show_progress)


def _total(output: Any) -> Tensor:
    """The sum of what a model returns."""
    return output.sample.float().sum()
