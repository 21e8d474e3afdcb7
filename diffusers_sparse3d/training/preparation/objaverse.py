"""Objaverse 1.0 as its own package downloads it: `~/.objaverse/hf-objaverse-v1`.

The folder has `glbs/000-023/UID.glb` of `objaverse.load_objects`, and of `objaverse.load_annotations`
`metadata/000-023.json.gz` with the name, the author, the categories and the licence of each object by its UID.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from .licenses import SKETCHFAB_LICENSES


# Folders of objects.
NUMBERED = "[0-9][0-9][0-9]-[0-9][0-9][0-9]"


def is_objaverse(path: Path) -> bool:
    """Whether a folder is a download of Objaverse, with or without the metadata, which `objaverse_rows` asks for."""
    glbs = path / "glbs"
    return glbs.is_dir() and ((path / "metadata").is_dir() or any(glbs.glob(NUMBERED)))


def objaverse_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of an index, one for each object that was downloaded and has a licence, in ascending order of files.

    An object without a licence is left out: nothing allows its use. There is no column `split`.

    Args:
        path: Folder of the download.

    Raises:
        ValueError: if the metadata of a folder of objects are missing or damaged.
    """
    for folder in sorted(folder for folder in (path / "glbs").iterdir() if folder.is_dir()):
        meshes = sorted(folder.glob("*.glb"))
        if not meshes:
            continue
        facts_of = _read_metadata(path / "metadata" / f"{folder.name}.json.gz")
        for mesh in meshes:
            facts = facts_of.get(mesh.stem, {})
            given = facts.get("license") or ""
            if not given:
                continue
            user = facts.get("user") or {}
            categories = facts.get("categories") or [{}]
            yield {
                "id": mesh.stem,
                "mesh": mesh.relative_to(path).as_posix(),
                "source": "objaverse",
                "category": categories[0].get("name") or "",
                "name": facts.get("name") or "",
                "license": SKETCHFAB_LICENSES.get(given, given),
                "author": user.get("displayName") or user.get("username") or "",
            }


def _read_metadata(path: Path) -> dict[str, dict]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            facts = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"`input` must be a download of Objaverse with its metadata; {path} cannot be read ({error}):"
            " objaverse.load_annotations() downloads it"
        ) from error
    return facts
