"""What the processes of a preparation do: one mesh to its record, and the records of a group to a shard.

Jobs import PyTorch when they run, so that a process that only hands them out does without.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .groups import Group
from .index import MeshEntry
from .items import Items
from .settings import Settings


if TYPE_CHECKING:
    from .mesh_file import MeshFile

# The module that the processes import before their first job.
PRELOADED = f"{__package__}.record"
# Bytes from which on the records of a group go into a further shard.
MAX_SHARD_BYTES = 512_000_000


@dataclass(frozen=True)
class Options:
    """What is made, where, and by what; sent to the processes that make it.

    Attributes:
        output: Folder of the dataset.
        settings: What records depend on.
        images_dir: Folder of pictures to take instead of renders.
        renders_only: Whether pictures alone are made, in OUTPUT/renders.
        device: Device that computes the distances; "cuda" spreads the processes over all GPUs.
        num_workers: Number of processes; 0 prepares in this process, without protection.
        timeout: Seconds after which a mesh is given up.
    """

    output: Path
    settings: Settings
    images_dir: Path | None = None
    renders_only: bool = False
    device: str = "cpu"
    num_workers: int = 0
    timeout: float = 600

    @property
    def renders(self) -> Path:
        """Folder of the pictures where these alone are made."""
        return self.output / "renders"


@dataclass(frozen=True)
class MeshJob:
    """Prepares a mesh, or the missing shapes of one, whose records go to those of its group.

    Attributes:
        entries: The mesh alone, or shapes of one mesh.
        items: The records of the group.
        options: What is made.
    """

    entries: tuple[MeshEntry, ...]
    items: Items
    options: Options

    def run(self) -> None:
        """Writes the records, or the pictures; where one fails, the others are made before its error is raised."""
        from .mesh_file import MeshFile

        file, failure = MeshFile(self.entries[0]), None
        for entry in self.entries:
            if self.is_done(entry):  # by an attempt that was broken off
                continue
            try:
                self._make(entry, file)
            except Exception as error:  # of an input of any origin
                failure = failure or error
        if self.options.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()  # other processes share the GPU
        if failure is not None:
            raise failure

    def is_done(self, entry: MeshEntry) -> bool:
        """Whether the record of a shape, or its pictures, are there."""
        if self.options.renders_only:
            return (self.options.renders / entry.id).is_dir()
        return self.items.has(entry.id)

    def _make(self, entry: MeshEntry, file: "MeshFile") -> None:
        from .augmentation import deformation_of
        from .pictures import make_pictures, write_pictures
        from .record import make_record

        options, settings = self.options, self.options.settings
        if options.renders_only:
            pictures = make_pictures(entry, settings, options.device, file, deformation_of(entry, settings))
            write_pictures(pictures, options.renders / entry.id)
        else:
            self.items.write(make_record(entry, settings, options.images_dir, options.device, file))


@dataclass(frozen=True)
class PackJob:
    """Moves the finished records of a group into its shard, in the order of the input."""

    group: Group
    options: Options

    def run(self) -> None:
        """Writes the shard of the group, and deletes the records that wait for it."""
        from ...data.records import mesh_section_names
        from ...data.writer import ShardWriter
        from .record import record_columns

        items, settings = self.group.items(self.options.output), self.options.settings
        columns, sections = record_columns(settings), mesh_section_names(settings.sdf_resolutions)
        names = [entry.id for entry in self.group.entries]
        with ShardWriter(self.options.output, sections, columns, self.group.name, MAX_SHARD_BYTES) as writer:
            for name in names:
                if name not in writer.ids and items.has(name):
                    writer.add(items.read(name))
        items.delete(names)


Job = MeshJob | PackJob


def perform(job: Job) -> None:
    """Runs a job; the function of the pool."""
    job.run()


def set_up(device: str, index: int) -> None:
    """Prepares a process of the pool: one thread, and with the device "cuda" the GPU that its number decides."""
    import torch
    from tqdm import tqdm

    # Bars are off, but their lock would be a semaphore, which a process that is killed leaves to be cleaned up.
    tqdm.set_lock(threading.RLock())
    # With a process for each core, more threads would only get into each other's way.
    torch.set_num_threads(1)
    os.environ["IGL_NUM_THREADS"] = "1"
    if device == "cuda":
        torch.cuda.set_device(index % torch.cuda.device_count())
