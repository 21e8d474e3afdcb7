"""The benchmark of the optimizers runs, at a tiny size."""

import json

import pytest

from benchmarks.optimizers import OPTIMIZERS, main, parse_args
from benchmarks.report import SECTIONS


def test_every_optimizer_is_in_the_report(tmp_path):
    sizes = ["--steps", "4", "--batch_size", "2"]
    main(parse_args(["--tiny", "--device", "cpu", *sizes, "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert tuple(rows) == OPTIMIZERS
    curves = {name: row["losses"] for name, row in rows.items()}
    # The same weights and noise; then both Muons train alike, and AdamW does not.
    assert len({curve[0] for curve in curves.values()}) == 1
    difference = abs(curves["adamw"][-1] - curves["muon"][-1])
    assert difference > 0 and curves["muon"] == pytest.approx(curves["torch's muon"], abs=difference / 4)
    header, _, *lines = SECTIONS["optimizers"].render(report)
    assert len(lines) == 3 and all(line.count("|") == header.count("|") for line in lines)
