"""Files and folders that are complete or absent."""

import errno
import os
import re
import sys
from collections.abc import Iterator

import pytest

from diffusers_sparse3d import files
from diffusers_sparse3d.files import PARTIAL, folder_beside, write_text, written_beside


O_TEMPORARY = 1 << 30


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files as Windows has them, and the names of those that were synced.

    Folders cannot be opened, files that are open for reading alone cannot be synced, a folder with an open file cannot
    be renamed, there is no `fcntl`, and temporary files are deleted as they are closed.
    """
    system_open, system_close, system_fsync, system_rename = os.open, os.close, os.fsync, os.rename
    flags_of: dict[int, tuple[str, int]] = {}
    synced: list[str] = []

    def open_file(path, flags, mode=0o777, **options):
        # With `dir_fd`, which Windows does not have, `shutil.rmtree` opens what it deletes.
        if os.path.isdir(path) and "dir_fd" not in options:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        descriptor = system_open(path, flags & ~O_TEMPORARY, mode, **options)
        flags_of[descriptor] = os.fspath(path), flags
        return descriptor

    def close(descriptor):
        path, flags = flags_of.pop(descriptor, ("", 0))
        system_close(descriptor)
        if flags & O_TEMPORARY:
            os.unlink(path)

    def fsync(descriptor):
        path, flags = flags_of[descriptor]
        if not flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        system_fsync(descriptor)
        synced.append(os.path.basename(path))

    def rename(source, target, **options):
        if any(os.path.dirname(path) == os.fspath(source) for path, _ in flags_of.values()):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        system_rename(source, target, **options)

    with monkeypatch.context() as patch:
        # `os.name` itself would change the paths of pathlib.
        patch.setattr(files, "WINDOWS", True)
        patch.setattr(os, "O_TEMPORARY", O_TEMPORARY, raising=False)
        patch.setitem(sys.modules, "fcntl", None)
        for name, function in (("open", open_file), ("close", close), ("fsync", fsync), ("rename", rename)):
            patch.setattr(os, name, function)
        yield synced
    assert not flags_of


def test_texts_replace_each_other(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("first, which is longer", "zweite, größer"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "mesh.glb"
    for content in (b"one", b"two"):
        with written_beside(path) as partial:
            assert partial.suffix == ".glb" and partial.parent == path.parent and partial != path
            partial.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("writes", [True, False])
def test_a_block_that_raises_changes_nothing(tmp_path, writes):
    path = tmp_path / "mesh.glb"
    path.write_bytes(b"old")
    with pytest.raises(KeyError, match="reason"), written_beside(path) as partial:
        if writes:
            partial.write_bytes(b"half")
        raise KeyError("reason")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError, match="reason"), folder_beside(tmp_path / "model") as partial:
        if writes:
            (partial / "config.json").write_text("half")
        raise KeyError("reason")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_at_the_end_without_what_a_killed_process_left(tmp_path):
    left = tmp_path / f".model{PARTIAL}"
    (left / "part").mkdir(parents=True)
    (left / "part" / "weights").write_text("left")
    (tmp_path / "model").mkdir()
    with folder_beside(tmp_path / "model") as partial:
        assert list(partial.iterdir()) == []
        (partial / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="another process"), folder_beside(tmp_path / "model"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_files_and_folders_are_written_on_windows(tmp_path, windows):
    for text in ("old", "new"):
        write_text(tmp_path / "notes.txt", text)
        with written_beside(tmp_path / "mesh.glb") as partial:
            partial.write_text(text)
    with folder_beside(tmp_path / "model") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "weights").write_text("weights")
    names = [re.sub("-[0-9a-f]{12}", "", name) for name in windows]
    assert names == [f".notes{PARTIAL}.txt", f".mesh{PARTIAL}.glb"] * 2 + ["weights"]
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "mesh.glb").read_text() == "new"
    assert (tmp_path / "model" / "part" / "weights").read_text() == "weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mesh.glb", "model", "notes.txt"]


def test_a_folder_has_one_writer_on_windows(tmp_path, windows):
    with folder_beside(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="another process"), folder_beside(tmp_path / "model"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    # The lock ends with the block.
    with pytest.raises(KeyError, match="reason"), folder_beside(tmp_path / "other"):
        raise KeyError("reason")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with folder_beside(tmp_path / "other"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]
