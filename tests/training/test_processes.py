"""The same training on 1, 2 and 4 processes, with whole models (DDP) and with sharded ones (FSDP2), gives the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of all trainings by their names, and what was said."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.process_worker", str(tmp_path_factory.mktemp("processes"))],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {facts["name"]: facts for facts in lines}, result.stderr


@pytest.mark.parametrize(
    ("kind", "layout", "count"),
    [
        ("vae", "ddp", 2),
        ("vae", "ddp", 4),
        ("vae", "fsdp", 2),
        *(("dit", layout, count) for layout in ("ddp", "fsdp") for count in (2, 4)),
    ],
)
def test_curves_do_not_depend_on_processes(results, kind, layout, count):
    """Samples have 3 to 40 tokens, and 1, 2 or 4 forward passes make a step: means of means would be others."""
    one, several = results[0][f"{kind}-1"], results[0][f"{kind}-{layout}-{count}"]
    assert several["steps"] == one["steps"][:2] == [1, 2]
    for key in ("losses", "norms", "validation"):
        assert several[key] == pytest.approx(one[key][:2], rel=1e-5), key
    assert min(one["norms"]) > 0.5
    # The averaged weights; of the transformer, the test below.
    if kind == "vae":
        assert several["sums"] == pytest.approx(one["sums"], rel=1e-4, abs=1e-5)
    assert several["types"] == ["Tensor"] and several["pictures"] == len(several["validation"])
    assert several["models"] == (["averages/0.5/vae", "vae"] if kind == "vae" else ["transformer"])
    assert (several["frozen"] > 0) == (kind == "vae")
    # A small model is sharded as a whole, unless FSDP2 computes activations again, which it does block by block.
    if layout == "ddp":
        # Gradients are views of the buckets in which they are averaged: beside them, memory would hold all twice.
        assert several["gradients"] == one["gradients"] == one["storages"] > 4 * several["storages"]
    assert several["units"] == 0 if layout == "ddp" else (several["units"] == 1) == (kind == "vae")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["refiner", "dense_vae", "lora", "dora"])
def test_other_trainings_do_not_depend_on_processes(results, kind, layout):
    """Of adapters, all else is frozen: without randomised last layers, their gradients would be zero."""
    if kind in ("lora", "dora"):
        pytest.importorskip("peft")
    one, two = results[0][f"{kind}-1"], results[0][f"{kind}-{layout}-2"]
    for key in ("losses", "norms", "validation"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
    assert two["steps"] == one["steps"] == [1, 2] and len(one["validation"]) == 1
    assert min(one["norms"]) > 0.01
    # The averaged weights, and what is saved of them.
    assert two["sums"] == pytest.approx(one["sums"], rel=1e-4, abs=1e-5) and two["types"] == ["Tensor"]
    assert two["saved"].keys() == one["saved"].keys() and len(one["saved"]) == 1
    for file, sums in one["saved"].items():
        assert two["saved"][file] == pytest.approx(sums, rel=1e-4, abs=1e-5) and min(sums.values()) > 0, file


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_losses_of_cameras_do_not_depend_on_processes(results, layout):
    """Two processes have other numbers of known cameras each: their mean is over those of both."""
    one, two = results[0]["camera-1"], results[0][f"camera-{layout}-2"]
    for key in ("losses", "cameras", "norms", "validation"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
    assert len(one["cameras"]) == 2 and min(one["cameras"]) > 0.1


@pytest.mark.parametrize("name", ["resumed-ddp-2", "resumed-fsdp-2", "resumed-1"])
def test_training_goes_on_with_any_processes(results, name):
    """In two processes as before, from one process to two that share the model, and from four to one."""
    one, resumed = results[0]["dit-1"], results[0][name]
    assert resumed["steps"] == one["steps"][2:] == [3]
    for key in ("losses", "norms", "validation"):
        assert resumed[key] == pytest.approx(one[key][2:], rel=1e-5), key
    # Muon computes directions in bfloat16, in which 1e-7 may become 1 / 256.
    assert resumed["sums"] == pytest.approx(one["sums"], rel=3e-3, abs=1e-5)
    for count, others in ((1, 2), (4, 1)):
        assert f"has random states of {count} processes, and there are {others}" in results[1]


def test_half_precision_of_sharded_models_is_that_of_whole_ones(results):
    one, sharded = results[0]["half-1"], results[0]["half-fsdp-2"]
    assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert sharded["norms"] == pytest.approx(one["norms"], rel=3e-2)
