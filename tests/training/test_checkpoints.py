"""Checkpoints and output folders: whatever happens to a run, what it saved is whole, and is found again."""

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sparse3d.training import checkpoints
from diffusers_sparse3d.training import trainer as trainer_module
from diffusers_sparse3d.training.checkpoints import find_damage, list_checkpoints
from diffusers_sparse3d.training.files import REPLACED, complete_folder
from diffusers_sparse3d.training.metrics import read_metrics

from .linear_task import linear_trainer, train_linear
from .process_worker import make_trainer


FULL_DISK = r"checkpoint of step 4.*No space left.*\['checkpoint-2'\].*resume_from_checkpoint"


def steps(folder):
    return [path.name for path in list_checkpoints(folder)]


def log(folder):
    return [(entry["step"], entry["loss"]) for entry in read_metrics(folder)]


def snapshot(folder):
    """Contents and times of all files, but for the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return [(str(path), path.stat().st_mtime_ns, path.read_bytes()) for path in files]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_linear(folder, max_train_steps=6, checkpoints_total_limit=None).finish(lambda: None)
    assert steps(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of that training."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def crashes():
    """What crash_points.py says, by the kind of run: that of the run that was not killed is the first."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        result = subprocess.run(
            [sys.executable, "-m", "tests.training.crash_points", root],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert result.returncode == 0, result.stderr
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    for case in cases:
        assert case["statuses"] == [0 if case["place"] < 0 else 17, 0], (case["place"], result.stderr)
    return {kind: [case for case in cases if case["kind"] == kind] for kind in ("training", "fine-tuning")}


def test_killed_at_every_file_operation(crashes):
    """At any of them, no more is lost than the steps since the last checkpoint, and the result is the same."""
    whole, *broken = crashes["training"]
    assert [step for step, _ in whole["log"]] == [1, 2, 3, 4]
    assert len(broken) == whole["facts"][0]["operations"] > 60
    for case in broken:
        first, second = case["facts"]
        assert second["start"] >= first["saved"], case
        # A run that is killed before it deletes the last but one checkpoint leaves it there.
        names = {name for name in case["names"] if not name.startswith("checkpoint-2")}
        assert case["log"] == whole["log"] and names == {*whole["names"]}, case
    assert {case["facts"][1]["start"] for case in broken} == {0, 2, 4}


@pytest.mark.parametrize("kind", ["training", "fine-tuning"])
def test_results_are_the_old_or_the_new_ones(crashes, kind):
    """Models, models with a further average, LoRA weights and pipelines, at every file operation of their saving."""
    whole, *broken = crashes[kind]
    old, new, _ = whole["results"]
    assert all(before != after for before, after in zip(old, new)) and len(broken) == whole["facts"][0]["operations"]
    seen = set()
    for case in broken:
        before, killed, final = case["results"]
        assert before == old and final == new and {*whole["names"]} <= {*case["names"]}, case
        assert all(found in pair for found, *pair in zip(killed, old, new)), case
        seen.add(tuple(found == after for found, after in zip(killed, new)))
    assert seen == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing", "unlisted"])
def test_damaged_checkpoints_are_named_and_passed_over(folder, trained, caplog, damage):
    file = folder / "checkpoint-6" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    if damage == "missing":
        file.unlink()
    elif damage == "unlisted":
        (folder / "checkpoint-6" / "manifest.json").unlink()
    else:
        file.write_bytes({"cut": data[:-5], "empty": b"", "flipped": data}[damage])
    with caplog.at_level(logging.WARNING):
        train_linear(folder, max_train_steps=6, resume_from_checkpoint="latest", checkpoints_total_limit=None)
    assert any("checkpoint-6 is passed over" in message for message in caplog.messages)
    assert log(folder) == log(trained)
    assert find_damage(folder / "checkpoint-6") is None and (folder / "aside-checkpoint-6").is_dir()


