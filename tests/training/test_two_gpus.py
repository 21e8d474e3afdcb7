"""The same training on one GPU and on two, with whole models (DDP) and with sharded ones (FSDP2), gives the same.

So does DeepSpeed, where it is installed. test_processes.py shows DDP and FSDP2 on processes of a CPU, with more of
what may differ.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")
# Model and optimizer; DeepSpeed takes AdamW alone.
KINDS = (("vae", "adamw"), ("dit", "muon"), ("camera", "muon"))
DEEPSPEED_KINDS = (("vae", "adamw"), ("dit", "adamw"))
CASES = [
    *((*kind, layout) for kind in KINDS for layout in ("ddp", "fsdp")),
    *(pytest.param(*kind, "deepspeed", marks=needs_deepspeed) for kind in DEEPSPEED_KINDS),
]
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def start(folder: Path, kind: str, optimizer: str, layout: str, count: int) -> subprocess.Popen:
    name = f"{kind}-{optimizer}-{layout}-{count}"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["-m", "tests.training.gpu_worker", name, kind, layout, optimizer, str(folder)]
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the trainings report, or their errors, by kind, optimizer, layout and number of GPUs; all run at once."""
    folder = tmp_path_factory.mktemp("gpus")
    runs = [(*kind, layout, 2) for kind in KINDS for layout in ("ddp", "fsdp")]
    runs += [(*kind, "deepspeed", 2) for kind in DEEPSPEED_KINDS if HAS_DEEPSPEED]
    runs = [*dict.fromkeys((kind, optimizer, "ddp", 1) for kind, optimizer, *_ in runs), *runs]
    processes = {run: start(folder, *run) for run in runs}
    reports = {}
    for run, process in processes.items():
        output, errors = process.communicate(timeout=300)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        reports[run] = json.loads(lines[0]) if process.returncode == 0 else errors[-3000:]
    return reports


@pytest.mark.parametrize(("kind", "optimizer", "layout"), CASES)
def test_curves_do_not_depend_on_gpus(results, kind, optimizer, layout):
    one, two = results[kind, optimizer, "ddp", 1], results[kind, optimizer, layout, 2]
    assert isinstance(one, dict) and isinstance(two, dict), (one, two)
    assert two["steps"] == one["steps"] == [1, 2, 3]
    # DeepSpeed clips by itself, and does not say the norm.
    for key in ("losses", "validation") if layout == "deepspeed" else ("losses", "norms", "validation"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
