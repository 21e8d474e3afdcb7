"""Kills a preparation before each of its file operations in turn, and starts it again: see test_runners.py.

A process that has made the records once forks one child for each preparation, which takes the records from it. It
prints one line of JSON for each place, two where a file would take its place: whole, and half written.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from diffusers_sparse3d.training.preparation import record
from tests.training.prepared import prepare


OPTIONS = ["--resolutions", "32", "--num_views", "1", "--meshes_per_shard", "2"]
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Killer:
    """Ends the process before a file operation in a folder; -1 for never.

    Args:
        folder: The folder.
        place: Number of the operation.
        cut: Whether a file that was about to be renamed is left half as long.
    """

    def __init__(self, folder: Path, place: int, cut: bool):
        self.folder, self.place, self.cut = str(folder), place, cut
        self.operations: list[str] = []
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set("wax+") & set(arguments[1])):
            return
        if len(self.operations) == self.place:
            if self.cut and os.path.isfile(arguments[0]):
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os._exit(17)
        self.operations.append(event)


def in_child(meshes: Path, output: Path, place: int, cut: bool) -> tuple[int, list[str]]:
    """Prepares in a fork of this process, and returns its exit status and its operations if it came to an end."""
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            killer = Killer(output, place, cut)
            prepare(meshes, output, *OPTIONS)
            log.write_text(json.dumps(killer.operations))
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(log.read_text()) if log.exists() else []


def main(meshes: Path, root: Path) -> None:
    made = {}
    original = record.make_record

    def make_record(entry, settings, *args):
        if entry.id not in made:
            made[entry.id] = original(entry, settings, *args)
        return made[entry.id]

    record.make_record = make_record
    # A process that ends loses nothing of what it has written; waiting for the disk is most of the time here.
    os.fsync = lambda descriptor: None
    with contextlib.redirect_stdout(sys.stderr):
        prepare(meshes, root / "first", *OPTIONS)
    places = [(-1, False)]
    while places:
        place, cut = places.pop(0)
        output = root / f"run{place}{cut}"
        first, operations = in_child(meshes, output, place, cut)
        if place < 0:
            places = [(number, False) for number in range(len(operations))]
            places += [(number, True) for number, event in enumerate(operations) if event == "os.rename"]
        second, _ = in_child(meshes, output, -1, False)
        files = {
            path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(output.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }
        facts = {"place": place, "cut": cut, "statuses": [first, second], "operations": operations, "files": files}
        # Flushed, or every further child would print it again.
        print(json.dumps(facts), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
