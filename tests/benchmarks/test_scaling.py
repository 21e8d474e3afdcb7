"""The benchmark of training steps on several GPUs."""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scaling
from diffusers_sparse3d.training.sampler import SampleKey


def test_efficiency_is_per_gpu_and_per_model():
    rows = [
        {"model": "dit", "layout": "one", "gpus": 1, "seconds": 2.0, "tokens_per_second": 100.0},
        {"model": "dit", "layout": "ddp", "gpus": 4, "seconds": 2.5, "tokens_per_second": 320.0},
        {"model": "dit", "layout": "fsdp", "gpus": 4, "error": "out of memory"},
        {"model": "vae", "layout": "ddp", "gpus": 2, "seconds": 2.5, "tokens_per_second": 320.0},
    ]
    found = scaling.with_efficiency(rows)
    assert [row.get("efficiency") for row in found] == [1.0, 0.8, None, None]
    assert "80.0%" in scaling.describe({**found[1], "peak_gib": 3.0, "communication": 0.1, "kernel_seconds": 2.0})
    assert scaling.describe(found[2]).endswith("out of memory")


@pytest.mark.parametrize("model", ["dit", "vae"])
def test_samples(model):
    """Cells on both sides of the surface, as many as asked for, with values of the whole band."""
    data = scaling.Torus(model, 300, 0.5, 6, 28, 16)
    counts = data.sizes(1024)
    assert len(data) == 6 and 300 * np.exp(-0.5) <= counts.min() < counts.max() <= 300 * np.exp(0.5)
    sample = data[SampleKey(3, 1024, 0, 0.5)]
    assert sample["coords"].shape == (counts[3], 3) and sample["coords"].unique(dim=0).shape[0] == counts[3]
    if model == "vae":
        assert sample["values"].min() < -0.3 and sample["values"].max() > 0.3 and sample["sharp"].any()
    else:
        assert sample["mean"].shape == (counts[3], 16)


def test_cells_are_those_nearest_to_the_surface():
    cells = scaling.torus_cells(500)
    distance = scaling.signed_distance(8 * torch.cartesian_prod(*[torch.arange(128)] * 3) + 3.5).abs()
    assert scaling.signed_distance(8 * cells + 3.5).abs().max() <= distance.kthvalue(500).values


@pytest.mark.parametrize("outcome", ["row", "error", "timeout"])
def test_a_training_is_a_row(outcome, monkeypatch):
    """Also one that fails, or does not end."""

    def run(command, timeout, **_):
        assert command[command.index("--num_processes") + 1] == "2" and "--multi_gpu" in command
        if outcome == "timeout":
            raise subprocess.TimeoutExpired(command, timeout)
        if outcome == "error":
            return SimpleNamespace(
                returncode=1, stderr="ValueError: too large\nsubprocess.CalledProcessError: Command\n"
            )
        with open(command[command.index("--output") + 1] + "/row.json", "w") as file:
            json.dump({"seconds": 1.0}, file)
        return SimpleNamespace(returncode=0, stderr="")

    args = scaling.parse_args(["--timeout", "7"])
    monkeypatch.setattr(scaling.subprocess, "run", run)
    row = scaling.launch(args, "dit", "ddp", 2)
    assert row.pop("gpus") == 2 and row.pop("layout") == "ddp" and row.pop("model") == "dit"
    expected = {"row": {"seconds": 1.0}, "error": {"error": "ValueError: too large"}}
    assert row == expected.get(outcome, {"error": "not finished after 7 s"})


def test_a_step_must_be_left_to_time():
    with pytest.raises(SystemExit):
        scaling.parse_args(["--steps", "4"])


def test_rows_are_repeated_in_turn(monkeypatch, tmp_path):
    """A slow process does not tell: the medians are compared, and all seconds are kept."""
    seconds = {"one": [2.0, 9.0, 1.0], "ddp": [3.0, 2.0, 2.5]}
    order = []

    def launch(args, model, layout, count):
        name = layout if count > 1 else "one"
        order.append(name)
        took = seconds[name][order.count(name) - 1]
        row = {"model": model, "layout": name, "gpus": count, "seconds": took, "tokens_per_second": count * 10 / took}
        return {**row, "peak_gib": 1.0, "communication": 2.5 if took == 2.5 else 0.1, "kernel_seconds": 1.0}

    monkeypatch.setattr(scaling, "launch", launch)
    file = tmp_path / "scaling.json"
    options = ["--tiny", "--models", "vae", "--layouts", "ddp", "--repeats", "3", "--json", str(file), "--commit", "0"]
    scaling.main(scaling.parse_args(options))
    assert order == ["one", "ddp"] * 3
    rows = json.loads(file.read_text())["rows"]
    assert [row["runs"] for row in rows] == list(seconds.values())
    assert [row["seconds"] for row in rows] == [2.0, 2.5] and [row["efficiency"] for row in rows] == [1.0, 0.8]
    # Of the run in the middle, it was a process that waited.
    assert [row["communication"] for row in rows] == [0.1, 0.1]


def test_a_failure_among_repeats_is_the_row():
    runs = [{"seconds": 1.0}, {"error": "out of memory"}]
    assert scaling.middle_of(runs) == runs[1]
    assert scaling.middle_of(runs[:1]) == runs[0]
    profiled = {"communication": 0.0, "kernel_seconds": 1.0}
    assert scaling.middle_of([{"seconds": 2.0, **profiled}, {"seconds": 1.0, **profiled}])["seconds"] == 2.0
