"""Caches of what is computed once from records: keyed by the content of what it was made from.

A cache is a folder of shards without an index.parquet. The id of a record is the content hash of its input, and the
folder is that of everything else that the record depends on (weights, settings). So a record can never be that of
other data, whatever their ids are; records of several datasets and splits may share a folder; and any number of
processes may add to it at the same time, each writing shards of a name of its own.
"""

import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..files import PARTIAL
from .folder import Folder
from .index import SHARDS, find_rows, read_shard_indices
from .reader import RecordReader, section_columns
from .records import Record
from .writer import SHARD_BYTES, ShardWriter


logger = logging.getLogger(__name__)

# Seconds after which a shard is completed though it is not full: the most work that a killed process loses.
COMMIT_SECONDS = 600.0
# A file that no process has written to for so many seconds is one that a killed process left.
ABANDONED_SECONDS = 86_400.0


class RecordCache:
    """A folder of records by the content hash of their inputs.

    Args:
        folder: The folder or its address.
        sections: Sections of the records.
        columns: Further columns of the index.
        facts: What the records depend on beside their inputs; about.json shows it to people.
    """

    def __init__(self, folder: Folder, sections: Sequence[str], columns: pa.Schema, facts: Mapping[str, Any]):
        self.folder, self.sections, self.columns, self.facts = folder, list(sections), columns, dict(facts)

    def missing(self, keys: pa.Array | pa.ChunkedArray, part: int = 0, num_parts: int = 1) -> list[int]:
        """Returns the first row of each key that the cache lacks, of the rows `part`, `part + num_parts`, ..."""
        found = find_rows(keys, read_shard_indices(self.folder, ["id"])["id"])
        mine = np.flatnonzero(found < 0)
        mine = mine[mine % num_parts == part]
        if not len(mine):
            return []
        numbers = keys.take(pa.array(mine)).combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys.take(mine)
        _, first = np.unique(numbers.dictionary_encode().indices.to_numpy(), return_index=True)
        return mine[np.sort(first)].tolist()

    def add(self, records: Iterator[Record], shard_bytes: int = SHARD_BYTES) -> None:
        """Writes records as they come: a shard is complete when it is full, after ten minutes, or at the end.

        If `records` raises an error, what came before it is kept.
        """
        self._delete_abandoned()
        if not self.folder.exists("about.json"):
            self.folder.write_text("about.json", json.dumps(self.facts, indent=2) + "\n")
        begin = time.monotonic()
        name = uuid.uuid4().hex[:12]
        with ShardWriter(self.folder, self.sections, self.columns, name, shard_bytes) as writer:
            while True:
                try:
                    record = next(records)
                except StopIteration:
                    break
                except BaseException:
                    writer.finish_shard()
                    raise
                writer.add(record)
                if time.monotonic() - begin > COMMIT_SECONDS:
                    writer.finish_shard()
                    begin = time.monotonic()

    def open(self, keys: pa.Array | pa.ChunkedArray) -> RecordReader:
        """Returns a reader of the records of some keys, in their order.

        Raises:
            ValueError: if the cache lacks one.
        """
        names = ["id", *section_columns(self.folder, self.sections), *self.columns.names]
        table = read_shard_indices(self.folder, names)
        rows = find_rows(keys, table["id"])
        if lacking := int((rows < 0).sum()):
            raise ValueError(
                f"The cache {self.folder} must have {len(keys)} records, got none for {lacking} of them: it must be a"
                " folder that all processes share"
            )
        return RecordReader(self.folder, table.drop_columns(["id"]).take(pa.array(rows)))

    def _delete_abandoned(self) -> None:
        """Deletes parts of files that killed processes left long ago."""
        if not self.folder.is_local:
            return
        root = self.folder.local
        for path in (*root.glob(f".*{PARTIAL}.*"), *(root / SHARDS).glob(f".*{PARTIAL}.*")):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                continue
