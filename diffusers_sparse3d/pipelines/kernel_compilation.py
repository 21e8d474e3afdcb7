"""The kernels of a pipeline, compiled before its first call: many at a time, where the call would wait for each.

`compile_stages` gives `ops.runtime.compile_ahead` an example of what each model of a stage does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..geometry.cavities import fill_cavities
from ..models import kernel_examples
from ..models.kernel_examples import described, is_plain
from ..ops.runtime.collection import Example, compile_examples
from .stages import DenseStage, SparseStage, Stage


# Of the hollow sphere whose cavity is filled.
_FIELD_RESOLUTION = 32


class StageCall(NamedTuple):
    """What a stage will be called for.

    Attributes:
        stage: its models.
        samples: in a call of the transformer, with those that are predicted without an image.
        unconditional: how many of them are.
        max_opening: as of the pipeline.
    """

    stage: Stage
    samples: int
    unconditional: int
    max_opening: float

    @property
    def key(self) -> str:
        """What tells calls with other kernels apart: kernels are compiled for one sample, and for any other number."""
        models = [self.stage.transformer, self.stage.vae, getattr(self.stage, "refiner", None)]
        numbers = (self.samples > 1, self.unconditional > 0, self.max_opening > 0)
        return repr((self.stage.name, [described(model) for model in models], numbers))

    def examples(self) -> Iterator[Example]:
        """What the stage does, from its noise to signed distances.

        Models on other devices, and those that have hooks, are compiled, quantised or run on several GPUs are left
        out: their calls may have effects.
        """
        stage, device = self.stage, self.stage.transformer.device
        if is_plain(stage.transformer, device):
            yield self.transformer_example
        if is_plain(stage.vae, device):
            yield self.decoder_example
        if isinstance(stage, SparseStage):
            if stage.refiner is not None and is_plain(stage.refiner, device):
                yield lambda: kernel_examples.refiner(stage.refiner, stage.refiner_takes_features)
            if self.max_opening > 0:
                yield lambda: cavities(device)

    def transformer_example(self) -> Callable[[], Any]:
        """A step of the stage."""
        transformer = self.stage.transformer
        if isinstance(self.stage, DenseStage):
            return kernel_examples.dense_transformer(transformer, self.samples, self.unconditional)
        return kernel_examples.sparse_transformer(transformer, self.samples)

    def decoder_example(self) -> Callable[[], Any]:
        """The decoding of latents."""
        stage = self.stage
        if isinstance(stage, DenseStage):
            return kernel_examples.dense_decoder(stage.vae, stage.transformer.config.sample_size)
        return kernel_examples.sparse_decoder(stage.vae, stage.latent_resolution, stage.refiner_takes_features)


def compile_stages(
    calls: Sequence[StageCall], done: frozenset[str], show_progress: Callable[[int], Any]
) -> frozenset[str]:
    """Compile the kernels of calls, and wait for them. Does nothing on a CPU or with one processor.

    Args:
        calls: of the stages of a pipeline, which are on one device.
        done: keys of the calls whose kernels were compiled before.
        show_progress: as in `compile_ahead`.

    Returns:
        The keys of all calls whose kernels were compiled.
    """
    missing = {key: call for call in calls if (key := call.key) not in done}
    device = next((call.stage.transformer.device for call in missing.values()), torch.device("cpu"))

    def examples() -> Iterator[Example]:
        return (example for call in missing.values() for example in call.examples())

    if not missing or not compile_examples(repr(sorted(missing)), examples, device, show_progress):
        return done
    return done | missing.keys()


def cavities(device: torch.device) -> None:
    """The filling of a hollow sphere, which is computed."""
    axis = torch.arange(_FIELD_RESOLUTION, dtype=torch.int32, device=device)
    coords = torch.cartesian_prod(axis, axis, axis)
    distance = (coords - (_FIELD_RESOLUTION - 1) / 2).norm(dim=1) - _FIELD_RESOLUTION / 3
    near = distance.abs() < 3
    # Balls of one sample: for others the kernels are the same.
    fill_cavities(distance[near].abs() / 3 - 0.5, coords[near], _FIELD_RESOLUTION, 0.0, 4 / _FIELD_RESOLUTION)
