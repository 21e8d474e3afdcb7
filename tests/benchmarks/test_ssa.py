"""The benchmark of Spatial Sparse Attention runs, at a tiny size."""

import json
import os

import torch

from benchmarks.report import SECTIONS
from benchmarks.ssa import main, mesh_cells, parse_args, take_tokens
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import tile_shapes
from tests.ops.kernel_testing import without_gpu


def test_tokens_are_so_many_in_block_order():
    shapes = [mesh_cells(None, 128), torch.tensor([[0, 9, 3], [5, 1, 2]], dtype=torch.int32)]
    for count in (7, len(shapes[0]), len(shapes[0]) + 1, 2 * len(shapes[0])):
        coords = take_tokens(shapes, count, 128, 8)
        assert coords.shape == (count, 4) and len(coords.unique(dim=0)) == count
        blocks = [tuple(block) for block in (coords // 8).tolist()]
        assert blocks == sorted(blocks)
    # The grid of each shape comes after that of the one before.
    first, second, third = (coords[:, 1] // 16 == place for place in range(3))
    assert first.sum() == len(shapes[0]) and second.sum() == 2 and third.sum() == len(shapes[0]) - 2
    assert set(map(tuple, coords[second, 1:].tolist())) == {(16, 9, 3), (21, 1, 2)}


def check_ways(row):
    assert row["forward"] > 0 and row["backward"] > 0


def test_attention_without_triton(tmp_path):
    arguments = ["--tiny", "--parts", "attention", "--dtype", "float32", "--repeats", "1", "--device", "cpu"]
    report = main(parse_args([*arguments, "--tokens", "30", "60", "--plot", str(tmp_path / "plot.png")]))
    assert [(row["tokens"], row["topk"]) for row in report["attention"]] == [(30, 2), (60, 2)]
    for row in report["attention"]:
        for name in ("ssa", "flash", "wide"):
            check_ways(row[name])
            assert row[name]["in_a_row"]["forward"] > 0 and not row[name]["replayed"]
        assert row["speedup"]["backward"] == row["flash"]["backward"] / row["ssa"]["backward"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@without_gpu
def test_every_part_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_shapes, "_directory", lambda: tmp_path)
    path = tmp_path / "report.json"
    arguments = ["--tiny", "--tune", "2", "--dtype", "float32", "--repeats", "1", "--device", "cpu"]
    main(parse_args([*arguments, "--json", str(path)]))
    report = json.loads(path.read_text())
    tuning = report["tuning"]
    assert os.path.exists(tuning["path"]) and tuning["num_candidates"] > 0
    assert set(tuning["chosen"]) == set(tuning["milliseconds"])
    assert len(report["attention"]) == len(report["stages"]) == 2
    for row in report["stages"]:
        for name in ("compressed", "selection", "window"):
            check_ways(row[name])
    assert [row["part"] for row in report["model"]] == ["block", "model"]
    for row in report["model"]:
        check_ways(row)
    lines = SECTIONS["ssa"].render(report)
    assert len(lines) == 2 + len(report["attention"]) + 1 + 2 + len({row["tokens"] for row in report["model"]})
    ssa = report["attention"][1]["ssa"]
    assert f"| {ssa['forward']:,.2f} / {ssa['backward']:,.2f} |" in lines[3]
