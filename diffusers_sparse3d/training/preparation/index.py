"""The meshes that a dataset is made from: a CSV index, all meshes in a folder, or a download of Objaverse."""

import argparse
import csv
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...geometry.render import UP_ROTATIONS
from .licenses import is_non_commercial
from .objaverse import is_objaverse, objaverse_rows


MESH_SUFFIXES = {".glb", ".gltf", ".obj", ".off", ".ply", ".stl"}
# Causes of failures that are known from the row of the input: it cannot be used, or has changed since it was.
ODD_ROW, CHANGED = "row", "changed"
# Shapes that may be made of a mesh.
MAX_SHAPES = 1000
COLUMNS = ("source", "category", "name", "license", "author", "split")
# Rows of a table, and the names of columns, as they come.
Row = dict[str, str]


@dataclass
class MeshEntry:
    """A mesh to prepare: one row of the index, with its paths resolved.

    Attributes:
        mesh_id: Id of the mesh that this is a shape of; "" if it is the mesh itself.
        copy: Number of that shape.
        position: Row of the index, from 0 on, which decides the shard that the mesh goes into.
        problem: Why the mesh cannot be prepared, known from its row alone; "" if nothing speaks against it.
    """

    id: str
    mesh: Path
    source: str = ""
    category: str = ""
    name: str = ""
    image: Path | None = None
    license: str = ""
    author: str = ""
    split: str = "train"
    up_axis: str = "y"
    random_color: bool = False
    mesh_id: str = ""
    copy: int | None = None
    position: int = 0
    problem: str = ""


@dataclass
class MeshIndex:
    """The rows of an input, read anew each time that one iterates over them: millions are never in memory together.

    Args:
        path: A CSV file, a folder with index.csv, a download of Objaverse, or a folder of meshes.
        up_axes: Axis that points up by the source of the mesh; "" stands for all other sources.
        random_colors: Sources whose meshes without a material get a random colour, or "all".
        val_fraction: Share of the meshes of a folder or of Objaverse that become the validation split, by their names;
            meshes of one subfolder of a folder stay together.

    Raises:
        ValueError: if `path` does not exist or holds no mesh, or the index lacks a column.
    """

    path: Path
    up_axes: dict[str, str]
    random_colors: list[str]
    val_fraction: float

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ValueError(f"`input` {str(self.path)!r} does not exist")
        if self.path.is_dir() and (self.path / "index.csv").exists():
            self.path = self.path / "index.csv"
        if next(self.rows(), None) is None:
            raise ValueError(
                f"`input` must hold meshes ({', '.join(sorted(MESH_SUFFIXES))}), or rows with id and mesh; {self.path}"
                " holds no mesh"
            )

    def __iter__(self) -> Iterator[MeshEntry]:
        seen = set[bytes]()
        root = self.path if self.path.is_dir() else self.path.parent
        for position, row in enumerate(self.rows()):
            entry = self._entry(row, root, position)
            digest = hashlib.blake2b(entry.id.encode(), digest_size=8).digest()
            if digest in seen and not entry.problem:
                entry.problem = "its id is not unique, a row before has it"
            seen.add(digest)
            yield entry

    def rows(self) -> Iterator[Row]:
        """The rows as they are in the input, a folder's made from the names of its files."""
        if self.path.is_dir():
            if not is_objaverse(self.path):
                yield from self._rows_of_folder()
                return
            for row in objaverse_rows(self.path):
                yield {**row, "split": self._split(row["id"])}
            return
        # Spreadsheets write a byte order mark.
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"id", "mesh"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"`input` must have rows with id and mesh; {self.path} has none or lacks the columns"
                    f" {sorted(missing)}"
                )
            # A short row has None, a long one a list under the key None.
            yield from ({key: value or "" for key, value in row.items() if key is not None} for row in reader)

    def _rows_of_folder(self) -> Iterator[Row]:
        meshes = sorted(mesh for mesh in self.path.rglob("*") if mesh.suffix.lower() in MESH_SUFFIXES)
        stems = Counter(mesh.with_suffix("") for mesh in meshes)
        splits = []
        for mesh in meshes:
            group = mesh.relative_to(self.path).parent.as_posix()
            # Meshes of one folder may be variants of one thing: they stay on one side of the split.
            key = mesh.relative_to(self.path).as_posix() if group == "." else group
            splits.append(self._split(key))
        # One folder alone is never all validation by chance.
        if self.val_fraction < 1 and set(splits) == {"val"}:
            splits = ["train"] * len(splits)
        for mesh, split in zip(meshes, splits):
            relative = mesh.relative_to(self.path)
            # The suffix tells box.obj from box.ply.
            parts = relative.parts if stems[mesh.with_suffix("")] > 1 else relative.with_suffix("").parts
            yield {
                "id": "-".join(parts),
                "mesh": str(relative),
                "category": relative.parent.as_posix(),
                "split": split,
            }

    def _split(self, key: str) -> str:
        # Python keeps bytes of names that are no UTF-8 as surrogates.
        data = key.encode("utf-8", "surrogatepass")
        share = int.from_bytes(hashlib.sha1(data).digest()[:4], "big") / 2**32
        return "val" if share < self.val_fraction else "train"

    def _entry(self, row: Row, root: Path, position: int) -> MeshEntry:
        source = row.get("source", "")
        known: dict[str, Any] = {key: row[key] for key in COLUMNS if row.get(key)}
        entry = MeshEntry(
            id=row["id"],
            mesh=root / row["mesh"],
            image=root / row["image"] if row.get("image") else None,
            up_axis=self.up_axes.get(source, self.up_axes.get("", "y")),
            random_color=source in self.random_colors or "all" in self.random_colors,
            position=position,
            **known,
        )
        if not entry.id or "/" in entry.id or entry.id.startswith("."):
            return replace(entry, problem=f"its id must be a name without slashes, got {entry.id!r}")
        if (name := readable(entry.id)) != entry.id:
            return replace(entry, id=name, problem=f"its file must have a name in UTF-8, got {name!r}")
        if not row["mesh"]:
            return replace(entry, problem="its row has no mesh")
        return entry


