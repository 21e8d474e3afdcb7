"""Groups of meshes: the meshes of some successive rows of the input, which go into one shard.

The number of a group is that of its rows divided by `Settings.meshes_per_shard`, and the name of its shard. So what a
shard holds depends on the input alone, whoever makes it and when; the groups of one input can be spread over any
number of processes and machines.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ...data.folder import Folder
from ...data.index import complete_shards, shard_file, shard_index
from .index import COLUMNS, MeshEntry, Selection
from .items import Items
from .settings import Settings
from .shapes import shapes_of


# Columns of the index that say where a record is, and those that tell one input from another beside its row.
PLACE, COUNTS = ("id", "offset", "length"), ("mesh_bytes", "num_given")


@dataclass(frozen=True)
class Part:
    """One of several parts of an input, `index` of `count` from 0 on: every `count`-th group."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass
class Group:
    """A group of meshes, with those that are to be prepared in the order of the input.

    Attributes:
        number: Number of the group.
        entries: Its meshes.
    """

    number: int
    entries: list[MeshEntry] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the shards."""
        return f"{self.number:06d}"

    def items(self, output: Path) -> Items:
        """Returns the finished records of the group that wait for the rest of it."""
        return Items(output / "items" / self.name)


def iterate_groups(
    entries: Iterable[MeshEntry], selection: Selection, settings: Settings, part: Part
) -> Iterator[Group]:
    """Yields the groups of one part of an input; meshes that are not selected are left out, their places stay."""
    group, taken = Group(-1), 0
    for entry in entries:
        if not selection.has_split(entry) or not selection.has_license(entry):
            continue
        if taken == selection.limit:
            break
        taken += 1
        number = entry.position // settings.meshes_per_shard
        if number % part.count != part.index:
            continue
        if number != group.number:
            if group.entries:
                yield group
            group = Group(number)
        group.entries += shapes_of(entry, settings)
    if group.entries:
        yield group


class CompleteShards:
    """The shards that a folder has, and which meshes are in those of a group.

    A shard whose file is missing or of another size than its index says is none: its index is deleted, so that the
    shard is made again.

    Args:
        output: Folder of the dataset.
    """

    def __init__(self, output: Path):
        self.folder = Folder(output)
        self.sizes = complete_shards(self.folder)
        self.names: defaultdict[str, list[str]] = defaultdict(list)
        for shard in self.sizes:
            self.names[shard.rpartition("-")[0]].append(shard)

    def rows(self, group: Group) -> dict[str, dict[str, Any]]:
        """Returns the rows of the index of the meshes that are in shards of a group, by id."""
        rows: dict[str, dict[str, Any]] = {}
        for shard in self.names.get(group.name, ()):
            with self.folder.filesystem.open(self.folder.name(shard_index(shard)), "rb") as file:
                found = pq.read_table(file, columns=[*PLACE, *COUNTS, *COLUMNS]).to_pylist()
            if self.sizes[shard] == max((row["offset"] + row["length"] for row in found), default=0):
                rows |= {row["id"]: row for row in found}
            else:
                self.folder.delete(shard_index(shard))
                self.folder.delete(shard_file(shard))
        return rows


def change_of(entry: MeshEntry, row: dict[str, Any]) -> str:
    """Returns what is other in the input than in the record of a mesh, "" if nothing is; a file may be gone by now."""
    try:
        size = entry.mesh.stat().st_size
    except OSError:
        size = row["mesh_bytes"]
    counts = dict(zip(COUNTS, (size, int(entry.image is not None))))
    now = {**counts, **{column: getattr(entry, column) for column in COLUMNS}}
    parts = [
        f"{name} is {value!r}, not {row[name]!r}"
        for name, value in now.items()
        if value != (row[name] or type(value)())
    ]
    advice = "; what is prepared stays as it was, another folder takes the new"
    return ", ".join(parts) + advice if parts else ""
