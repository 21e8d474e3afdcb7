"""Configurations and checkpoints that are damaged, foreign or hostile: a sentence, no code that runs, nothing left."""

import copy
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import yaml

from diffusers_sparse3d.files import folder_beside
from diffusers_sparse3d.loaders.convert import convert
from diffusers_sparse3d.loaders.original_checkpoint import load_checkpoint, model_state_dict
from diffusers_sparse3d.loaders.original_config import MODEL_TARGETS, convert_config, entry_params, model_config
from diffusers_sparse3d.loaders.random_release import IMAGE_ENCODER_FILE


VALUES = (None, [], "x", -1, 0, {}, 2.5, 10**9, True, float("nan"))


@pytest.fixture(scope="module")
def config(releases):
    return yaml.safe_load((next(iter(releases.values())) / "config.yaml").read_text())


def entries(config):
    for name, entry in config.items():
        target = MODEL_TARGETS.get(entry["target"].rsplit(".", 1)[-1])
        if target is not None:
            yield name, target


def test_every_value_of_a_configuration_is_checked(config):
    """A value of another kind is taken or refused with a sentence, in each place of each entry."""
    refused = 0
    for name, model_name in entries(config):
        for key in [None, *config[name].get("params", {})]:
            for value in VALUES:
                changed = copy.deepcopy(config)
                if key is None:
                    changed[name]["params"] = value
                else:
                    changed[name]["params"][key] = value
                try:
                    model_config(changed, model_name, {}, entry=name)
                except ValueError as error:
                    refused += 1
                    assert "original configuration" in str(error) or "`" in str(error)
    assert refused > 300


@pytest.mark.parametrize("params", [3, "x", [1], {1: 2}])
def test_parameters_are_given_by_name(params):
    with pytest.raises(ValueError, match="`dense_vae` of the original configuration must have `params` by name"):
        entry_params({"target": "DenseShapeVAE", "params": params}, "dense_vae")


def test_heads_of_an_original_transformer():
    params = {"resolution": 4, "in_channels": 2, "out_channels": 2, "num_blocks": 1, "cond_channels": 8}
    for heads in ({"model_channels": 32}, {"model_channels": 128, "num_heads": 0}, {"model_channels": "x"}):
        with pytest.raises(ValueError, match="DenseDiT"):
            convert_config("DenseDiT", {**params, **heads}, {}, "DenseDiT")


@pytest.mark.parametrize("value", [None, [], 3, {}, {"weight": torch.zeros(2, dtype=torch.cfloat)}, {"weight": 3}])
def test_parameters_of_another_kind(value):
    with pytest.raises(ValueError, match=r"`file\.ckpt`"):
        model_state_dict("DenseVAE", {"vae": value}, "file.ckpt")


class Payload:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    if legacy:
        (tmp_path / "hostile.ckpt").write_bytes(pickle.dumps({"vae": Payload()}))
    else:
        torch.save({"vae": Payload()}, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match="objects other than tensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the protocol of the old format
        load_checkpoint(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_configuration_runs(releases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("dense_vae: !!python/object/apply:os.mkdir [ran]\n")
    with pytest.raises(ValueError, match="not YAML"):
        convert(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("seed", range(6))
def test_cut_and_changed_files_leave_nothing(releases, tmp_path, seed):
    """Bytes of a file are cut or changed: the conversion says so, or the values are others; never another error."""
    generator = random.Random(seed)
    release = tmp_path / "release"
    release.mkdir()
    for path in next(iter(releases.values())).iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "model_dense.ckpt":
            if seed % 2:
                del data[generator.randrange(len(data)) :]
            else:
                for _ in range(20):
                    data[generator.randrange(len(data))] = generator.randrange(256)
        (release / path.name).write_bytes(data)
    try:
        convert(release, tmp_path / "out", image_encoder=release / IMAGE_ENCODER_FILE)
    except ValueError:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


WRITER = """
import sys, time
from pathlib import Path
from diffusers_sparse3d.files import folder_beside
with folder_beside(Path(sys.argv[1])) as folder:
    (folder / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_for_good(tmp_path):
    target = tmp_path / "out"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    with pytest.raises(ValueError, match="being written by another process"), folder_beside(target):
        pytest.fail("two writers at once")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not target.exists()
    deadline = time.monotonic() + 10
    while True:
        try:
            with folder_beside(target) as folder:
                assert not list(folder.iterdir())
                (folder / "whole").write_text("all")
            break
        except ValueError:
            assert time.monotonic() < deadline
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), folder_beside(tmp_path / "out") as folder:
        (folder / "part").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
