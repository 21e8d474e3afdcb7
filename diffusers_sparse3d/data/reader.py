"""Reading of records: any section of any record with one ranged request."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from .folder import Folder
from .index import shard_file
from .sections import decode


class RecordReader:
    """The sections of the records of an index.

    Objects can be sent to other processes, which open files and connections of their own.

    Args:
        folder: Folder or address; if it is remote and has a cache, sections are kept there.
        table: Rows of an index, with the columns of `section_columns` for each section that is read.
    """

    def __init__(self, folder: Folder | str | Path, table: pa.Table):
        self.folder, self.table = Folder(folder), table

    def __len__(self) -> int:
        return len(self.table)

    def select(self, rows: pa.Array) -> "RecordReader":
        """Returns a reader of some rows, in their order."""
        return RecordReader(self.folder, self.table.take(rows))

    def has(self, row: int, section: str) -> bool:
        """Whether a record has a section."""
        name = f"{section}_length"
        return name in self.table.column_names and self.table[name][row].is_valid

    def read_bytes(self, row: int, section: str) -> bytes:
        """Returns the bytes of a section.

        Raises:
            ValueError: if the record does not have the section, or its shard is damaged: too short or, where the
                folder has a cache, with other bytes than those that the index has the hash of.
            FileNotFoundError: if there is no such shard.
        """
        if not self.has(row, section):
            raise ValueError(f"`section` must be one that the record {row} has, got {section!r}")
        start = self.table[f"{section}_offset"][row].as_py()
        end = start + self.table[f"{section}_length"][row].as_py()
        file = shard_file(self.table["shard"][row].as_py())
        cache = None if self.folder.is_local else self.folder.cache
        if cache is None:
            return self.folder.read(file, start, end)
        name = self.table[f"{section}_hash"][row].as_py()
        source = f"{self.folder.name(file)}, bytes {start} to {end},"
        return cache.get(name, lambda: self.folder.read(file, start, end), source)

    def read(self, row: int, section: str) -> dict[str, Tensor]:
        """Returns the tensors of a section, see `read_bytes`."""
        return decode(self.read_bytes(row, section))


def section_columns(folder: Folder, sections: Sequence[str]) -> list[str]:
    """Returns the columns of the index of a folder that `RecordReader` needs for some sections."""
    kinds = ("offset", "length", *(("hash",) if folder.cache is not None and not folder.is_local else ()))
    return ["shard", *(f"{section}_{kind}" for section in sections for kind in kinds)]
