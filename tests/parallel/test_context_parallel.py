"""SparseDiT with its tokens split over two processes: the same result and gradients as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import ContextParallelConfig

from diffusers_sparse3d import SSAAttnProcessor
from tests.parallel.context_parallel_worker import CASES, make_model


@pytest.fixture(scope="module")
def results():
    """What the processes print, in order."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.parallel.context_parallel_worker"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        # Two processes that share a small machine; kernels are tested elsewhere.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients(results, name):
    """Of two samples with an odd number of rows, of one sample with checkpointing, and of a single row."""
    found = [facts for facts in results if facts["name"] == name]
    assert [(facts["rows"], facts["all_rows"]) for facts in found] == [(29, 57), (5, 9), (1, 1)]
    for facts in found:
        # Norms are computed in float32, whatever the dtype.
        assert facts["error"] < 1e-6 and facts["gradients"] < 1e-5, facts


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ring", "ValueError: `config.ring_degree` must be 1, got 2"),
        ("degree", "ValueError: `config.ulysses_degree` must divide the 4 query and 2 key/value heads"),
        ("tensor", "ValueError: `config` must be a ContextParallelConfig"),
        ("plan", "ValueError: `cp_plan` must be empty"),
        ("cache", "ValueError: `config` cannot be used with a cache over steps"),
        ("processor", "ValueError: `config` needs attention processors of this package, got function"),
        ("twice", "RuntimeError: parallelism is enabled already"),
        ("later cache", "ValueError: a cache over steps cannot be used with context parallelism"),
        ("rows", "ValueError: `coords` must be the same on all processes"),
    ],
)
def test_what_is_refused(results, case, message):
    assert results[-1][case].startswith(message)


def test_without_processes():
    with pytest.raises(RuntimeError, match="must be initialized"):
        make_model().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def test_hooks_of_diffusers_are_refused():
    """They would split the tokens and leave the coordinates whole."""
    processor = SSAAttnProcessor()
    assert processor._parallel_config is None
    with pytest.raises(ValueError, match=r"SparseDiT\.enable_parallelism"):
        processor._parallel_config = ContextParallelConfig(ulysses_degree=2)
