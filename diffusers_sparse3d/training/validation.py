"""Validation: losses over a fixed set of samples with fixed noise, and pictures, by all processes together."""

from collections.abc import Callable, Sized
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import Dataset

from .configuration import TrainingConfig
from .distributed import autocast
from .losses import Loss, LossSums
from .sampler import Batches, BatchSchedule, SampleKey, make_keys
from .task import Task


class Validation:
    """Validation losses and pictures of a training.

    Which samples there are, their views and their noise depend on the seed alone, so that the losses of two trainings
    can be compared, whatever their batches and processes were. Every process has its share of the batches and as many
    forward passes as the others, which models that are sharded need.

    Args:
        config: Configuration of the training.
        accelerator: Its accelerator.
        dataset: The validation split; maps a `SampleKey` to a sample.
        collate_fn: Joins samples to a batch.
        schedule: Batches of one process, of which the resolutions and the largest length are taken.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], dict[str, Any]],
        schedule: BatchSchedule,
    ):
        self.config, self.accelerator = config, accelerator
        self.dataset, self.collate_fn, self.schedule = dataset, collate_fn, schedule

    def losses(self, task: Task, step: int) -> dict[str, float]:
        """Returns the means of the losses of a task, in all processes, with the resolutions of a step of training."""
        batches, _ = self.schedule.phase(step)
        keys = self._keys(self.config.num_validation_samples, batches)
        parts = split_keys(keys, batches.batch_sizes)
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        sums = LossSums()
        for start in range(0, len(parts), count):
            # Where batches do not go round, the last one is computed once more, and counts for nothing.
            batch = self._batch(parts[min(start + index, len(parts) - 1)])
            counts = start + index < len(parts)
            with autocast(self.accelerator):
                losses: dict[str, Loss] = task(batch)
            sums.add({name: Loss(loss.total * counts, loss.number * counts) for name, loss in losses.items()})
        return sums.means(self.accelerator.reduce, task.loss_weights)

    def picture(self, task: Task, step: int) -> Image.Image:
        """Returns a picture of the first samples, drawn by all processes alike."""
        batches, _ = self.schedule.phase(step)
        resolution = min(batches.batch_sizes)
        keys = [key._replace(resolution=resolution) for key in self._keys(self.config.num_pictures, batches)]
        batch = self._batch(keys)
        with autocast(self.accelerator):
            return task.pictures(batch)

    def _keys(self, count: int, batches: Batches) -> list[SampleKey]:
        """The keys of the first `count` samples, which take turns at the resolutions."""
        length, resolutions = len(cast(Sized, self.dataset)), sorted(batches.batch_sizes)
        order = np.random.default_rng((self.config.seed, 4)).permutation(length).tolist()
        samples = [(order[place % length], resolutions[place % len(resolutions)]) for place in range(count)]
        return make_keys(samples, self.config.seed, 0)

    def _batch(self, keys: list[SampleKey]) -> dict[str, Any]:
        return send_to_device(self.collate_fn([self.dataset[key] for key in keys]), self.accelerator.device)


def split_keys(keys: list[SampleKey], batch_sizes: dict[int, int]) -> list[list[SampleKey]]:
    """Returns keys in batches of one resolution with at most so many samples as `batch_sizes` says."""
    parts = []
    for resolution, size in batch_sizes.items():
        alike = [key for key in keys if key.resolution == resolution]
        parts += [alike[start : start + size] for start in range(0, len(alike), size)]
    return parts


def save_picture(picture: Image.Image, path: Any) -> torch.Tensor:
    """Saves a picture and returns it as `[height, width, 3]` uint8."""
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3)
