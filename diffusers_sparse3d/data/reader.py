"""Reading of records: any section of any record with one ranged request."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from .folder import Folder
from .index import shard_file
from .range_cache import RangeCache
from .sections import decode


class RecordReader:
    """The sections of the records of an index.

    Objects can be sent to other processes, which open files and connections of their own.

    Args:
        folder: Folder or address.
        table: Rows of an index, with the columns `shard` and, for each section that is read, SECTION_offset,
            SECTION_length and, with a cache, SECTION_hash.
        cache: Keeps what was read of a remote folder on the local disk.
    """

    def __init__(self, folder: Folder | str | Path, table: pa.Table, cache: RangeCache | None = None):
        self.folder, self.table, self.cache = Folder(folder), table, cache

    def __len__(self) -> int:
        return len(self.table)

    def select(self, rows: pa.Array) -> "RecordReader":
        """Returns a reader of some rows, in their order."""
        return RecordReader(self.folder, self.table.take(rows), self.cache)

    def has(self, row: int, section: str) -> bool:
        """Whether a record has a section."""
        name = f"{section}_length"
        return name in self.table.column_names and self.table[name][row].is_valid

    def read_bytes(self, row: int, section: str) -> bytes:
        """Returns the bytes of a section.

        Raises:
            ValueError: if the record does not have the section, or its shard is damaged.
            FileNotFoundError: if there is no such shard.
        """
        if not self.has(row, section):
            raise ValueError(f"`section` must be one that the record {row} has, got {section!r}")
        start = self.table[f"{section}_offset"][row].as_py()
        end = start + self.table[f"{section}_length"][row].as_py()
        file = shard_file(self.table["shard"][row].as_py())
        if self.cache is None:
            return self.folder.read(file, start, end)
        return self.cache.get(self.table[f"{section}_hash"][row].as_py(), lambda: self.folder.read(file, start, end))

    def read(self, row: int, section: str) -> dict[str, Tensor]:
        """Returns the tensors of a section, see `read_bytes`."""
        return decode(self.read_bytes(row, section))


def section_columns(sections: Sequence[str], hashes: bool) -> list[str]:
    """Returns the columns of an index that `RecordReader` needs for some sections."""
    kinds = ("offset", "length", *(("hash",) if hashes else ()))
    return ["shard", *(f"{section}_{kind}" for section in sections for kind in kinds)]
