"""Batches of sparse samples that are alike in tokens: every process has the same work at every step.

A sample of a sparse model has between a thousand and a hundred thousand tokens. With batches of so many samples,
all processes wait for the one that drew the largest; batches cut off at so many tokens drop samples. Here all samples
of a pass over the data are packed into batches of about equal size, and batches of about equal size make a step.
"""

import heapq
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .phases import Phase
from .sampler import BatchSchedule, StepBatches, derive_seed, make_keys


logger = logging.getLogger(__name__)

# Samples are packed in descending order of their size times a random factor of this deviation, so that others come
# together in every pass. Where the batches do not keep the limit so, the deviation is halved, at last to zero.
SIZE_NOISE = 0.1
NOISE_HALVINGS = 3
# Batches whose sizes differ by less than this share count as equal when they are grouped to steps, at random.
SIZE_TOLERANCE = 0.02
# Samples that an error message names.
NAMED_SAMPLES = 3
# Tokens of the slowest process, relative to the mean of all, above which a training says what helps, and the number of
# steps that it looks at.
LARGEST_IMBALANCE = 1.05
CHECKED_STEPS = 500


@dataclass(frozen=True)
class SampleGroup:
    """Samples of one resolution, of which batches are made.

    Attributes:
        sizes: Tokens of each sample, `[N]` int64.
        batch_size: Samples per batch, in the mean.
        max_tokens: Largest number of tokens in a batch; no limit if None.
        resolution: Resolution of the samples.
        names: Names of the samples.
    """

    sizes: np.ndarray
    batch_size: int
    max_tokens: int | None
    resolution: int
    names: Sequence[str]

    def check_limit(self) -> None:
        """Raises a ValueError that names the largest samples if one has more tokens than a batch may have."""
        if self.max_tokens is None or self.sizes.max() <= self.max_tokens:
            return
        order = np.argsort(-self.sizes)
        order = order[self.sizes[order] > self.max_tokens]
        named = ", ".join(f"{self.names[i]!r} ({self.sizes[i]:,})" for i in order[:NAMED_SAMPLES])
        more = f" and {len(order) - NAMED_SAMPLES} more" if len(order) > NAMED_SAMPLES else ""
        raise ValueError(
            f"`max_tokens` must be at least {self.sizes.max()}, the tokens of the largest sample at resolution"
            f" {self.resolution}, got {self.max_tokens}. Larger are {named}{more}: raise the limit or take them out"
            " of the dataset"
        )


def pack_samples(order: np.ndarray, sizes: np.ndarray, num_batches: int) -> np.ndarray:
    """Returns the batch of each sample, `[N]` int64: in the given order, each goes to the smallest batch so far."""
    # A number of the heap is the total of a batch times a power of two, plus the number of the batch: twice as fast as
    # pairs, for a million samples.
    shift = num_batches.bit_length()
    heap, chosen = list(range(num_batches)), []
    for size in (sizes[order] << shift).tolist():
        smallest = heap[0]
        heapq.heapreplace(heap, smallest + size)
        chosen.append(smallest)
    batches = np.empty(len(sizes), dtype=np.int64)
    batches[order] = np.array(chosen, dtype=np.int64) & ((1 << shift) - 1)
    return batches


