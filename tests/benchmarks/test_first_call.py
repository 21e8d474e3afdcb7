"""The benchmark of the first call runs, at a tiny size."""

import json

import trimesh

from benchmarks.first_call import CACHES, RUNS, main, parse_args
from benchmarks.report import SECTIONS


def test_every_process_is_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trimesh.creation.cylinder(0.1, 1).export(tmp_path / "rod.ply")
    arguments = ["--work", str(tmp_path), "--mesh", str(tmp_path / "rod.ply"), "--tiny", "--device", "cpu"]
    # One run in place of the two and the one before, whose processes differ on a GPU alone.
    monkeypatch.setattr("benchmarks.first_call.RUNS", {"one by one": RUNS["one by one"]})
    monkeypatch.setattr("benchmarks.first_call.CACHES", CACHES[:1])
    main(parse_args([*arguments, "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["rows"]
    assert [row["kernels"], row["cache"]] == ["one by one", "empty"]
    assert all(row[name] > 0 for name in ("imports", "loading", "first call", "second call"))
    header, _, line = SECTIONS["first_call"].render(report)
    assert header.count("|") == line.count("|") and f" {row['second call']:.1f} " in line
