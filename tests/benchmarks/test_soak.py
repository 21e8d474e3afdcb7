"""The soak runs at small counts, notices what grows and what is left, and its sentence is that of the page."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import soak
from benchmarks.report import SECTIONS


def run(monkeypatch, tmp_path, **replaced):
    steps = {"soak_training": lambda steps, folder: {"count": steps, "seconds": 1.0}, **replaced}
    for name, function in steps.items():
        monkeypatch.setattr(soak, name, function)
    path = tmp_path / "soak.json"
    arguments = SimpleNamespace(
        calls=2, steps=3, meshes=4, dataset=20, allowance=100, json=path, command="", commit=""
    )
    monkeypatch.setattr(soak, "parse_arguments", lambda *_: arguments)
    monkeypatch.setattr(soak, "describe_run", lambda _: {})
    soak.main()
    return json.loads(path.read_text())


def test_calls_and_meshes(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "OUTPUT_TYPES", ("latent",) * 4)  # surfaces of random weights are large
    report = run(monkeypatch, tmp_path)
    assert [row["count"] for row in report["rows"]] == [2, 4, 20, 3]
    (sentence,) = SECTIONS["soak"].render(report)
    assert "2 calls of a pipeline added" in sentence and "4 meshes prepared" in sentence and "3 steps" in sentence
    assert "20 meshes of a dataset by two processes" in sentence


def flat(count, *_):
    return {"count": count, "seconds": 1.0, "early_mib": 100.0, "late_mib": 101.0}


def test_growth_and_files_are_noticed(monkeypatch, tmp_path):
    def leaves_a_file(count, folder):
        (folder / "left").touch()
        return flat(count)

    with pytest.raises(AssertionError, match="300 MiB were added"):
        run(monkeypatch, tmp_path, soak_pipeline=lambda count: {**flat(count), "late_mib": 400.0}, soak_meshes=flat)
    with pytest.raises(AssertionError, match="left behind"):
        run(monkeypatch, tmp_path, soak_pipeline=flat, soak_meshes=leaves_a_file)
