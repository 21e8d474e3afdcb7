"""Files that are complete or absent: written beside their place, synced to the disk and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Ends the names of files and folders that are being written.
PARTIAL = ".partial"


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file, which is the old or the new one at any moment."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
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
