"""Locks of the folder of a dataset: one run at a time, or the parts of one run."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from ..files import delete_partial_files
from .groups import Part


# Names the lock of the parts of a run that begin, in the place of their number.
BEGINNING = "beginning"


@contextmanager
def locked(output: Path, part: Part) -> Iterator[None]:
    """Holds the folder of a dataset for one run, or for one part of a run beside its other parts.

    A lock ends with its process. File systems without locks give none.

    Raises:
        ValueError: if another run holds the folder, one with other parts, or one of the same part.
    """
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        whole = part.count == 1
        _lock(stack, output / ".lock", output, shared=not whole)
        if whole:
            for path in output.glob(".lock-*"):
                path.unlink()
            delete_partial_files(output)
        else:
            _lock(stack, output / f".lock-{part.count}", output, shared=True)
            for path in output.glob(".lock-*"):
                if path.name.removeprefix(".lock-").partition("-")[0] not in (str(part.count), BEGINNING):
                    with ExitStack() as short:
                        _lock(short, path, output, shared=False)
            _lock(stack, output / f".lock-{part.count}-{part.index}", output, shared=False)
        yield


@contextmanager
def beginning(output: Path, part: Part) -> Iterator[None]:
    """Holds what the parts of a run have in common for one of them, which waits for the others, inside of `locked`."""
    with ExitStack() as stack:
        if part.count > 1:
            _lock(stack, output / f".lock-{BEGINNING}", output, shared=False, waits=True)
        yield


def _lock(stack: ExitStack, path: Path, output: Path, shared: bool, waits: bool = False) -> None:
    """Locks a file until a stack is closed; refuses to if others hold it, or waits for them."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    file: IO[str] = stack.enter_context(path.open("a+", encoding="utf-8"))
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        raise ValueError(
            f"`output` must be a folder that no other preparation uses, got {str(output)!r}, which"
            f" {owner or 'another process'} uses"
        ) from None
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
