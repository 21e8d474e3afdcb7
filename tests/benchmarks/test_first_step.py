"""The benchmark of the first step of a training runs, at a tiny size."""

import json

from benchmarks.first_step import RUNS, main, parse_args
from benchmarks.report import SECTIONS


def test_a_process_is_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # One run, as processes differ on a GPU alone.
    monkeypatch.setattr("benchmarks.first_step.RUNS", RUNS[:1])
    small = ["--tiny", "--device", "cpu", "--batch_size", "2", "--tokens", "40", "--steps", "3"]
    main(parse_args([*small, "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["rows"]
    assert (row["kernels"], row["cache"]) == ("compiled ahead", "empty")
    assert 0 < row["imports"] < row["first step"] and row["a further step"] > 0
    header, _, line = SECTIONS["first_step"].render(report)
    assert header.count("|") == line.count("|") and f" {row['first step']:.1f} " in line
