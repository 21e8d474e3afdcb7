"""The same training on one GPU and on two, with whole models (DDP) and with sharded ones (FSDP2), gives the same.

test_processes.py shows it on processes of a CPU, with more of what may differ.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
KINDS = ("vae", "dit", "camera")
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def start(folder: Path, kind: str, layout: str, count: int) -> subprocess.Popen:
    name = f"{kind}-{layout}-{count}"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["-m", "tests.training.gpu_worker", name, kind, layout, str(folder)]
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
    """What the trainings report, by kind, layout and number of GPUs; all run at once."""
    folder = tmp_path_factory.mktemp("gpus")
    runs = [(kind, "ddp", 1) for kind in KINDS] + [(kind, layout, 2) for kind in KINDS for layout in ("ddp", "fsdp")]
    processes = {run: start(folder, *run) for run in runs}
    reports = {}
    for run, process in processes.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        reports[run] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return reports


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_curves_do_not_depend_on_gpus(results, kind, layout):
    one, two = results[kind, "ddp", 1], results[kind, layout, 2]
    assert two["steps"] == one["steps"] == [1, 2, 3]
    for key in ("losses", "norms", "validation"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