def test_no_complete_checkpoint(folder):
    for path in list_checkpoints(folder):
        (path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*none is complete"):
        train_linear(folder, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*lacks the file state.json"):
        train_linear(folder, resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*does not exist"):
        train_linear(folder, resume_from_checkpoint=str(folder / "nowhere"))


class Payload:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_resuming_the_folder_of_a_stranger_runs_nothing(folder, tmp_path):
    """Pickles lie in every place where a training may look for something, under old names and under those of today."""
    mark = tmp_path / "executed"
    old = ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl", "optimizer.bin", "model.bin")
    names = {path.name for path in (folder / "checkpoint-6").iterdir()}
    for directory in (folder, *list_checkpoints(folder)):
        for name in (*old, "pytorch_model.bin", "scheduler.bin", "sampler.bin", "optimizer.pt", "scaler.pt"):
            with (directory / name).open("wb") as file:
                pickle.dump(Payload(mark), file)
    # In the place of each file of the newest checkpoint in turn: it is damaged then.
    for name in sorted(names):
        damaged = folder / "checkpoint-6" / name
        kept = damaged.read_bytes()
        damaged.write_bytes(pickle.dumps(Payload(mark)))
        assert checkpoints.newest_checkpoint(folder) == folder / "checkpoint-4"
        damaged.write_bytes(kept)
    # With a manifest that fits, they are no safetensors or JSON.
    for name in sorted(names - {"manifest.json"}):
        damaged = folder / "checkpoint-6" / name
        kept = damaged.read_bytes()
        damaged.write_bytes(pickle.dumps(Payload(mark)))
        manifest = json.loads((folder / "checkpoint-6" / "manifest.json").read_text())
        manifest["files"][name] = checkpoints._facts(damaged)
        (folder / "checkpoint-6" / "manifest.json").write_text(json.dumps(manifest))
        trainer = linear_trainer(folder, resume_from_checkpoint="latest", max_train_steps=6)
        with pytest.raises(Exception, match=r"(?i)header|utf-8|decode|json|expecting"):
            trainer.resume()
        trainer.accelerator.end_training()
        damaged.write_bytes(kept)
        manifest["files"][name] = checkpoints._facts(damaged)
        (folder / "checkpoint-6" / "manifest.json").write_text(json.dumps(manifest))
    train_linear(folder, resume_from_checkpoint="latest", max_train_steps=8)
    assert log(folder)[-1][0] == 8 and not mark.exists()
    # The payload works.
    pickle.loads(pickle.dumps(Payload(mark))).close()
    assert mark.exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, trained, monkeypatch):
    folder, save_file, calls = tmp_path / "run", checkpoints.save_file, []

    def save_until_full(tensors, path):
        calls.append(path)
        if len(calls) == 6:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_until_full)
    with pytest.raises(
        OSError, match=r"checkpoint of step 4.*No space left.*\['checkpoint-2'\].*resume_from_checkpoint"
    ):
        train_linear(folder, max_train_steps=6)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-2"]
    assert find_damage(folder / "checkpoint-2") is None
    train_linear(folder, max_train_steps=6, resume_from_checkpoint="latest")
    assert log(folder) == log(trained)


def test_a_used_folder_is_refused(folder, tmp_path):
    before = snapshot(folder)
    for checkpoint in (None, str(shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4"))):
        with pytest.raises(ValueError, match=r"`output_dir` must be a new folder.*resume_from_checkpoint"):
            train_linear(folder, resume_from_checkpoint=checkpoint)
    assert snapshot(folder) == before
    # A checkpoint from elsewhere starts a training in a new folder, and so does "latest" where there is nothing.
    train_linear(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "checkpoint-4"), max_train_steps=6)
    assert log(tmp_path / "new") == log(folder)[4:]
    train_linear(tmp_path / "empty", resume_from_checkpoint="latest", max_train_steps=6)
    assert log(tmp_path / "empty") == log(folder)


def test_two_runs_do_not_share_a_folder(tmp_path):
    first = linear_trainer(tmp_path)
    for resume in (None, "latest"):
        with pytest.raises(ValueError, match=rf"`output_dir` .* no other run .* process {os.getpid()} uses"):
            linear_trainer(tmp_path, resume_from_checkpoint=resume)
    first.accelerator.end_training()
    linear_trainer(tmp_path).accelerator.end_training()


def test_foreign_folders_are_left_alone(tmp_path):
    for name in ("checkpoint-best", "checkpoint-2-keep", "checkpoint-", "checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    train_linear(tmp_path, max_train_steps=8, checkpoints_total_limit=2)
    assert steps(tmp_path) == ["checkpoint-6", "checkpoint-8"]
    for name in ("checkpoint-best", "checkpoint-2-keep", "checkpoint-", "checkpoint-1"):
        assert (tmp_path / name / "file").read_text() == "mine"


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1000, 200, 90):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoints.MANIFEST).write_text('{"files": {}}')
    assert checkpoints.newest_checkpoint(tmp_path).name == "checkpoint-1000"
    checkpoints.limit_checkpoints(tmp_path, 2)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-200", "checkpoint-1000"]


def test_old_checkpoints_are_deleted_after_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []
    save = checkpoints.save_file

    def save_file(tensors, path):
        seen.append((path.parent.name, steps(tmp_path)))
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    train_linear(tmp_path, max_train_steps=4, checkpoints_total_limit=1)
    assert ("checkpoint-4.partial", ["checkpoint-2"]) in seen and steps(tmp_path) == ["checkpoint-4"]


def test_resuming_a_finished_training_rewrites_nothing(folder):
    before = snapshot(folder)
    trainer = train_linear(folder, max_train_steps=6, resume_from_checkpoint="latest")
    trainer.finish(lambda: pytest.fail("models are written again"))
    assert snapshot(folder) == before
    # The averaged weights are there.
    average = torch.stack(list(trainer.averages.values[0].values()))[0]
    assert torch.equal(trainer.task.weight.detach(), average)


@pytest.mark.parametrize("failing", ["pictures", "plot_losses"])
def test_a_last_validation_that_fails_loses_no_step(tmp_path, monkeypatch, caplog, failing):
    """The checkpoint is complete before, the same as of a training that is not validated, and the models follow."""
    options = {"max_train_steps": 2, "gradient_accumulation_steps": 1, "more_ema_decays": [0.5]}

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = make_trainer("dense_vae", tmp_path / "broken", **options)
    with monkeypatch.context() as patch:
        patch.setattr(*((trainer.task, failing) if failing == "pictures" else (trainer_module, failing)), fail)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
    trainer.accelerator.end_training()
    assert "saved in" in caplog.text and "checkpoint-2: `resume_from_checkpoint: latest` writes" in caplog.text
    plain = make_trainer("dense_vae", tmp_path / "plain", **options)
    plain.validation = None
    plain.train()
    plain.accelerator.end_training()
    names = [path.name for path in (tmp_path / "plain" / "checkpoint-2").glob("*.safetensors")]
    assert len(names) == 5
    for name in names:
        found, expected = ((tmp_path / run / "checkpoint-2" / name).read_bytes() for run in ("broken", "plain"))
        assert found == expected
    resumed = make_trainer("dense_vae", tmp_path / "broken", **options, resume_from_checkpoint="latest")
    resumed.train()
    resumed.finish(lambda: resumed.task.save_pretrained(tmp_path / "broken"))
    resumed.accelerator.end_training()
    saved = load_file(tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in plain.task.vae.state_dict().items())


def test_going_on_from_an_older_checkpoint(folder, trained, caplog):
    """The newer ones belong to another course of the training: they are neither deleted nor taken for the latest."""
    train_linear(folder, max_train_steps=5, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert log(folder) == log(trained)[:5]
    assert steps(folder) == ["checkpoint-4", "checkpoint-5"]
    assert {path.name for path in folder.glob("aside-*")} == {"aside-checkpoint-4", "aside-checkpoint-6"}


def test_half_a_line_in_the_log(folder, trained):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert len(read_metrics(folder)) == 6
    train_linear(folder, max_train_steps=8, resume_from_checkpoint="latest")
    assert log(folder)[:6] == log(trained) and [step for step, _ in log(folder)] == list(range(1, 9))
    assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_sums_of_the_log_go_on(tmp_path):
    """Entries are means over five steps each, also where a checkpoint lies between them."""
    options = {"max_train_steps": 10, "logging_steps": 5, "checkpointing_steps": 3}
    train_linear(tmp_path / "whole", **options)
    train_linear(tmp_path / "broken", **{**options, "max_train_steps": 8})
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    train_linear(tmp_path / "broken", **options, resume_from_checkpoint="latest")
    assert log(tmp_path / "broken") == log(tmp_path / "whole")


def test_missing_random_states_are_said(folder, caplog):
    (folder / "checkpoint-6" / "random.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        train_linear(folder, max_train_steps=8, resume_from_checkpoint="latest")
    assert any("no random states" in message for message in caplog.messages)


def test_another_model_is_refused(folder):
    trainer = linear_trainer(folder, max_train_steps=8, resume_from_checkpoint="latest")
    trainer.task.weight.data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*differ in \['weight'\]"):
        trainer.resume()
    trainer.accelerator.end_training()


def test_several_averages(tmp_path):
    trainer = train_linear(tmp_path, max_train_steps=6, ema_decay=0.5, more_ema_decays=[0.0, 0.2])
    weights = [float(values["weight"][0]) for values in trainer.averages.values]
    assert len(set(weights)) == 3
    assert trainer.task.weight[0].item() == weights[0]
    again = linear_trainer(
        tmp_path, max_train_steps=7, ema_decay=0.5, more_ema_decays=[0.0, 0.2], resume_from_checkpoint="latest"
    )
    again.resume()
    assert [float(values["weight"][0]) for values in again.averages.values] == weights
    # Decay 0 is the weights themselves.
    assert weights[1] == again.task.weight[0].item()
    again.accelerator.end_training()


def test_a_folder_is_complete_or_as_it_was(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with complete_folder(path) as partial:
            (partial / "weights").write_text(content)
            assert partial != path
    with pytest.raises(RuntimeError), complete_folder(path) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert (path / "weights").read_text() == "new" and [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_two_kills_between_the_renames_leave_the_old_folder(tmp_path, monkeypatch):
    """The place is empty after the first; the old folder lies beside it until the new one is in the place."""
    path, rename = tmp_path / "model", Path.rename
    with complete_folder(path) as partial:
        (partial / "weights").write_text("old")

    def killed(self, target):
        if target == path:
            raise KeyboardInterrupt
        return rename(self, target)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            with complete_folder(path) as partial:
                (partial / "weights").write_text("new")
        assert not path.exists() and (path.with_name(path.name + REPLACED) / "weights").read_text() == "old"
    with complete_folder(path) as partial:
        (partial / "weights").write_text("newest")
    assert (path / "weights").read_text() == "newest" and [entry.name for entry in tmp_path.iterdir()] == ["model"]
