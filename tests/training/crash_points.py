"""Kills a training, and the saving of a fine-tuning, before each file operation in turn, and starts them again.

See test_checkpoints.py. A process that has never computed a gradient forks one child for each run, which is a hundred
times faster than a new process. Each run finds the results of an older one in its folder. For each place, one line of
JSON is printed: how many operations there were, the last checkpoint that was reported as saved before the kill, the
step that the second run began with, the log of both runs, and the results before, after the kill and in the end.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_sparse3d.loaders import lora as lora_loader
from diffusers_sparse3d.training import checkpoints, lora
from diffusers_sparse3d.training import trainer as trainer_module
from diffusers_sparse3d.training.files import REPLACED
from diffusers_sparse3d.training.metrics import METRICS, read_metrics

from .linear_task import linear_trainer


# Places of the results in the folder of a run.
RESULTS = {
    "training": ("linear", "averages/0.5/linear"),
    "fine-tuning": ("pytorch_lora_weights.safetensors", "pipeline"),
}
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

    def save_file(self, tensors: dict, path: Path, metadata: dict | None = None) -> None:
        """Saves tensors in two operations: half of the bytes, and the rest; safetensors writes outside of Python."""
        save_file(tensors, path, metadata)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        self.operate()
        path.write_bytes(data)


class Model:
    """Saves a tensor as models and pipelines save theirs."""

    def __init__(self, killer: Killer, weight: torch.Tensor):
        self.killer, self.weight = killer, weight

    def to(self, dtype: torch.dtype) -> "Model":
        return Model(self.killer, self.weight.to(dtype))

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.killer.save_file({"weight": self.weight.detach()}, folder / "model.safetensors")


def train(folder: Path, report: Path, place: int, steps: int) -> None:
    """Trains to the end, or to the file operation at `place`, and writes what happened to `report`."""
    facts = {"start": None, "saved": 0}

    def note(**values: int) -> None:
        facts.update(values)
        report.write_text(json.dumps(facts))

    trainer_module.plot_losses = lambda output_dir: None
    killer = Killer(folder, place)
    checkpoints.save_file = killer.save_file
    options = {"resume_from_checkpoint": "latest", "checkpoints_total_limit": 1, "more_ema_decays": [0.5]}
    trainer = linear_trainer(folder, max_train_steps=steps, **options)
    resume, save = trainer.resume, trainer.save_checkpoint
    trainer.resume = lambda: (resume(), note(start=trainer.step))
    trainer.save_checkpoint = lambda: (save(), note(saved=trainer.step))
    trainer.task.models = lambda: {"linear": Model(killer, trainer.task.weight)}
    trainer.train()
    trainer.finish(lambda: trainer.task.save_pretrained(folder))
    note(operations=killer.count)


def fine_tune(folder: Path, report: Path, place: int, steps: int) -> None:
    """Saves LoRA weights and a pipeline as after `steps` steps, up to the file operation at `place`."""
    base = report.with_name("base")
    (base / "transformer").mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.zeros(2)}, base / "transformer" / "model.safetensors")
    folder.mkdir(exist_ok=True)
    weight = torch.full((2,), float(steps))
    killer = Killer(folder, place)
    lora_loader.save_file = killer.save_file
    pipeline = Model(killer, weight)
    lora.DiffusionPipeline = argparse.Namespace(from_pretrained=lambda path, transformer: transformer)
    lora.write_card = lambda args: None
    weights = lora.LoraWeights()
    weights.layers["transformer"] = {"to_q.lora_A.weight": weight}
    for full in (False, True):
        args = argparse.Namespace(full=full, output_dir=folder, push_to_hub=False)
        lora.save_result(args, base, weights, {"transformer": pipeline})
    report.write_text(json.dumps({"operations": killer.count}))


def read(path: Path) -> str | dict[str, str]:
    """Returns the contents of a result. Between two renames, a folder that is replaced lies whole beside its place."""
    if path.is_file():
        return path.read_bytes().hex()
    folder = path if path.exists() else path.with_name(path.name + REPLACED)
    return {file.name: file.read_bytes().hex() for file in sorted(folder.iterdir())}


def in_child(run: Callable[..., None], *arguments: object) -> int:
    """Runs a function in a fork of this process and returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            run(*arguments)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_everywhere(root: Path, kind: str, run: Callable[..., None]) -> None:
    """Kills one kind of runs at all places."""
    report, old, place, operations = root / "report.json", root / f"old-{kind}", -1, 1
    in_child(run, old, report, -1, 2)
    for path in checkpoints.list_checkpoints(old):
        shutil.rmtree(path)
    while place < operations:
        folder = root / f"{kind}{place}"
        shutil.copytree(old, folder)
        places = [folder / name for name in RESULTS[kind]]
        statuses, facts, results = [], [], [[read(path) for path in places]]
        for kill_at in (place, -1):
            report.write_text(json.dumps({"start": None, "saved": 0}))
            statuses.append(in_child(run, folder, report, kill_at, 4))
            facts.append(json.loads(report.read_text()))
            results.append([read(path) for path in places])
        if place == -1:
            operations = facts[0]["operations"]
        entries = read_metrics(folder) if (folder / METRICS).exists() else []
        log = [[entry["step"], entry["loss"]] for entry in entries]
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.parent.name != "logs")
        line = {"kind": kind, "place": place, "statuses": statuses, "facts": facts, "log": log, "names": names}
        # Flushed, or every further child would print it again.
        print(json.dumps({**line, "results": results}), flush=True)
        place += 1


def main(root: Path) -> None:
    torch.set_num_threads(1)
    # Imported and frozen here, they are neither imported nor searched for garbage by each child.
    importlib.import_module("torch.utils.tensorboard")
    gc.freeze()
    kill_everywhere(root, "training", train)
    kill_everywhere(root, "fine-tuning", fine_tune)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
