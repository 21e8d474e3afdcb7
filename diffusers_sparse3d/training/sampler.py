"""Which samples each process sees at each step of a training, and the loader of their batches.

All of it is a function of the seed and of the step: nothing is replayed when training continues.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class SampleKey(NamedTuple):
    """The key of one sample of one step; datasets of training take it as their index.

    Attributes:
        row: Row of the mesh in its split.
        resolution: Samples per axis of its SDF; 0 where there is only one.
        seed: Random number in [0, 2^63), from which all that is random about the sample is drawn.
        quantile: Number in (0, 1); those of all samples of an optimizer step are stratified, one in each of as many
            equal intervals as there are samples.
    """

    row: int
    resolution: int
    seed: int
    quantile: float


# Batches of one optimizer step, by forward pass and by process.
StepBatches = list[list[list[SampleKey]]]


def key_tensors(key: tuple[int, int] | SampleKey) -> dict[str, Tensor]:
    """Returns `seed` (int64) and `quantile` (float32) of a `SampleKey` for its item; nothing for another key."""
    if not isinstance(key, SampleKey):
        return {}
    return {"seed": torch.tensor(key.seed), "quantile": torch.tensor(key.quantile)}


class Batches(Protocol):
    """A sequence of optimizer steps without end."""

    @property
    def batch_sizes(self) -> dict[int, int]:
        """Samples of any size that a forward pass and process may have at each resolution."""

    def step(self, step: int) -> StepBatches:
        """Returns the batches of an optimizer step, `[forward pass][process]`."""


class StreamBatches:
    """Batches of one length, cut from a stream of samples that is shuffled anew for each pass over the data.

    The samples of an optimizer step, their seeds and quantiles depend on the seed, the step and the size of the global
    batch alone, not on how it is divided among processes and forward passes.

    Args:
        num_items: Length of the dataset.
        batch_size: Samples per forward pass and process.
        seed: Seed of the order and of the keys.
        num_processes: Number of processes.
        num_passes: Forward passes per optimizer step.
        resolutions: Resolutions of the keys; the steps go through them in turn.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        num_passes: int = 1,
        resolutions: Sequence[int] = (0,),
    ):
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.num_processes, self.num_passes, self.resolutions = num_processes, num_passes, resolutions
        self._orders: dict[int, np.ndarray] = {}

    @property
    def batch_sizes(self) -> dict[int, int]:
        return dict.fromkeys(self.resolutions, self.batch_size)

    def _index(self, position: int) -> int:
        """Returns the index of the sample at a position of the stream."""
        epoch, place = divmod(position, self.num_items)
        if epoch not in self._orders:
            self._orders = {number: order for number, order in self._orders.items() if number == epoch - 1}
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
            self._orders[epoch] = torch.randperm(self.num_items, generator=generator).numpy()
        return int(self._orders[epoch][place])

    def step(self, step: int) -> StepBatches:
        num_batches = self.num_passes * self.num_processes
        size = num_batches * self.batch_size
        resolution = self.resolutions[step % len(self.resolutions)]
        samples = [(self._index(position), resolution) for position in range(step * size, (step + 1) * size)]
        keys = make_keys(samples, self.seed, step)
        batches = [keys[start : start + self.batch_size] for start in range(0, size, self.batch_size)]
        return [batches[start : start + self.num_processes] for start in range(0, num_batches, self.num_processes)]


def make_keys(samples: Sequence[tuple[int, int]], seed: int, step: int) -> list[SampleKey]:
    """Returns the keys of samples (row, resolution) of one optimizer step, with seeds and stratified quantiles."""
    generator = np.random.default_rng((seed, 1, step))
    seeds = generator.integers(2**63, size=len(samples), dtype=np.uint64)
    quantiles = (generator.permutation(len(samples)) + generator.random(len(samples))) / len(samples)
    # Rounded to float32, a quantile must not become 0 or 1, where the logit-normal distribution has no value.
    quantiles = quantiles.clip(1e-7, 1 - 1e-7)
    return [
        SampleKey(row, resolution, sample_seed, quantile)
        for (row, resolution), sample_seed, quantile in zip(samples, seeds.tolist(), quantiles.tolist())
    ]


class BatchSchedule:
    """Phases of a training, each with its own batches.

    Args:
        phases: The optimizer steps and the batches of each phase; the last phase goes on beyond its steps.
    """

    def __init__(self, phases: Sequence[tuple[int, Batches]]):
        self.phases = phases

    def phase(self, step: int) -> tuple[Batches, int]:
        """Returns the batches of the phase that an optimizer step falls in, and how many steps of it are done."""
        for number, batches in self.phases[:-1]:
            if step < number:
                return batches, step
            step -= number
        return self.phases[-1][1], step

    def step(self, step: int) -> StepBatches:
        """Returns the batches of an optimizer step, `[forward pass][process]`."""
        batches, number = self.phase(step)
        return batches.step(number)


class TrainingSampler(Sampler[list[SampleKey]]):
    """The batches of one process, one for each forward pass, without end.

    Args:
        batches: Batches of all processes.
        process_index: Index of this process.
        start: Number of optimizer steps to skip at the beginning.
    """

    def __init__(self, batches: "Batches | BatchSchedule", process_index: int = 0, start: int = 0):
        self.batches, self.process_index, self.start = batches, process_index, start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self.start
        while True:
            for processes in self.batches.step(step):
                yield processes[self.process_index]
            step += 1


def derive_seed(*numbers: int) -> int:
    """Returns one seed for a tuple of non-negative integers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_loader(
    dataset: Dataset[Any],
    sampler: TrainingSampler,
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Makes a data loader for a sampler that yields whole batches of keys."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        # Without a generator of its own, the loader would draw its seed from the generator of the noise.
        generator=torch.Generator(),
    )
