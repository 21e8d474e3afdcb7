"""Checkpoints in the output folder of a training: folders that are complete or absent, and are checked when read.

OUTPUT_DIR/checkpoint-STEP has `state.json`, safetensors files, and `manifest.json` with the size and SHA-256 of each
of them. There is no pickle among them, and none is read, so that a checkpoint from a stranger cannot run code.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .files import PARTIAL, REPLACED, complete_folder, delete_folder, delete_partial_files


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# The one file that a checkpoint can do without: whoever loads it says so.
RANDOM_STATE = "random.safetensors"
NAME = re.compile(r"checkpoint-\d+")


def save_checkpoint(output_dir: Path, step: int, contents: Iterable[tuple[str, dict[str, Any]]]) -> Path:
    """Saves the checkpoint of a step and returns its folder; the folder appears when all is on the disk.

    Args:
        output_dir: Folder of the training.
        step: Number of optimizer steps that are done.
        contents: Names and contents of the files: tensors on the CPU for names that end in ".safetensors", and values
            of JSON for others.

    Raises:
        OSError: if it cannot be written. The other checkpoints are as they were.
    """
    path = output_dir / f"checkpoint-{step}"
    if path.exists():
        set_aside(path)
    try:
        with complete_folder(path) as folder:
            for name, content in contents:
                if name.endswith(".safetensors"):
                    save_file(content, folder / name)
                else:
                    (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
            facts = {file.name: _facts(file) for file in sorted(folder.iterdir())}
            (folder / MANIFEST).write_text(json.dumps({"step": step, "files": facts}, indent=2) + "\n")
    # safetensors reports a full disk by an error of its own.
    except Exception as error:
        kept = [folder.name for folder in list_checkpoints(output_dir)]
        raise OSError(
            f"The checkpoint of step {step} could not be written to {path}: {error}. Checkpoints that are complete:"
            f" {kept}. Make room and go on with `resume_from_checkpoint: latest`."
        ) from error
    return path


def limit_checkpoints(output_dir: Path, limit: int) -> None:
    """Deletes the oldest checkpoints beyond the newest `limit`."""
    for path in list_checkpoints(output_dir)[:-limit]:
        delete_folder(path)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints in a folder in the order of their steps; other `checkpoint-...` are not among them."""
    return [path for path in _numbered_folders(output_dir) if (path / MANIFEST).is_file()]


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint."""
    return int(path.name.removeprefix("checkpoint-"))


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, as the predicate of a sentence, or None if it is complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = {
            str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()
        }
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"has a {MANIFEST} that cannot be read ({error})"
    for name, (size, digest) in expected.items():
        file = path / name
        if name == RANDOM_STATE and not file.exists():
            continue
        if Path(name).name != name or not file.is_file():
            return f"lacks the file {name}"
        if file.stat().st_size != size:
            return f"has {file.stat().st_size} bytes of the {size} of {name}"
        if _facts(file)["sha256"] != digest:
            return f"has a {name} with another SHA-256 than its {MANIFEST}"
    return None


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint in a folder, or None if it has no checkpoints.

    Newer ones that are damaged are named in a warning.

    Raises:
        ValueError: if there are checkpoints, but none that is complete.
    """
    folders = _numbered_folders(output_dir)
    for path in reversed(folders):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("%s is passed over: it %s.", path, damage)
    if folders:
        raise ValueError(
            f"`resume_from_checkpoint` must be left out, and `output_dir` be a new folder, to start anew: of the"
            f" checkpoints in {output_dir}, {[path.name for path in folders]}, none is complete"
        )
    return None


def resolve_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """Returns the checkpoint that a configuration names, or None for "latest" where there is none.

    Raises:
        ValueError: if it is not a complete checkpoint.
    """
    if resume_from_checkpoint == "latest":
        return newest_checkpoint(output_dir)
    path = Path(resume_from_checkpoint)
    damage = find_damage(path) if path.is_dir() else "does not exist"
    if damage is not None:
        raise ValueError(
            f'`resume_from_checkpoint` must be "latest" or the folder of a checkpoint, got {str(path)!r}, which'
            f" {damage}"
        )
    return path


def delete_leftovers(output_dir: Path) -> None:
    """Deletes files and checkpoints that were being written or deleted when a run was killed."""
    delete_partial_files(output_dir)
    for path in output_dir.glob("checkpoint-*"):
        if path.suffix in (PARTIAL, REPLACED) and NAME.fullmatch(path.stem):
            delete_folder(path)


def set_aside(path: Path) -> None:
    """Renames a checkpoint that a training does not continue from, but that is in its way."""
    aside, number = path.with_name(f"aside-{path.name}"), 2
    while aside.exists():
        aside, number = path.with_name(f"aside-{path.name}-{number}"), number + 1
    path.rename(aside)
    logger.warning("%s is not of this training, and is now %s.", path, aside.name)


def _numbered_folders(output_dir: Path) -> list[Path]:
    """The folders with names of checkpoints in the order of their steps."""
    folders = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def _facts(path: Path) -> dict[str, Any]:
    """The size and digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
