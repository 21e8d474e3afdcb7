"""Text files that are complete or absent: written beside their place, synced to the disk and renamed."""

from __future__ import annotations

import os
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
