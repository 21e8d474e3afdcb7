"""Time and memory of training steps in sparse cells and in dense volumes, at a tiny size."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.claims import volume


def test_small_steps_are_measured_and_large_ones_counted(tmp_path):
    options = ["--tiny", "--device", "cpu", "--repeats", "1", "--most_tokens", "100"]
    files = ["--json", str(tmp_path / "table.json"), "--plot", str(tmp_path / "bars.png")]
    report = volume.main(volume.parse_args([*options, *files]))
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows == report["rows"]
    assert [(row["model"], row["tokens"], row["source"]) for row in rows] == [
        ("sparse, SSA", 60, "measured"),
        ("sparse, full attention", 60, "measured"),
        ("dense", 8, "measured"),
        ("dense", 27, "measured"),
        ("dense", 64, "measured"),
        ("dense", 512, "counted"),
    ]
    assert [row["resolution"] for row in rows] == [1024, 1024, 16, 24, 32, 32]
    ratio = volume.dense_operations(512, volume.TINY) / volume.dense_operations(64, volume.TINY)
    assert rows[-1]["seconds"] == pytest.approx(rows[-2]["seconds"] * ratio)
    assert rows[0]["gpus"] == 8 and rows[1]["gpus"] == pytest.approx(8 * rows[1]["seconds"] / rows[0]["seconds"])
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_operations_are_those_that_pytorch_counts():
    sizes = volume.TINY
    heads = {"num_attention_heads": sizes.dense_heads, "attention_head_dim": sizes.width // sizes.dense_heads}
    common = {"in_channels": sizes.channels, "num_layers": sizes.layers, "cross_attention_dim": sizes.width}
    model = volume.DenseDiT(sample_size=4, **heads, **common)
    inputs = (torch.randn(1, sizes.channels, 4, 4, 4), torch.ones(1), torch.randn(1, sizes.context, sizes.width))
    # The fused kernels of a CPU are not counted: of attention without gradients, and of the MLP.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    # Beside the blocks there are small layers at both ends, and the modulation.
    blocks = volume.dense_operations(64, sizes) / volume.PASSES
    assert 0.97 < blocks / counter.get_total_flops() < 1


def test_memory_is_counted_along_the_line_of_what_was_measured():
    measured = [{"tokens": 10, "seconds": 1.0, "gib": 3.0}, {"tokens": 30, "seconds": 4.0, "gib": 7.0}]
    row = volume.count(volume.Case("dense", 256, 8, 130), volume.TINY, measured)
    assert row["gib"] == pytest.approx(27)
    assert "gib" not in volume.count(volume.Case("dense", 256, 8, 130), volume.TINY, [{"tokens": 9, "seconds": 1.0}])


def test_cells_are_those_of_a_torus():
    cells = volume.torus_cells(500, 32)
    x, y, z = ((cells[:, 1:] + 0.5) / 16 - 1).unbind(1)
    assert cells.unique(dim=0).shape == (500, 4) and (cells[:, 0] == 0).all()
    assert (torch.hypot(torch.hypot(x, y) - 0.62, z) - 0.22).abs().max() < 0.1


def test_what_does_not_fit_is_said(monkeypatch):
    def measure(case, *_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(volume, "measure", measure)
    report = volume.main(volume.parse_args(["--tiny", "--device", "cpu"]))
    assert {row.get("error") for row in report["rows"]} == {"out of memory"}
