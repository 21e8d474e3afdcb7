"""The files that browsers fetch: kept for a while in a temporary folder of the server."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

import trimesh

from ..geometry.mesh import export_mesh


class FileStore:
    """
    A temporary folder for meshes, which forgets files after a while and vanishes with the process.

    Args:
        lifetime: seconds that a file is kept at least.
    """

    def __init__(self, lifetime: float = 3600.0):
        self.lifetime = lifetime
        self._folder = tempfile.TemporaryDirectory(prefix="diffusers-sparse3d-")
        self._numbers = itertools.count()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self._folder.name)

    def write(self, mesh: trimesh.Trimesh, name: str, up_axis: str = "y", scale: float = 1.0) -> str:
        """
        Writes a mesh in a folder of its own, as the browser's "save as" shows the name, and returns its path.

        Args:
            mesh: y up.
            name: of the file; its suffix selects the format.
            up_axis, scale: see [`export_mesh`].
        """
        self.forget()
        return str(export_mesh(mesh, self.folder / str(next(self._numbers)) / name, up_axis, scale))

    def forget(self) -> None:
        """Deletes the files that are older than their lifetime, and their folders."""
        oldest = time.time() - self.lifetime
        for folder in self.folder.iterdir():
            files = list(folder.iterdir())
            if all(file.stat().st_mtime < oldest for file in files) and folder.stat().st_mtime < oldest:
                for file in files:
                    file.unlink(missing_ok=True)
                folder.rmdir()
