"""Shards: what goes in comes out, byte by byte the same however it was written, and nothing that is not complete."""

import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.index import merge_index, read_index, read_shard_indices
from diffusers_sparse3d.data.range_cache import RangeCache
from diffusers_sparse3d.data.reader import RecordReader, section_columns
from diffusers_sparse3d.data.record_cache import RecordCache
from diffusers_sparse3d.data.records import Record, mesh_columns
from diffusers_sparse3d.data.sections import encode
from diffusers_sparse3d.data.writer import ShardWriter
from diffusers_sparse3d.training.preparation.groups import CompleteShards, Group


COLUMNS = pa.schema([("split", pa.string()), ("tokens", pa.int32())])
SECTIONS = ["a", "b"]


def record(number, sections=("a", "b")):
    """A record of a few odd tensors: float16, a text of bytes, an empty one."""
    generator = np.random.default_rng(number)
    parts = {
        "a": encode(
            {"values": generator.random((number, 3)).astype(np.float16), "bits": np.arange(5, dtype=np.uint8)}
        ),
        "b": encode({"empty": np.zeros((0, 3), np.int32)}),
    }
    columns = {"split": "val" if number % 3 == 0 else "train", "tokens": number}
    return Record(f"record{number}", {name: parts[name] for name in sections}, columns, b"picture")


def write(folder, numbers, name="0", shard_bytes=1000):
    with ShardWriter(folder, SECTIONS, COLUMNS, name, shard_bytes) as writer:
        for number in numbers:
            if f"record{number}" not in writer.ids:
                writer.add(record(number))
    return writer


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}


def open_reader(folder, split=None):
    table = read_index(Folder(folder), ["id", *section_columns(Folder(folder), SECTIONS), "tokens"], split)
    return RecordReader(folder, table)


def test_round_trip(tmp_path):
    write(tmp_path, range(10))
    assert merge_index(str(tmp_path)) == 10
    reader = open_reader(tmp_path)
    assert len(set(reader.table["shard"].to_pylist())) > 1
    for row, number in enumerate(range(10)):
        expected = np.random.default_rng(number).random((number, 3)).astype(np.float16)
        tensors = reader.read(row, "a")
        assert tensors["values"].dtype == torch.float16 and np.array_equal(tensors["values"].numpy(), expected)
        assert tensors["bits"].tolist() == [0, 1, 2, 3, 4]
        assert reader.read(row, "b")["empty"].shape == (0, 3)
    assert all(offset % 64 == 0 for name in SECTIONS for offset in reader.table[f"{name}_offset"].to_pylist())
    assert open_reader(tmp_path, "val").table["tokens"].to_pylist() == [0, 3, 6, 9]


def test_a_selection_of_rows(tmp_path):
    write(tmp_path, range(5))
    merge_index(str(tmp_path))
    selected = open_reader(tmp_path).select(pa.array([3, 1]))
    assert len(selected) == 2
    assert [len(selected.read(row, "a")["values"]) for row in range(2)] == [3, 1]


def test_one_section_is_one_request(tmp_path, monkeypatch):
    write(tmp_path, range(3))
    merge_index(str(tmp_path))
    reader, requests = open_reader(tmp_path), []
    original = Folder.read
    monkeypatch.setattr(
        Folder, "read", lambda self, *arguments: requests.append(arguments) or original(self, *arguments)
    )
    data = reader.read_bytes(1, "a")
    ((_, start, end),) = requests
    assert end - start == len(data) == reader.table["a_length"][1].as_py()


def test_shards_do_not_depend_on_interruptions(tmp_path):
    write(tmp_path / "once", range(12))
    for stop in range(12):
        folder = tmp_path / f"broken{stop}"
        with pytest.raises(KeyboardInterrupt), ShardWriter(folder, SECTIONS, COLUMNS, "0", 1000) as writer:
            for number in range(12):
                writer.add(record(number))
                if number == stop:
                    raise KeyboardInterrupt
        write(folder, range(12))
        assert contents(folder) == contents(tmp_path / "once")


def test_several_writers_make_one_index(tmp_path):
    for part in (2, 0, 1):
        write(tmp_path, range(part, 12, 3), name=f"part{part}")
    assert merge_index(str(tmp_path)) == 12
    ids = open_reader(tmp_path).table["id"].to_pylist()
    assert ids == [f"record{number}" for part in range(3) for number in range(part, 12, 3)]
    # In memory, without index.parquet: the same rows, without pictures.
    table = read_shard_indices(Folder(tmp_path))
    assert table["id"].to_pylist() == ids and "picture" not in table.column_names


