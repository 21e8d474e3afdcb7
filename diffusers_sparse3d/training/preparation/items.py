"""Finished records that wait for the rest of their shard, each in a file of its own."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ...files import written_beside


if TYPE_CHECKING:
    from ...data.records import Record


PICTURE_KEY, COLUMNS_KEY, ID_KEY = "picture", "columns", "id"
SECTION_PREFIX = "section/"


@dataclass(frozen=True)
class Items:
    """The folder of the finished records of one shard.

    Args:
        folder: The folder; it is made with the first record, and deleted with the last one.
    """

    folder: Path

    def path(self, name: str) -> Path:
        """Returns the file of a record; ids may be longer than names of files."""
        return self.folder / f"{hashlib.sha1(name.encode()).hexdigest()}.safetensors"

    def write(self, record: "Record") -> None:
        """Writes a record, which is there as a whole or not at all."""
        tensors = {f"{SECTION_PREFIX}{name}": _array(data) for name, data in record.sections.items()}
        if record.picture is not None:
            tensors[PICTURE_KEY] = _array(record.picture)
        # The order of the sections: the names of tensors are sorted in a file.
        columns = {**record.columns, "sections": list(record.sections)}
        data = safetensors.numpy.save(tensors, {ID_KEY: record.id, COLUMNS_KEY: json.dumps(columns)})
        with written_beside(self.path(record.id)) as partial:
            partial.write_bytes(data)

    def read(self, name: str) -> "Record":
        """Reads a record.

        Raises:
            SafetensorError: if its file is damaged.
        """
        from ...data.records import Record  # PyTorch comes with it, which the process that leads does without

        with safe_open(self.path(name), "np") as file:
            metadata = file.metadata()
            columns = json.loads(metadata[COLUMNS_KEY])
            sections = {key: file.get_tensor(SECTION_PREFIX + key).tobytes() for key in columns.pop("sections")}
            picture = file.get_tensor(PICTURE_KEY).tobytes() if PICTURE_KEY in file.keys() else None  # noqa: SIM118
        return Record(metadata[ID_KEY], sections, columns, picture)

    def has(self, name: str) -> bool:
        """Whether a record is there; what is damaged is deleted."""
        path = self.path(name)
        if not path.exists():
            return False
        try:
            with safe_open(path, "np") as file:
                return bool(file.metadata()[ID_KEY] == name)
        except (SafetensorError, KeyError, TypeError):
            path.unlink()
            return False

    def delete(self, names: Iterable[str]) -> None:
        """Deletes records, and the folder if nothing else is in it."""
        for name in names:
            self.path(name).unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)
