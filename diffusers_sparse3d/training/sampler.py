"""The order in which training passes over its data, and the loader of its batches."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class TrainingSampler(Sampler[list[tuple[int, int]]]):
    """Draws batches of keys (index, choice) for one process from an endless shuffled stream.

    The stream depends on the seed alone, so that training can continue at any batch, and all processes together pass
    over the data without repetition. `choice` is drawn from `choices` once per batch (the resolution of a VAE batch)
    or, if `choices` is None, from the non-negative integers once per sample (the view of an object).

    Args:
        num_items: Length of the dataset.
        batch_size: Samples per batch and process.
        seed: Seed of the order and the choices.
        choices: Values of `choice`, see above.
        process_index: Index of this process.
        num_processes: Number of processes, each of which draws its part of the global batch.
        start: Number of batches to skip at the beginning.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        choices: list[int] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        start: int = 0,
    ):
        self.num_items, self.batch_size, self.seed, self.choices = num_items, batch_size, seed, choices
        self.process_index, self.num_processes, self.start = process_index, num_processes, start

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
        return torch.randperm(self.num_items, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = -1
        order: list[int] = []
        batch = self.start
        while True:
            first = (batch * self.num_processes + self.process_index) * self.batch_size
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 1, batch))
            draws = torch.randint(2**31, (self.num_processes * self.batch_size,), generator=generator).tolist()
            draws = draws[self.process_index * self.batch_size :] if self.choices is None else draws[:1] * len(draws)
            keys = []
            for position, draw in zip(range(first, first + self.batch_size), draws):
                if position // self.num_items != epoch:
                    epoch = position // self.num_items
                    order = self._permutation(epoch)
                choice = draw if self.choices is None else self.choices[draw % len(self.choices)]
                keys.append((order[position % self.num_items], choice))
            yield keys
            batch += 1


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