def test_what_is_not_complete_is_not_there(tmp_path):
    """A killed writer leaves parts of files and a shard without an index; other writers' shards are left alone."""
    write(tmp_path, [1], name="0")
    write(tmp_path, [2], name="other")
    (tmp_path / "shards" / "0-000001.bin").write_bytes(b"no index")
    (tmp_path / "shards" / "other-000001.bin").write_bytes(b"no index")
    (tmp_path / "shards" / ".0-000001.partial.parquet").write_bytes(b"half")
    merge_index(str(tmp_path))
    assert len(open_reader(tmp_path)) == 2
    ShardWriter(tmp_path, SECTIONS, COLUMNS, "0")
    assert sorted(contents(tmp_path)) == [
        "0-000000.bin", "0-000000.parquet", "other-000000.bin", "other-000000.parquet", "other-000001.bin"
    ]  # fmt: skip


def test_sections_and_columns_may_differ(tmp_path):
    with ShardWriter(tmp_path, SECTIONS, COLUMNS, "0") as writer:
        writer.add(record(1, sections=("b",)))
    with ShardWriter(tmp_path, ["c"], pa.schema([("new", pa.string())]), "1") as writer:
        writer.add(Record("last", {"c": encode({"x": np.ones(1)})}, {"new": "text"}))
    merge_index(str(tmp_path))
    table = read_index(Folder(tmp_path), ["new", *section_columns(Folder(tmp_path), ["a", "b", "c"])])
    reader = RecordReader(tmp_path, table)
    assert table["new"].to_pylist() == [None, "text"]
    assert [[reader.has(row, name) for name in ("a", "b", "c", "d")] for row in (0, 1)] == [
        [False, True, False, False], [False, False, True, False]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`section` must be one that the record 0 has, got 'a'"):
        reader.read(0, "a")


def test_records_that_do_not_fit_are_refused(tmp_path):
    with ShardWriter(tmp_path, SECTIONS, COLUMNS) as writer:
        writer.add(record(1))
        with pytest.raises(ValueError, match="an id that was not written before, got 'record1'"):
            writer.add(record(1))
        with pytest.raises(ValueError, match=r"sections of .* unknown \['c'\]"):
            writer.add(Record("x", {"c": b""}))
        with pytest.raises(ValueError, match=r"columns of .* unknown \['size'\]"):
            writer.add(Record("x", {}, {"size": 1}))
    with pytest.raises(ValueError, match="`name` must be"):
        ShardWriter(tmp_path, SECTIONS, COLUMNS, "../x")
    with pytest.raises(ValueError, match="`columns` must have names other"):
        ShardWriter(tmp_path, SECTIONS, pa.schema([("a_hash", pa.string())]))


def test_damage_is_noticed(tmp_path):
    write(tmp_path, range(4), shard_bytes=1)
    shard = tmp_path / "shards" / "0-000001.bin"
    whole = shard.read_bytes()
    merge_index(str(tmp_path))
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"0-000001.bin must have .* bytes"):
        merge_index(str(tmp_path))
    reader = open_reader(tmp_path)
    with pytest.raises(ValueError, match="the file is damaged"):
        reader.read(1, "b")
    shard.unlink()
    with pytest.raises(ValueError, match="got no such file"):
        merge_index(str(tmp_path))
    # The old index is what there is.
    assert len(open_reader(tmp_path)) == 4
    # The damaged shard is made anew, in its place.
    (tmp_path / "shards" / "0-000001.parquet").unlink()
    write(tmp_path, range(4), shard_bytes=1)
    assert shard.read_bytes() == whole
    write(tmp_path, [2], name="again")
    with pytest.raises(ValueError, match=r"Ids must be there once, .* \['record2'\]"):
        merge_index(str(tmp_path))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("function", [merge_index, read_shard_indices, CompleteShards])
def test_a_shard_that_is_completed_during_a_listing_is_not_damaged(tmp_path, monkeypatch, caplog, function, place):
    """Another process completes it after the listing `place`: the shard counts as a whole, or not yet."""
    sizes, listings = Folder.sizes, []

    def write_mesh(name):
        columns = mesh_columns([16]).append(pa.field("mesh_bytes", pa.int64()))
        with ShardWriter(tmp_path, ["a"], columns, name) as writer:
            writer.add(Record(f"mesh{name}", {"a": encode({"x": np.ones(3)})}))

    def interrupted(self, *arguments):
        found = sizes(self, *arguments)
        listings.append(arguments)
        if len(listings) == place + 1:
            write_mesh("000001")
        return found

    write_mesh("000000")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Folder, "sizes", interrupted)
        result = function(Folder(tmp_path))
    if function is CompleteShards:
        found = [id for number in range(2) for id in result.rows(Group(number))]
        assert found in (["mesh000000"], ["mesh000000", "mesh000001"])
    else:
        assert (result if function is merge_index else len(result)) in (1, 2)
    assert caplog.messages == []
    if len(listings) <= place:
        write_mesh("000001")
    assert merge_index(str(tmp_path)) == 2