class BalancedBatches:
    """Batches in which every sample of every group is exactly once in a pass over the data, and none is too large.

    All batches of a step are of one group. A round of steps is one pass over the data. Only where the samples do not
    make a global batch, or the limit asks for it, a round has several passes, each sample as often as it has passes.
    All rounds have the same number of steps.

    The batches of an optimizer step depend on the seed, the step and the number of its batches (processes times
    forward passes), not on how these are divided.

    Args:
        groups: Samples, one group for each resolution.
        seed: Seed of the packing, the order and the keys.
        num_processes: Number of processes.
        num_passes: Forward passes per optimizer step.

    Raises:
        ValueError: if a sample has more tokens than a batch may have.
    """

    def __init__(self, groups: Sequence[SampleGroup], seed: int, num_processes: int = 1, num_passes: int = 1):
        for group in groups:
            group.check_limit()
        self.groups, self.seed = groups, seed
        self.num_processes, self.num_passes = num_processes, num_passes
        self.batches_per_step = num_processes * num_passes
        wanted = min(group.batch_size * self.batches_per_step // len(group.sizes) for group in groups)
        self.epochs_per_round = max(1, wanted)
        while not all(counts := [self._count_batches(group) for group in groups]):
            self.epochs_per_round += 1
        self.num_batches = counts
        self.steps_per_round = sum(counts) // self.batches_per_step
        self._round: tuple[int, list[tuple[int, list[np.ndarray]]]] = (-1, [])

    @property
    def batch_sizes(self) -> dict[int, int]:
        return {
            group.resolution: min(group.batch_size, (group.max_tokens or sys.maxsize) // int(group.sizes.max()))
            for group in self.groups
        }

    def _count_batches(self, group: SampleGroup) -> int:
        """Returns the number of batches that a group makes in a round, a multiple of those of a step, or 0.

        It is 0 if some batch would be empty or too large.
        """
        sizes = np.tile(group.sizes, self.epochs_per_round)
        step = self.batches_per_step
        largest = len(sizes) // step * step
        count = min(-(-len(sizes) // (group.batch_size * step)) * step, largest)
        if group.max_tokens is None:
            return count
        count = max(count, -(-int(sizes.sum()) // (group.max_tokens * step)) * step)
        order = np.argsort(-sizes, kind="stable")
        while 0 < count <= largest:
            totals = np.bincount(pack_samples(order, sizes, count), weights=sizes)
            if totals.max() <= group.max_tokens:
                return count
            if count == largest:
                break
            # By one per cent, as each try costs a second for a million samples; the last try has the most batches.
            count = min(count + max(1, count // (100 * step)) * step, largest)
        return 0

    def _pack(self, group: SampleGroup, num_batches: int, generator: np.random.Generator) -> list[list[np.ndarray]]:
        """Returns the steps of a group in a round; a step is a list of batches, and a batch one of indices."""
        sizes = np.tile(group.sizes, self.epochs_per_round)
        noise = generator.standard_normal(len(sizes))
        for halvings in range(NOISE_HALVINGS + 1):
            deviation = SIZE_NOISE / 2**halvings if halvings < NOISE_HALVINGS else 0.0
            order = np.argsort(-(np.log(sizes) + deviation * noise), kind="stable")
            batches = pack_samples(order, sizes, num_batches)
            totals = np.bincount(batches, weights=sizes)
            if group.max_tokens is None or totals.max() <= group.max_tokens:
                break
        members = np.split(np.argsort(batches, kind="stable"), np.bincount(batches).cumsum()[:-1])
        # In ascending order of their size, those of one forward pass are nearest to each other.
        level = np.log(totals) / SIZE_TOLERANCE + generator.random(num_batches)
        steps = np.argsort(level).reshape(-1, self.batches_per_step)
        return [[members[batch] % len(group.sizes) for batch in step] for step in steps]

    def _steps(self, number: int) -> list[tuple[int, list[np.ndarray]]]:
        """Returns the steps of a round: the group of each, and its batches."""
        if self._round[0] != number:
            generator = np.random.default_rng((self.seed, 2, number))
            steps = [
                (place, batches)
                for place, (group, num_batches) in enumerate(zip(self.groups, self.num_batches))
                for batches in self._pack(group, num_batches, generator)
            ]
            self._round = (number, [steps[place] for place in generator.permutation(len(steps))])
        return self._round[1]

    def imbalance(self, step: int) -> np.ndarray:
        """Returns the tokens of the slowest process relative to the mean of all, `[N]` float64.

        It is that of N forward passes of the round which an optimizer step is in, of its first `CHECKED_STEPS` steps.
        """
        tokens = [
            [self.groups[place].sizes[batch].sum() for batch in batches]
            for place, batches in self._steps(step // self.steps_per_round)[:CHECKED_STEPS]
        ]
        passes = np.array(tokens, dtype=np.float64).reshape(-1, self.num_processes)
        return np.asarray(passes.max(axis=1) / passes.mean(axis=1))

    def step(self, step: int) -> StepBatches:
        """Returns the batches of an optimizer step, `[forward pass][process]`."""
        place, batches = self._steps(step // self.steps_per_round)[step % self.steps_per_round]
        resolution = self.groups[place].resolution
        keys = make_keys([(index, resolution) for index in np.concatenate(batches).tolist()], self.seed, step)
        ends = np.cumsum([len(batch) for batch in batches]).tolist()
        parts = [keys[end - len(batch) : end] for end, batch in zip(ends, batches)]
        # The largest batch of a pass is not always that of the last process.
        generator = np.random.default_rng((self.seed, 3, step))
        return [
            [parts[start + process] for process in generator.permutation(self.num_processes)]
            for start in range(0, len(parts), self.num_processes)
        ]


def log_balance(schedule: BatchSchedule, step: int) -> None:
    """Says how much more than the mean the slowest process has to do from an optimizer step on.

    It costs next to nothing: the batches that are made for it are those of the training.
    """
    batches, number = schedule.phase(step)
    if not isinstance(batches, BalancedBatches) or batches.num_processes == 1:
        return
    ratios = batches.imbalance(number)
    mean, largest = ratios.mean(), ratios.max()
    message = f"The slowest of {batches.num_processes} processes has {mean:.3f} times the mean tokens of all"
    message += f" (at most {largest:.3f} times)"
    if mean > LARGEST_IMBALANCE:
        logger.warning("%s, for which the others wait: a larger `batch_size`, or fewer processes, helps.", message)
    else:
        logger.info("%s.", message)


def make_schedule(
    phases: Sequence[Phase],
    sizes: Callable[[int], np.ndarray],
    names: Sequence[str],
    seed: int,
    num_processes: int = 1,
    num_passes: int = 1,
) -> BatchSchedule:
    """Makes the balanced batches of all phases.

    Args:
        phases: The phases.
        sizes: Returns the tokens of each sample at a resolution, `[N]`.
        names: Names of the samples, for messages.
        seed: Seed of the training.
        num_processes: Number of processes.
        num_passes: Forward passes per optimizer step.

    Raises:
        ValueError: if a sample has more tokens than its phase allows in a batch; the message names it.
    """
    schedule = []
    for place, phase in enumerate(phases):
        groups = [
            SampleGroup(np.maximum(sizes(resolution), 1), batch_size, max_tokens, resolution, names)
            for resolution, batch_size, max_tokens in zip(phase.resolutions, phase.batch_sizes, phase.max_tokens)
        ]
        batches = BalancedBatches(groups, derive_seed(seed, 3, place), num_processes, num_passes)
        schedule.append((phase.steps or 0, batches))
    return BatchSchedule(schedule)
