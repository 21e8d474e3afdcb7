"""A folder on the local disk or in an object store, read in ranges and written in whole files."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..files import write_text, written_beside


if TYPE_CHECKING:
    from .range_cache import RangeCache


class Folder:
    """A folder, by its path or by an address that fsspec knows: `s3://bucket/data`, `gs://...`, `hf://datasets/...`.

    Objects can be sent to other processes; each process opens connections of its own.

    Args:
        path: Path or address.
        options: Arguments of fsspec's file system, such as `{"endpoint_url": ...}` for S3.
        cache: Keeps what readers of records read of a remote folder on the local disk.
    """

    def __init__(
        self,
        path: "str | Path | Folder",
        options: Mapping[str, Any] | None = None,
        cache: "RangeCache | None" = None,
    ):
        if isinstance(path, Folder):
            options, cache = options or path.options, cache or path.cache
        self.options: dict[str, Any] = dict(options or {})
        self.path: str = str(path).rstrip("/")
        self.cache: RangeCache | None = cache
        self.is_local = isinstance(self.filesystem, LocalFileSystem)

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> "Folder":
        """A folder inside of this one."""
        return Folder(f"{self.path}/{name}", self.options, self.cache)

    @property
    def filesystem(self) -> Any:
        """The file system of this process; fsspec keeps one for each process and set of options."""
        return self._open()[0]

    @property
    def root(self) -> str:
        """Path of the folder in its file system."""
        return self._open()[1]

    @property
    def local(self) -> Path:
        """The local path.

        Raises:
            ValueError: if the folder is not a local one.
        """
        if not self.is_local:
            raise ValueError(f"`path` must be a local folder, got {self.path!r}")
        return Path(self.root)

    def _open(self) -> tuple[Any, str]:
        filesystem, root = fsspec.core.url_to_fs(self.path, **self.options)
        return filesystem, root

    def name(self, name: str) -> str:
        """Returns the path of a file of the folder in its file system."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is a file, now: other processes may have written it since the folder was listed."""
        filesystem, path = self.filesystem, self.name(name)
        filesystem.invalidate_cache(path.rpartition("/")[0])
        return bool(filesystem.exists(path))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Returns the bytes of a file from `start` up to `end`, in one request; all of them by default.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file ends before `end`.
        """
        # File systems without asynchronous requests, such as the hub's, read ahead unless they are told not to.
        blocking = not self.is_local and not self.filesystem.async_impl
        options = {"cache_type": "none"} if blocking else {}
        data: bytes = self.filesystem.cat_file(self.name(name), start=start, end=end, **options)
        if end is not None and len(data) != end - (start or 0):
            raise ValueError(f"{self.name(name)} must have {end} bytes, got fewer: the file is damaged")
        return data

    def sizes(self, under: str, suffix: str) -> dict[str, int]:
        """Returns the bytes of each file of a subfolder with a suffix, by file name, in ascending order of the names.

        Links to files are files, of the size of their targets. Files that are being written are not among them.
        """
        filesystem, path = self.filesystem, self.name(under)
        filesystem.invalidate_cache(path)
        if not filesystem.exists(path):
            return {}
        sizes: dict[str, int] = {}
        for entry in filesystem.ls(path, detail=True):
            name = entry["name"].rpartition("/")[2]
            if not name.endswith(suffix) or name.startswith("."):
                continue
            if entry["type"] == "file":
                sizes[name] = entry["size"]
            elif entry.get("islink") and os.path.isfile(entry["name"]):  # local folders alone list links as such
                sizes[name] = os.path.getsize(entry["name"])
        return dict(sorted(sizes.items()))

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A local file for a `with` block to write, which is in the folder as a whole, on the disk, at the end.

        If the block raises, the folder stays as it was.
        """
        if self.is_local:
            with written_beside(Path(self.name(name))) as path:
                yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name.rpartition("/")[2])
            yield path
            # Objects appear whole when they are uploaded.
            self.filesystem.put_file(str(path), self.name(name))
        self.filesystem.invalidate_cache()

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file of the folder as a local one: the file itself, or a copy that lasts as long as the `with` block."""
        if self.is_local:
            yield Path(self.name(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name.rpartition("/")[2])
            self.filesystem.get_file(self.name(name), str(path))
            yield path

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file in UTF-8, which is the old or the new one at any moment, whoever else writes it too."""
        if not self.is_local:
            self.filesystem.pipe_file(self.name(name), text.encode())
            return
        path = Path(self.name(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)

    def delete(self, name: str) -> None:
        """Deletes a file if there is one."""
        if self.exists(name):
            self.filesystem.rm_file(self.name(name))
