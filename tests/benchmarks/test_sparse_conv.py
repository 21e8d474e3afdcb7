"""The benchmark of the sparse convolution runs, at a tiny size."""

import json

import pytest
import torch

from benchmarks.report import SECTIONS
from benchmarks.sparse_conv import main, parse_args, shell
from tests.ops.kernel_testing import without_gpu


@pytest.mark.parametrize("resolution, thickness, voxels", [(128, 1.0, 88_144), (256, 1.0, 347_488)])
def test_shells_have_the_published_sizes(resolution, thickness, voxels):
    coords = shell(resolution, thickness, "cpu")
    assert coords.shape == (voxels, 4) and coords.dtype == torch.int32


def test_every_figure_is_in_the_report(tmp_path):
    path = tmp_path / "report.json"
    main(parse_args(["--tiny", "--dtype", "float32", "--repeats", "1", "--device", "cpu", "--json", str(path)]))
    report = json.loads(path.read_text())
    plain, subdivided = report["results"]
    for row in (plain, subdivided):
        for name in ("map", "forward", "backward", "all", "step", "plain_forward", "plain_backward"):
            assert row[name] > 0
        for name in ("backward_feats", "backward_weight", "backward_bias"):
            assert row[name] > 0
        assert 0 < row["forward_floor_bytes"] < row["backward_floor_bytes"]
    assert subdivided["forward_floor_operations"] > plain["forward_floor_operations"]
    lines = SECTIONS["sparse_conv"].render(report)
    assert len(lines) == 4 and f"| {plain['forward']:.2f} / {plain['backward']:.2f} |" in lines[2]


@without_gpu
def test_tuning_in_the_interpreter(tmp_path):
    path = tmp_path / "tuning.json"
    arguments = ["--tiny", "--tune", "--dtype", "float32", "--repeats", "1", "--device", "cpu", "--budget", "1"]
    main(parse_args([*arguments, "--json", str(path)]))
    reports = json.loads(path.read_text())["results"]
    kernels = ["forward", "weight gradient", "forward", "input gradient", "weight gradient"]
    assert [report["kernel"] for report in reports] == kernels
    for report in reports:
        assert report["best"] == report["tried"][0] and report["shipped"] in report["tried"]
