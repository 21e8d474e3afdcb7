"""Datasets of the format before records: safetensors shards of many meshes, and an index.csv.

index.csv                    id, source, category, name, license, author, split, shard, num_images, num_given,
                             azimuths (separated by blanks)
shard-00000.safetensors ...  {ID}/sdf_{R}/coords, values and sharp, {ID}/occupancy, {ID}/images/{k}: the tensors of
                             the sections of `records`, under these names
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import safe_open
from torch import Tensor

from .folder import Folder
from .index import merge_index
from .records import IMAGES, OCCUPANCY, Record, mesh_columns, mesh_section_names, sdf_section
from .sections import content_hash, encode
from .writer import ShardWriter


OLD_INDEX = "index.csv"


class OldRecords:
    """The records of a dataset of the old format, read as `RecordReader` reads those of the new one.

    Args:
        folder: A local folder.
        resolutions: Samples per axis of the SDFs.
        split: Value of the column `split`; all records if None.

    Attributes:
        table: The columns id and those of `mesh_columns`; not `voxels_R`, which the old format does not have.
    """

    def __init__(self, folder: Folder | str | Path, resolutions: Sequence[int], split: str | None = None):
        self.folder = Folder(folder)
        self._shards: dict[str, Any] = {}
        with (self.folder.local / OLD_INDEX).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if split is None or row["split"] == split]
        for row in rows:
            self._add_numbers(row, resolutions)
        columns = [field for field in mesh_columns(resolutions) if not field.name.startswith("voxels_")]
        schema = pa.schema([("id", pa.string()), ("old_shard", pa.string()), *columns])
        self.table = pa.Table.from_pylist(rows, schema=schema)
        self._shards.clear()

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to other processes; each opens its own.
        return {**self.__dict__, "_shards": {}}

    def select(self, rows: pa.Array) -> "OldRecords":
        """Returns the records of some rows, in their order."""
        selected = object.__new__(OldRecords)
        selected.folder, selected._shards, selected.table = self.folder, {}, self.table.take(rows)
        return selected

    def read(self, row: int, section: str) -> dict[str, Tensor]:
        """Returns the tensors of a section.

        Raises:
            ValueError: if there is no such section.
        """
        name = self.table["id"][row].as_py()
        shard = self._open(self.table["old_shard"][row].as_py())
        if section == OCCUPANCY:
            names = {OCCUPANCY: f"{name}/{OCCUPANCY}"}
        elif section == IMAGES:
            names = {str(k): f"{name}/{IMAGES}/{k}" for k in range(self.table["num_images"][row].as_py())}
        elif f"tokens_{section.removeprefix('sdf_')}" in self.table.column_names:
            names = {part: f"{name}/{section}/{part}" for part in ("coords", "sharp", "values")}
        else:
            raise ValueError(f"`section` must be one that the record {name!r} has, got {section!r}")
        return {part: shard.get_tensor(tensor) for part, tensor in names.items()}

    def hashes(self, section: str) -> pa.Array:
        """Returns the content hash of a section of every record, as the new format has it; all data are read."""
        return pa.array([content_hash([self._bytes(row, section)]) for row in range(len(self))], pa.string())

    def records(self, resolutions: Sequence[int]) -> Iterator[Record]:
        """Returns the records one after the other, as the new format has them."""
        sections = mesh_section_names(resolutions)
        for row, columns in enumerate(self.table.to_pylist()):
            parts = {section: self._bytes(row, section) for section in sections}
            for resolution in resolutions:
                values = self.read(row, sdf_section(resolution))["values"]
                columns[f"voxels_{resolution}"] = int((values.abs() < 1).sum())
            picture = self.read(row, IMAGES).get("0")
            del columns["old_shard"]
            name = columns.pop("id")
            yield Record(name, parts, columns, None if picture is None else picture.numpy().tobytes())

    def _bytes(self, row: int, section: str) -> bytes:
        return encode({name: tensor.numpy() for name, tensor in self.read(row, section).items()})

    def _open(self, number: str) -> Any:
        if number not in self._shards:
            self._shards[number] = safe_open(self.folder.local / f"shard-{int(number):05d}.safetensors", "pt")
        return self._shards[number]

    def _add_numbers(self, row: dict[str, Any], resolutions: Sequence[int]) -> None:
        """Turns the texts of numbers in a row of index.csv into numbers, and adds the sizes of the SDFs."""
        row["old_shard"] = row.pop("shard")
        row["num_images"], row["num_given"] = int(row["num_images"]), int(row.get("num_given") or 0)
        row["azimuths"] = [float(azimuth) for azimuth in (row.get("azimuths") or "").split()]
        shard = self._open(row["old_shard"])
        for resolution in resolutions:
            shape = shard.get_slice(f"{row['id']}/{sdf_section(resolution)}/coords").get_shape()
            row[f"tokens_{resolution}"] = shape[0]


def convert_dataset(
    source: str | Path, target: Folder | str | Path, resolutions: Sequence[int], **options: Any
) -> int:
    """Writes the records of a dataset of the old format into a folder of the new one; returns their number.

    What the folder has of them is left as it is, so that a conversion that was broken off can be started again.

    Args:
        source: Folder of the old format.
        target: Folder or address.
        resolutions: Samples per axis of the SDFs.
        options: Arguments of `ShardWriter`.
    """
    old = OldRecords(source, resolutions)
    with ShardWriter(target, mesh_section_names(resolutions), mesh_columns(resolutions), **options) as writer:
        for record in old.records(resolutions):
            if record.id not in writer.ids:
                writer.add(record)
    return merge_index(Folder(target))
