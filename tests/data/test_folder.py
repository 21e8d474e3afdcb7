"""Folders on file systems that read in blocks, as the hub does: exactly the bytes that were asked for are fetched."""

import fsspec
import pytest
import torch
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from diffusers_sparse3d import files
from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.range_cache import RangeCache
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from tests.data.shapes import write_dataset


class BlockFile(AbstractBufferedFile):
    """A file whose ranges are fetched from a local one."""

    def _fetch_range(self, start, end):
        self.fs.fetched.append((start, end))
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class BlockFileSystem(AbstractFileSystem):
    """A file system over the local one with files in the manner of `HfFileSystem`."""

    protocol = "blocks"
    fetched: list = []

    def __init__(self, **options):
        super().__init__(**options)
        self.local = fsspec.filesystem("file")

    def info(self, path, **_):
        return self.local.info(path)

    def ls(self, path, detail=True, **_):
        return self.local.ls(path, detail=detail)

    def get_file(self, rpath, lpath, **_):
        self.local.get_file(rpath, lpath)

    def _open(self, path, mode="rb", **options):
        return BlockFile(self, path, mode, **options)


@pytest.fixture
def remote(tmp_path):
    fsspec.register_implementation("blocks", BlockFileSystem, clobber=True)
    write_dataset(tmp_path)
    return Folder(f"blocks://{tmp_path}")


def test_no_byte_too_many(tmp_path, remote):
    local, data = SparseSDFDataset(tmp_path), SparseSDFDataset(remote)
    for index in range(len(data)):
        BlockFileSystem.fetched.clear()
        blocks = data.packed_blocks(index, 32)
        ((start, end),) = BlockFileSystem.fetched
        row = data.table.slice(index, 1).to_pylist()[0]
        assert (start, end) == (row["sdf_32_offset"], row["sdf_32_offset"] + row["sdf_32_length"])
        assert torch.equal(blocks["values"], local.packed_blocks(index, 32)["values"])


def test_a_folder_inside_has_the_same_options_and_cache(tmp_path):
    cache = RangeCache(tmp_path, 100)
    inside = Folder("memory://data/", {"use_listings_cache": False}, cache) / "run"
    assert (inside.path, inside.options) == ("memory://data/run", {"use_listings_cache": False})
    assert inside.cache is cache


def test_a_folder_that_is_not_local_has_no_local_path(remote):
    with pytest.raises(ValueError, match="`path` must be a local folder, got 'blocks://"):
        remote.local  # noqa: B018


def test_two_writers_of_one_text(tmp_path, monkeypatch):
    """The second writes all of it between the first one's writing and renaming."""
    target, waiting = Folder(tmp_path), [True]

    def interrupted(path):
        if waiting.pop() if waiting else False:
            target.write_text("about.json", "second")
            assert (tmp_path / "about.json").read_text() == "second"

    monkeypatch.setattr(files, "sync", interrupted)
    target.write_text("about.json", "first")
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]
    assert (tmp_path / "about.json").read_text() == "first"
