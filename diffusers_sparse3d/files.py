"""Files that are complete or absent: written beside their place, synced to the disk and renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Ends the names of files and folders that are being written.
PARTIAL = ".partial"
# Windows syncs only files that are open for writing, opens no folders, and has no `fcntl`.
WINDOWS = os.name == "nt"


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder (which Windows cannot be asked for), are on the disk."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file, which is the old or the new one at any moment, whoever else writes it too."""
    partial = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{PARTIAL}{path.suffix}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """
    A file for a `with` block to write, with the suffix of `path`, which takes the place of `path` at the end.

    If the block raises, `path` stays as it was and nothing is left beside it. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}{PARTIAL}{path.suffix}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def final_name(folder: Path) -> str:
    """The name of a folder or, while it is filled beside its place, the one that it will have there."""
    name = folder.resolve().name
    return name.removesuffix(PARTIAL).removeprefix(".") if name.endswith(PARTIAL) else name


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """
    An empty folder for a `with` block to fill, which takes the place of `path`, absent or an empty folder, at the end.

    If the block raises, nothing is left. What a killed process has left is removed by the next one that writes `path`.

    Raises:
        ValueError: if another process is writing `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.mkdir(exist_ok=True)
    with _locked(partial) as mine:
        if not mine:
            raise ValueError(f"`{path}` is being written by another process")
        try:
            _empty(partial)
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            if path.exists():
                path.rmdir()
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder for a `with` block, or until this process ends, however that is; False if another one has it."""
    try:
        if WINDOWS:
            # A file that is deleted as it is closed; a folder with an open file in it could not be renamed.
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_TEMPORARY  # type: ignore[attr-defined]
            descriptor = os.open(folder.with_name(f".lock{folder.name}"), flags)
        else:
            descriptor = os.open(folder, os.O_RDONLY)
    except FileExistsError:
        yield False
        return
    try:
        yield WINDOWS or _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks an open folder until it is closed; False if another process has locked it."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _empty(folder: Path) -> None:
    """Removes all that is in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
