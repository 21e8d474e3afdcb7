"""The meshes that a dataset is made from: a CSV index, or all meshes in a folder."""

import argparse
import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ...geometry.render import UP_ROTATIONS


MESH_SUFFIXES = {".glb", ".gltf", ".obj", ".off", ".ply", ".stl"}


@dataclass
class MeshEntry:
    """A mesh to prepare: one row of the index, with its paths resolved."""

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


def read_index(path: Path, up_axes: dict[str, str], random_colors: list[str], val_fraction: float) -> list[MeshEntry]:
    """Returns the meshes of an index file or a folder.

    Args:
        path: A CSV file, a folder with index.csv, or a folder of meshes.
        up_axes: Axis that points up by the source of the mesh; "" stands for all other sources.
        random_colors: Sources whose meshes without a material get a random colour, or "all".
        val_fraction: Share of the meshes of a folder that become the validation split, by their names; meshes of one
            subfolder stay together.

    Raises:
        ValueError: if `path` holds no mesh, the index lacks a column, or an id is not unique or not a file name.
    """
    if path.is_dir() and (path / "index.csv").exists():
        path = path / "index.csv"
    rows: list[dict[str, str]] = []
    if path.is_dir():
        for mesh in sorted(mesh for mesh in path.rglob("*") if mesh.suffix.lower() in MESH_SUFFIXES):
            relative = mesh.relative_to(path)
            group = relative.parent.as_posix()
            rows.append({"id": "-".join(relative.with_suffix("").parts), "mesh": str(relative), "category": group})
            # Meshes of one folder may be variants of one thing: they stay on one side of the split.
            key = relative.as_posix() if group == "." else group
            share = int.from_bytes(hashlib.sha1(key.encode()).digest()[:4], "big") / 2**32
            rows[-1]["split"] = "val" if share < val_fraction else "train"
        # One folder alone is never all validation by chance.
        if val_fraction < 1 and all(row["split"] == "val" for row in rows):
            for row in rows:
                row["split"] = "train"
        root = path
    else:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        missing = {"id", "mesh"} - set(rows[0] if rows else ())
        if missing:
            raise ValueError(
                f"`input` must have rows with id and mesh; {path} has none or lacks the columns {sorted(missing)}"
            )
        root = path.parent
    if not rows:
        raise ValueError(f"`input` must hold meshes ({', '.join(sorted(MESH_SUFFIXES))}); {path} holds no mesh")
    entries, seen = [], set[str]()
    for row in rows:
        if row["id"] in seen or not row["id"] or "/" in row["id"] or row["id"].startswith("."):
            raise ValueError(
                f"Ids must be unique and file names, got {row['id']!r} in {path}, which is not unique or none"
            )
        seen.add(row["id"])
        source = row.get("source", "")
        known = {key: row[key] for key in ("category", "name", "license", "author", "split") if row.get(key)}
        entries.append(
            MeshEntry(
                id=row["id"],
                mesh=root / row["mesh"],
                source=source,
                image=root / row["image"] if row.get("image") else None,
                up_axis=up_axes.get(source, up_axes.get("", "y")),
                random_color=source in random_colors or "all" in random_colors,
                **known,
            )
        )
    return entries


def parse_up_axis(text: str) -> tuple[str, str]:
    """Parses an argument AXIS or SOURCE=AXIS to the source, "" for all, and the axis."""
    source, _, axis = text.rpartition("=")
    if axis not in UP_ROTATIONS:
        raise argparse.ArgumentTypeError(f"must be AXIS or SOURCE=AXIS with AXIS in x, y, z, got {text!r}")
    return source, axis
