"""Files and folders that are complete or absent: written beside their place, synced to the disk and renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import PARTIAL, sync
from ..files import write_text as write_text


# Ends the names of files and folders that are about to be deleted.
REPLACED = ".replaced"


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which then takes the place of `path`; after an error it is deleted."""
    partial = path.with_name(path.name + PARTIAL)
    delete_folder(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = path.with_name(path.name + REPLACED)
    # Where the place is empty, a run that was killed between both renames has left the old folder under this name.
    if path.exists():
        delete_folder(replaced)
        path.rename(replaced)
    partial.rename(path)
    sync(path.parent)
    delete_folder(replaced)


def delete_partial_files(folder: Path) -> None:
    """Deletes what killed processes have left of files that they were writing in a folder; no other may be at work."""
    for path in folder.glob(f".*{PARTIAL}*"):
        if path.is_file():
            path.unlink()


def delete_folder(path: Path) -> None:
    """Deletes a folder if it exists, under another name, so that no part of it is ever taken for the whole."""
    if not path.exists():
        return
    if not path.name.endswith((PARTIAL, REPLACED)):
        path = path.rename(path.with_name(path.name + REPLACED))
    shutil.rmtree(path)
