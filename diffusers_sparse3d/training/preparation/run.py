"""The preparation of groups of meshes by a pool of processes."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..files import delete_partial_files
from ..worker_pool import Failure, WorkerPool
from .groups import CompleteShards, Group, change_of
from .index import CHANGED, ODD_ROW, MeshEntry
from .jobs import PRELOADED, Job, MeshJob, Options, PackJob, perform, set_up


# Meshes per process among which the largest come first, so that none of them is at work when all others are done.
WINDOW = 64


@dataclass
class Preparation:
    """One run over groups of meshes.

    Args:
        options: What is made, where, and by what.
        progress: Called with the number of meshes that are done, and the failure of the last one if there is one.
        check: Called before the first mesh that is to be prepared, if there is one; raises if none can be.

    Attributes:
        failures: Meshes that could not be prepared, with the reason.
    """

    options: Options
    progress: Callable[[int, Failure | None], None]
    failures: list[tuple[MeshEntry, Failure]] = field(default_factory=list)
    check: Callable[[], None] | None = None

    def run(self, groups: Iterable[Group]) -> None:
        """Prepares what is missing of groups."""
        options = self.options
        self._shards = None if options.renders_only else CompleteShards(options.output)
        # The groups that are not complete, and the number of their meshes that are not done.
        self._open: dict[int, Group] = {}
        self._missing: dict[int, int] = {}
        setup, uses_gpu = partial(set_up, options.device), not options.device.startswith("cpu")
        self._pool = WorkerPool(perform, options.num_workers, options.timeout, setup, (PRELOADED,), uses_gpu)
        # Closed by an error too, which ends the processes.
        with closing(self._pool.run((job,) for job in self._jobs(groups))) as outcomes:
            for (job,), failure in outcomes:
                self._take(job, failure)

    def _take(self, job: Job, failure: Failure | None) -> None:
        """Notes the outcome of a job, and adds the packing of a group that is complete."""
        if isinstance(job, PackJob):
            if failure is not None:
                raise OSError(f"The shard {job.group.name} cannot be written: {failure.reason}")
            return
        for entry in job.entries:
            # Of several shapes some may be there, whatever became of the others.
            failed = failure is not None and not (len(job.entries) > 1 and job.is_done(entry))
            self._finish(entry, failure if failed else None)
        number = job.entries[0].position // self.options.settings.meshes_per_shard
        self._missing[number] -= len(job.entries)
        if self._missing[number] == 0:
            del self._missing[number]
            group = self._open.pop(number)
            if not self.options.renders_only:
                self._pool.add_first((PackJob(group, self.options),))

    def _jobs(self, groups: Iterable[Group]) -> Iterator[Job]:
        """The jobs of groups, a window of meshes after the other, each with the largest meshes first."""
        source, check = iter(groups), self.check
        while window := list(self._window(source)):
            jobs, complete = [], []
            for group in window:
                missing = self._missing_of(group)
                items = group.items(self.options.output)
                shapes = itertools.groupby(missing, key=lambda entry: entry.mesh_id or entry.id)
                jobs += [MeshJob(tuple(entries), items, self.options) for _, entries in shapes]
                if missing:
                    if check is not None:
                        check()
                        check = None
                    self._open[group.number], self._missing[group.number] = group, len(missing)
                elif not self.options.renders_only and items.folder.exists():
                    complete.append(PackJob(group, self.options))
            jobs.sort(key=lambda job: _size(job.entries[0]), reverse=True)
            yield from itertools.chain(complete, jobs)

    def unfinished(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Yields the groups of which meshes are missing, and counts the meshes of the others."""
        shards = CompleteShards(self.options.output)
        for group in groups:
            rows = shards.rows(group)
            if all(entry.id in rows and not entry.problem for entry in group.entries):
                for entry in group.entries:
                    self._skip(entry, rows)
            else:
                yield group

    def _window(self, source: Iterator[Group]) -> Iterator[Group]:
        count = 0
        while count < WINDOW * max(1, self.options.num_workers):
            group = next(source, None)
            if group is None:
                return
            count += len(group.entries)
            yield group

    def _missing_of(self, group: Group) -> list[MeshEntry]:
        """Returns the meshes of a group that are to be prepared, and counts all others."""
        options = self.options
        packed: dict[str, dict[str, Any]] = {}
        if options.renders_only:
            done = {entry.id for entry in group.entries if (options.renders / entry.id).is_dir()}
        else:
            assert self._shards is not None
            packed, items = self._shards.rows(group), group.items(options.output)
            delete_partial_files(items.folder)
            items.delete(packed)
            done = {entry.id for entry in group.entries if entry.id in packed or items.has(entry.id)}
        missing = []
        for entry in group.entries:
            if entry.problem:
                self._finish(entry, Failure(ODD_ROW, entry.problem))
            elif entry.id in done:
                self._skip(entry, packed)
            else:
                missing.append(entry)
        return missing

    def _skip(self, entry: MeshEntry, rows: dict[str, dict[str, Any]]) -> None:
        """Counts a mesh that is done, and notes whether its input is another one by now."""
        change = change_of(entry, rows[entry.id]) if entry.id in rows else ""
        self._finish(entry, Failure(CHANGED, change) if change else None)

    def _finish(self, entry: MeshEntry, failure: Failure | None) -> None:
        if failure is not None:
            self.failures.append((entry, failure))
        self.progress(1, failure)


def prepare_group(group: Group, options: Options) -> list[tuple[MeshEntry, Failure]]:
    """Prepares one group and returns the meshes that could not be prepared, with the reason; for runners elsewhere."""
    preparation = Preparation(options, lambda count, failure: None)
    preparation.run([group])
    return preparation.failures


def _size(entry: MeshEntry) -> int:
    try:
        return entry.mesh.stat().st_size
    except OSError:  # its own attempt will say so
        return 0
