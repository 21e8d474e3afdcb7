"""The index of a folder of shards: which records there are, and where."""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .folder import Folder


logger = logging.getLogger(__name__)

SHARDS = "shards"
INDEX = "index.parquet"
PICTURE = "picture"
# Rows of a group of index.parquet, the unit in which Parquet files are read.
GROUP_ROWS = 20_000
# Indices of shards that are read at the same time, as each is a request that takes long.
SHARDS_AT_ONCE = 16
# Columns with few different values, which are kept as a number and a table of texts.
FEW_VALUES = ("shard", "source", "category", "license", "author", "split")


def index_schema(sections: Sequence[str], columns: Iterable[pa.Field]) -> pa.Schema:
    """Returns the columns of an index.

    - id: string; hash: string, the content hash of the record, 32 hexadecimal digits
    - shard: string, the name of the shard without its suffix; offset, length: int64, bytes of the record in it
    - SECTION_offset, SECTION_length: int64, SECTION_hash: string, for each section: its bytes in the shard; null if
      the record does not have it
    - all of `columns`

    Raises:
        ValueError: if two columns have one name.
    """
    fields = [("id", pa.string()), ("hash", pa.string()), ("shard", pa.string())]
    fields += [("offset", pa.int64()), ("length", pa.int64())]
    for section in sections:
        fields += [(f"{section}_offset", pa.int64()), (f"{section}_length", pa.int64())]
        fields += [(f"{section}_hash", pa.string())]
    schema = pa.schema([*fields, *columns])
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(
            f"`columns` must have names other than those of every index, got {[field.name for field in columns]}"
        )
    return schema


def committed_shards(folder: Folder) -> list[str]:
    """Returns the names of the complete shards of a folder in ascending order."""
    return [name.removesuffix(".parquet") for name in folder.sizes(SHARDS, ".parquet")]


def complete_shards(folder: Folder) -> dict[str, int | None]:
    """Returns the bytes of the complete shards of a folder by name, in ascending order; None if a file is missing."""
    # In this order: a shard that another process completes in between has its file before its index.
    shards = committed_shards(folder)
    sizes = folder.sizes(SHARDS, ".bin")
    return {shard: sizes.get(f"{shard}.bin") for shard in shards}


def shard_file(shard: str) -> str:
    """Returns the file of a shard in its folder."""
    return f"{SHARDS}/{shard}.bin"


def shard_index(shard: str) -> str:
    """Returns the file in a folder that has the index of one shard."""
    return f"{SHARDS}/{shard}.parquet"