def readable(name: str) -> str:
    """Returns a name as it is or, where its bytes are no UTF-8, with escapes in their places."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_index(path: Path, up_axes: dict[str, str], random_colors: list[str], val_fraction: float) -> list[MeshEntry]:
    """Returns the meshes of an index file or a folder, all at once; for the arguments see `MeshIndex`.

    Raises:
        ValueError: if `path` holds no mesh, the index lacks a column, or an id is not unique or no name.
    """
    entries = list(MeshIndex(path, up_axes, random_colors, val_fraction))
    for entry in entries:
        if entry.problem:
            raise ValueError(f"Row {entry.position + 1} of {path} cannot be used: {entry.problem}")
    return entries


@dataclass
class Selection:
    """Which meshes of an input are prepared.

    Args:
        splits: Only these splits; all if None.
        limit: At most so many meshes; all if None.
        non_commercial: Whether meshes are taken whose licence forbids commercial use.
        licenses: Only these licences, as the index spells them; all (but for `non_commercial`) if None.
    """

    splits: list[str] | None = None
    limit: int | None = None
    non_commercial: bool = False
    licenses: list[str] | None = None

    def has_split(self, entry: MeshEntry) -> bool:
        """Whether the split of a mesh is one that is prepared."""
        return self.splits is None or entry.split in self.splits

    def has_license(self, entry: MeshEntry) -> bool:
        """Whether the licence of a mesh is one that is prepared."""
        if self.licenses is not None:
            return entry.license in self.licenses
        return self.non_commercial or not is_non_commercial(entry.license)


def parse_augment(text: str) -> tuple[str, float]:
    """Parses an argument N or SOURCE=N to the source, "" for all, and the number of shapes of a mesh."""
    source, _, number = text.rpartition("=")
    try:
        shapes = float(number)
    except ValueError:
        shapes = float("nan")
    if not 0 <= shapes <= MAX_SHAPES:
        raise argparse.ArgumentTypeError(f"must be N or SOURCE=N with N from 0 to {MAX_SHAPES}, got {text!r}")
    return source, shapes


def parse_up_axis(text: str) -> tuple[str, str]:
    """Parses an argument AXIS or SOURCE=AXIS to the source, "" for all, and the axis."""
    source, _, axis = text.rpartition("=")
    if axis not in UP_ROTATIONS:
        raise argparse.ArgumentTypeError(f"must be AXIS or SOURCE=AXIS with AXIS in x, y, z, got {text!r}")
    return source, axis
