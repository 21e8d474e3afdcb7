"""The comparison of training with kernels and with the reference runs, at a tiny size."""

import json

import pytest

from benchmarks.ssa_training import main, parse_args
from tests.ops.kernel_testing import without_gpu


@without_gpu
def test_runs_of_one_seed_are_the_same_without_kernels(tmp_path):
    report = main(
        parse_args(["--tiny", "--json", str(tmp_path / "losses.json"), "--plot", str(tmp_path / "losses.png")])
    )
    assert json.loads((tmp_path / "losses.json").read_text())["ends"] == report["ends"]
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    kernels, reference = report["losses"]["kernels"], report["losses"]["reference"]
    for seed in range(2):
        assert len(kernels[seed]) == 3
        assert kernels[seed] == pytest.approx(reference[seed], rel=1e-4)
    assert min(report["between_seeds"]) > 10 * max(report["between_paths"])
