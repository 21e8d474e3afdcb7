"""Kills a training before each of its file operations in turn, and continues it: see test_checkpoints.py.

A process that has never computed a gradient forks one child for each training, which is a hundred times faster than a
new process. It prints one line of JSON for each place: how many operations there were, the last checkpoint that was
reported as saved before the kill, the step that the second run began with, and the log of both runs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_sparse3d.training import checkpoints
from diffusers_sparse3d.training import trainer as trainer_module
from diffusers_sparse3d.training.metrics import read_metrics

from .linear_task import linear_trainer


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Killer:
    """Ends the process before a file operation in a folder; -1 for never."""

    def __init__(self, folder: Path, place: int):
        self.folder, self.place, self.count = str(folder), place, 0
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(self.folder):
            writes = event != "open" or (isinstance(arguments[1], str) and set("wax+") & set(arguments[1]))
            if writes:
                self.operate()

    def operate(self) -> None:
        if self.count == self.place:
            os._exit(17)
        self.count += 1

    def save_file(self, tensors: dict, path: Path) -> None:
        """Saves tensors in two operations: half of the bytes, and the rest; safetensors writes outside of Python."""
        save_file(tensors, path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        self.operate()
        path.write_bytes(data)


def train(folder: Path, report: Path, place: int) -> None:
    """Trains to the end, or to the file operation at `place`, and writes what happened to `report`."""
    facts = {"start": None, "saved": 0}

    def note(**values: int) -> None:
        facts.update(values)
        report.write_text(json.dumps(facts))

    trainer_module.plot_losses = lambda output_dir: None
    killer = Killer(folder, place)
    checkpoints.save_file = killer.save_file
    trainer = linear_trainer(folder, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    resume, save = trainer.resume, trainer.save_checkpoint
    trainer.resume = lambda: (resume(), note(start=trainer.step))
    trainer.save_checkpoint = lambda: (save(), note(saved=trainer.step))
    trainer.train()
    trainer.finish(lambda: None)
    note(operations=killer.count)


def in_child(*arguments: object) -> int:
    """Trains in a fork of this process and returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            train(*arguments)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path) -> None:
    torch.set_num_threads(1)
    report, place, operations = root / "report.json", -1, 1
    while place < operations:
        folder = root / f"run{place}"
        statuses, facts = [], []
        for kill_at in (place, -1):
            report.write_text(json.dumps({"start": None, "saved": 0}))
            statuses.append(in_child(folder, report, kill_at))
            facts.append(json.loads(report.read_text()))
        if place == -1:
            operations = facts[0]["operations"]
        log = [[entry["step"], entry["loss"]] for entry in read_metrics(folder)]
        names = sorted(path.name for path in folder.iterdir())
        line = {"place": place, "statuses": statuses, "facts": facts, "log": log, "names": names}
        # Flushed, or every further child would print it again.
        print(json.dumps(line), flush=True)
        place += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
