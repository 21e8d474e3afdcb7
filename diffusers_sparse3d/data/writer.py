"""Writing of records into shards."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import PARTIAL
from .folder import Folder
from .hub import with_hub_features
from .index import PICTURE, SHARDS, committed_shards, index_schema, shard_file, shard_index
from .records import Record


# Sections begin at multiples of this number of bytes.
ALIGNMENT = 64
# Bytes from which on a shard is full. A shard ends with the record that reaches it.
SHARD_BYTES = 256_000_000


class ShardWriter:
    """A writer of records into shards NAME-000000, NAME-000001, ... of a folder.

    A shard is in the folder, as a whole, when it is full or the writer is closed: then its records are there for good.
    The shards depend on the records, their order and `shard_bytes` alone, byte by byte, whether they were written in
    one run or in several: a writer that is made again goes on after the complete shards of its name, and `ids` says
    which records these have.

    Several writers may write into one folder if each has a name of its own. The order of an index is that of names.

        with ShardWriter(folder, mesh_section_names(resolutions), mesh_columns(resolutions), name="000042") as writer:
            for record in records:
                if record.id not in writer.ids:
                    writer.add(record)
        merge_index(folder)

    Leaving the `with` block without an error closes the writer; after an error, the unfinished shard is dropped.

    Args:
        folder: Folder or address, which is made if there is none.
        sections: Names of the sections that records may have.
        columns: Further columns of the index.
        name: Name of the shards: letters, digits, "." and "_", at most 100.
        shard_bytes: Bytes from which on a shard is full.

    Raises:
        ValueError: if `name` is none or `columns` has a name that every index has.
    """

    def __init__(
        self,
        folder: Folder | str | Path,
        sections: Sequence[str],
        columns: pa.Schema,
        name: str = "0",
        shard_bytes: int = SHARD_BYTES,
    ):
        if not name.replace("_", "").replace(".", "").isalnum() or not name.isascii() or len(name) > 100:
            raise ValueError(f"`name` must be of at most 100 letters, digits, '.' and '_', got {name!r}")
        if shard_bytes < 1:
            raise ValueError(f"`shard_bytes` must be positive, got {shard_bytes}")
        self.folder, self.name, self.shard_bytes = Folder(folder), name, shard_bytes
        self.sections = list(sections)
        self.schema = index_schema(sections, columns)
        self.shards: list[str] = []
        self.ids: set[str] = set()
        complete = {shard for shard in committed_shards(self.folder) if shard.rpartition("-")[0] == name}
        self._delete_leftovers(complete)
        for shard in sorted(complete):
            self.shards.append(shard)
            with self.folder.filesystem.open(self.folder.name(shard_index(shard)), "rb") as file:
                self.ids.update(pq.read_table(file, columns=["id"])["id"].to_pylist())
        self._rows: list[dict[str, Any]] = []
        self._pictures: list[bytes | None] = []
        self._position = 0
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)

    def add(self, record: Record) -> None:
        """Writes a record; it is in the folder when its shard is full or the writer is closed.

        Raises:
            ValueError: if the record has an unknown section or column, or its id was written before.
        """
        self._check(record)
        if self._file is None:
            self._file = self._stack.enter_context(self._open(self._shard))
        row: dict[str, Any] = {"id": record.id, "hash": record.hash, "shard": self._shard, **record.columns}
        start = self._align()
        for name, data in record.sections.items():
            offset = self._align()
            self._file.write(data)
            self._position += len(data)
            row |= {f"{name}_offset": offset, f"{name}_length": len(data), f"{name}_hash": record.hashes[name]}
        self._rows.append({**row, "offset": start, "length": self._position - start})
        self._pictures.append(record.picture)
        self.ids.add(record.id)
        if self._position >= self.shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Completes the shard that is being written, if there is one: its records are then in the folder for good."""
        if self._file is None:
            return
        self._stack.close()
        table = pa.Table.from_pylist(self._rows, schema=self.schema)
        pictures = [None if data is None else {"bytes": data, "path": None} for data in self._pictures]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = with_hub_features(table.append_column(PICTURE, pa.array(pictures, kind)))
        with self.folder.write(shard_index(self._shard)) as path:
            pq.write_table(table, path, compression="zstd")
        self.shards.append(self._shard)
        self._rows, self._pictures, self._position, self._file = [], [], 0, None

    def close(self) -> None:
        """Completes the last shard."""
        self.finish_shard()

    @property
    def _shard(self) -> str:
        """Name of the shard that is being written or would be next: with the first number that is free."""
        names = (f"{self.name}-{number:06d}" for number in itertools.count())
        return next(name for name in names if name not in self.shards)

    def _delete_leftovers(self, complete: set[str]) -> None:
        """Deletes what killed writers of this name left: shards without an index, and parts of files."""
        for file in self.folder.sizes(SHARDS, ".bin"):
            shard = file.removesuffix(".bin")
            if shard.rpartition("-")[0] == self.name and shard not in complete:
                self.folder.delete(shard_file(shard))
        if self.folder.is_local:
            for path in (self.folder.local / SHARDS).glob(f".{self.name}-*{PARTIAL}.*"):
                path.unlink()

    @contextmanager
    def _open(self, shard: str) -> Iterator[IO[bytes]]:
        with self.folder.write(shard_file(shard)) as path, path.open("wb") as file:
            yield file

    def _align(self) -> int:
        """Fills the shard up to the next multiple of `ALIGNMENT` and returns the position."""
        assert self._file is not None
        padding = -self._position % ALIGNMENT
        self._file.write(bytes(padding))
        self._position += padding
        return self._position

    def _check(self, record: Record) -> None:
        if unknown := sorted(set(record.sections) - set(self.sections)):
            raise ValueError(f"`record` must have sections of {self.sections}, got the unknown {unknown}")
        if unknown := sorted(set(record.columns) - set(self.schema.names)):
            raise ValueError(f"`record` must have columns of {self.schema.names}, got the unknown {unknown}")
        if record.id in self.ids:
            raise ValueError(f"`record` must have an id that was not written before, got {record.id!r}")
