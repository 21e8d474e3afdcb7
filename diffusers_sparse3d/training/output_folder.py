"""The output folder of a training, which belongs to one training and to one run of it at a time."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO

from .checkpoints import delete_leftovers, list_checkpoints, resolve_checkpoint, set_aside, step_of
from .configuration import TrainingConfig
from .files import write_text
from .metrics import METRICS


LOCK, FINISHED = ".lock", "finished.json"


class OutputFolder:
    """The output folder of a training, locked against a second run until it is released.

    Args:
        path: The folder; it is made if it does not exist.
        resume_from_checkpoint: Checkpoint that the training continues from, see `TrainingConfig`.

    Attributes:
        checkpoint: The checkpoint to continue from, None to start anew.

    Raises:
        ValueError: if another run holds the folder, if it has the results of a training that is not continued, or if
            the checkpoint is not complete.
    """

    def __init__(self, path: Path, resume_from_checkpoint: str | None):
        self.path, self.checkpoint = path, None
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path / LOCK)
        try:
            if resume_from_checkpoint is not None:
                self.checkpoint = resolve_checkpoint(path, resume_from_checkpoint)
            inside = resume_from_checkpoint == "latest" or (
                self.checkpoint is not None and self.checkpoint.resolve().parent == path.resolve()
            )
            if not inside and self.used:
                raise ValueError(
                    f"`output_dir` must be a new folder, or one whose training is continued with"
                    f" `resume_from_checkpoint: latest`, got {str(path)!r}, which has the results of a training"
                )
        except ValueError:
            self.release()
            raise
        delete_leftovers(path)

    @property
    def used(self) -> bool:
        """Whether there are results of a training."""
        return any((self.path / name).exists() for name in (METRICS, FINISHED)) or bool(list_checkpoints(self.path))

    def start(self, config: TrainingConfig, step: int) -> None:
        """Prepares the folder for training from a step on: results of later steps are no longer part of it."""
        for path in list_checkpoints(self.path):
            if step_of(path) > step:
                set_aside(path)
        (self.path / FINISHED).unlink(missing_ok=True)
        write_text(self.path / "config.json", json.dumps(asdict(config), indent=2) + "\n")

    def is_finished(self, step: int) -> bool:
        """Whether everything that training up to a step makes has been written."""
        path = self.path / FINISHED
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == {"step": step}

    def finish(self, step: int) -> None:
        """Notes that everything that training up to a step makes has been written."""
        write_text(self.path / FINISHED, json.dumps({"step": step}) + "\n")

    def release(self) -> None:
        """Lets other runs have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(path: Path) -> IO[str] | None:
    """Returns a file that is locked until it is closed or the process ends; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ValueError(
            f"`output_dir` must be a folder that no other run uses, got {str(path.parent)!r}, which process {owner}"
            " uses"
        ) from None
    except OSError:
        # A file system without locks.
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