def read_shard_indices(folder: Folder, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the rows of all complete shards, in ascending order of the shards' names.

    Shards whose file is missing or has another size than their index says are left out, with a warning.

    Args:
        folder: The folder.
        columns: Names of the columns to read, where the shards have them; all but the pictures if None.
    """
    shards, tables = complete_shards(folder), []
    needed = None if columns is None else {*columns, "shard", "offset", "length"}
    for table in _shard_tables(folder, list(shards), needed):
        try:
            _check_ends(table, shards)
        except ValueError as error:
            logger.warning("%s", error)
            continue
        tables.append(table.select([name for name in table.column_names if columns is None or name in columns]))
    return pa.concat_tables(tables, promote_options="default") if tables else index_schema([], []).empty_table()


def merge_index(folder: Folder | str) -> int:
    """Writes index.parquet from the indices of all complete shards, and returns its number of rows.

    Memory holds the rows of about `GROUP_ROWS` records and the ids.

    Raises:
        ValueError: if a shard has another size than its index says, or an id is there twice; the message names them.
            Or if there are no records, but an index.parquet of some, which stays.
    """
    folder = Folder(folder)
    shards = complete_shards(folder)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        schemas = dict.fromkeys(pool.map(partial(_read_schema, folder), shards))
    schema = pa.unify_schemas(list(schemas)) if schemas else index_schema([], [])
    ids: list[pa.Array] = []
    with folder.write(INDEX) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in _grouped(_shard_tables(folder, list(shards), None), schema):
            _check_ends(table, shards)
            ids.append(table["id"].combine_chunks())
            writer.write_table(table, row_group_size=GROUP_ROWS)
        _check_unique(pa.chunked_array(ids, pa.string()))
        if not ids:
            _check_nothing_is_lost(folder)
    return sum(len(part) for part in ids)


def read_index(folder: Folder, columns: Sequence[str], split: str | None = None) -> pa.Table:
    """Returns columns of index.parquet, of all records or of those of one split, in the order of the file.

    Args:
        folder: The folder.
        columns: Names of the columns; what the index does not have is left out.
        split: Value of the column `split`.
    """
    with folder.local_copy(INDEX) as path:
        parquet = pq.ParquetFile(path)
        known = [name for name in dict.fromkeys(columns) if name in parquet.schema_arrow.names]
        read = list(dict.fromkeys([*known, *(() if split is None else ("split",))]))
        # One group after the other, so that memory has little more than what is kept of them.
        parts = [_with_few_values(parquet.schema_arrow.empty_table().select(known))]
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=read, use_threads=False)
            if split is not None:
                table = table.filter(pc.equal(table["split"], split))
            parts.append(_with_few_values(table.select(known)))
        parquet.close()
    table = pa.concat_tables(parts).unify_dictionaries()
    pa.default_memory_pool().release_unused()
    return table


def _with_few_values(table: pa.Table) -> pa.Table:
    """A table with columns of few values as numbers and a table of texts."""
    return pa.table(
        [
            column.dictionary_encode() if name in FEW_VALUES else column
            for name, column in zip(table.column_names, table.columns)
        ],
        names=table.column_names,
    )


def _shard_tables(folder: Folder, shards: Sequence[str], columns: Container[str] | None) -> Iterator[pa.Table]:
    """The index of one shard after the other, without pictures."""

    def read(shard: str) -> pa.Table:
        parquet = pq.ParquetFile(pa.BufferReader(folder.read(shard_index(shard))))
        names = [name for name in parquet.schema_arrow.names if name != PICTURE]
        table = parquet.read([name for name in names if columns is None or name in columns], use_threads=False)
        return table.replace_schema_metadata()

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for start in range(0, len(shards), 4 * SHARDS_AT_ONCE):
            yield from pool.map(read, shards[start : start + 4 * SHARDS_AT_ONCE])


def _read_schema(folder: Folder, shard: str) -> pa.Schema:
    with folder.filesystem.open(folder.name(shard_index(shard)), "rb") as file:
        schema = pq.read_schema(file).remove_metadata()
    return pa.schema([field for field in schema if field.name != PICTURE])


def _grouped(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of about `GROUP_ROWS` rows with all columns of a schema, null where they are missing."""
    waiting, rows = [schema.empty_table()], 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= GROUP_ROWS:
            yield pa.concat_tables(waiting, promote_options="default").select(schema.names)
            waiting, rows = [schema.empty_table()], 0
    if rows:
        yield pa.concat_tables(waiting, promote_options="default").select(schema.names)


def _check_ends(table: pa.Table, sizes: Mapping[str, int | None]) -> None:
    """Raises a ValueError unless shards are as long as their last record says."""
    ends = table.select(["shard"]).append_column("end", pc.add(table["offset"], table["length"]))
    for row in ends.group_by("shard").aggregate([("end", "max")]).to_pylist():
        actual = sizes.get(row["shard"])
        if actual != row["end_max"]:
            raise ValueError(
                f"The shard {row['shard']}.bin must have {row['end_max']} bytes, as its index says, got"
                f" {'no such file' if actual is None else actual}: delete {row['shard']}.parquet and make it anew"
            )


def _check_nothing_is_lost(folder: Folder) -> None:
    """Raises a ValueError if index.parquet has records."""
    if not folder.exists(INDEX):
        return
    with folder.local_copy(INDEX) as path:
        rows = pq.read_metadata(path).num_rows
    if rows:
        raise ValueError(
            f"`folder` must have complete shards, got none in {folder.name(SHARDS)}, but an {INDEX} of {rows} records,"
            f" which stays as it was: restore the shards, or delete {INDEX} to begin anew"
        )


def _check_unique(ids: pa.ChunkedArray) -> None:
    """Raises a ValueError that names ids which are there twice."""
    if len(pc.unique(ids)) == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    raise ValueError(f"Ids must be there once, got several records of {twice.to_pylist()[:4]}")


def find_rows(keys: pa.Array | pa.ChunkedArray, values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns the place of each key among some values, `[N]` int64; -1 for keys that are not there."""
    return pc.fill_null(pc.index_in(keys, value_set=values), -1).to_numpy(zero_copy_only=False).astype(np.int64)