@pytest.mark.parametrize("suffixes", [{".bin"}, {".parquet"}, {".bin", ".parquet"}])
def test_links_to_files_are_shards(tmp_path, caplog, suffixes):
    write(tmp_path / "data", range(4), name="000000", shard_bytes=1)
    (tmp_path / "store").mkdir()
    for path in (tmp_path / "data" / "shards").iterdir():
        if path.suffix in suffixes:
            target = tmp_path / "store" / path.name
            shutil.move(path, target)
            path.symlink_to(target)
    before = contents(tmp_path / "data")
    assert merge_index(str(tmp_path / "data")) == 4
    assert len(read_shard_indices(Folder(tmp_path / "data"))) == 4 and caplog.messages == []
    assert sorted(open_reader(tmp_path / "data").read(3, "a")) == ["bits", "values"]
    # Who writes on does not take them for what a killed process left.
    assert write(tmp_path / "data", range(4), name="000000").ids == {f"record{number}" for number in range(4)}
    assert contents(tmp_path / "data") == before
    # Links to nothing and to folders are no files, and a target of another size is damage.
    shards = tmp_path / "data" / "shards"
    (shards / "000001-000000.parquet").symlink_to(tmp_path / "nothing")
    (shards / "000002-000000.parquet").symlink_to(tmp_path / "store")
    assert merge_index(str(tmp_path / "data")) == 4
    (shards / "000000-000003.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"000000-000003.bin must have .* bytes, .* got 5: "):
        merge_index(str(tmp_path / "data"))


def test_an_index_of_other_shards_fills_no_cache(tmp_path):
    """The shards are written anew, with other values at the same places, while a reader has the old index."""

    def write_values(value):
        with ShardWriter("memory://anew", ["a"], pa.schema([])) as writer:
            writer.add(Record("one", {"a": encode({"x": np.full(20, value)})}))
        merge_index("memory://anew")

    folder = Folder("memory://anew", cache=RangeCache(tmp_path, 10**6))
    write_values(1)
    old = RecordReader(folder, read_index(folder, section_columns(folder, ["a"])))
    folder.filesystem.rm("/anew", recursive=True)
    write_values(2)
    with pytest.raises(ValueError, match=r"/anew/shards/0-000000.bin, bytes 0 to \d+, must .* not belong together"):
        old.read(0, "a")
    assert list(tmp_path.glob("??/*")) == []
    new = RecordReader(folder, read_index(folder, section_columns(folder, ["a"])))
    for _ in range(2):
        assert new.read(0, "a")["x"].tolist() == [2] * 20
    folder.filesystem.rm("/anew", recursive=True)


def test_an_index_is_not_replaced_by_none(tmp_path):
    """As where the disk with the shards is missing."""
    assert merge_index(str(tmp_path)) == 0
    write(tmp_path, range(3))
    assert merge_index(str(tmp_path)) == 3
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"`folder` must have complete shards, got none .* index.parquet of 3 records"
    ):
        merge_index(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "index.parquet"]
    assert len(open_reader(tmp_path)) == 3
    (tmp_path / "index.parquet").unlink()
    assert merge_index(str(tmp_path)) == 0 == merge_index(str(tmp_path))


def test_a_cache_keeps_what_came_before_an_error(tmp_path):
    def records():
        yield record(1)
        yield record(2)
        raise KeyError("on purpose")

    cache = RecordCache(Folder(tmp_path), SECTIONS, COLUMNS, {})
    with pytest.raises(KeyError, match="on purpose"):
        cache.add(records())
    keys = pa.array(["record1", "record2", "record3"])
    assert cache.missing(keys) == [2]
    assert len(cache.open(keys[:2]).read(1, "a")["values"]) == 2


def test_content_hash_is_of_the_sections_alone(tmp_path):
    one = record(5)
    assert one.hash == Record("x", one.sections).hash
    assert len(one.hash) == 32 and int(one.hash, 16)
    swapped = Record("x", {"a": one.sections["b"], "b": one.sections["a"]})
    renamed = Record("x", {"a": one.sections["a"], "c": one.sections["b"]})
    assert len({one.hash, record(6).hash, record(5, ("a",)).hash, swapped.hash, renamed.hash}) == 5


def test_the_index_of_a_shard_has_a_picture_for_the_hub(tmp_path):
    write(tmp_path, [1])
    table = pq.read_table(tmp_path / "shards" / "0-000000.parquet")
    assert table["picture"].to_pylist() == [{"bytes": b"picture", "path": None}]
