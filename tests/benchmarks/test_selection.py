"""The gain of the selection of the best of several meshes, at a tiny size."""

import json

import pytest

from benchmarks import selection
from tests.app.boxy import boxy_pipeline
from tests.training.conftest import small_data  # noqa: F401


def test_selected_meshes_are_judged_by_the_truth(tmp_path, small_data, monkeypatch):  # noqa: F811
    boxy_pipeline().save_pretrained(tmp_path / "model")
    file = tmp_path / "selection.json"
    sizes = ["--shapes", "1", "--seeds", "2", "--dense_steps", "1", "--num_samples", "500", "--device", "cpu"]
    options = ["--data", str(small_data), "--model", str(tmp_path / "model"), *sizes, "--json", str(file)]
    report = selection.main(selection.parse_args(options))
    assert {row["id"] for row in report["rows"]} == {"capsule"}
    for row in report["rows"]:
        scores = [candidate["score"] for candidate in row["candidates"]]
        assert scores == sorted(scores, reverse=True)
        assert {candidate["seed"] for candidate in row["candidates"]} == {0, 1}
        assert all(0 < candidate["f1_0.05"] <= 1 for candidate in row["candidates"])
    written = json.loads(file.read_text())
    monkeypatch.setattr(selection, "make_row", lambda *_: pytest.fail("a row is there already"))
    assert selection.main(selection.parse_args(options)) == written
    options[options.index("--num_samples") + 1] = "400"
    with pytest.raises(ValueError, match="rows of other settings"):
        selection.main(selection.parse_args(options))


def test_means_of_one_the_selected_and_the_nearest():
    pairs = [[(0.5, 3), (0.9, 1)], [(0.8, 2), (0.2, 6)]]
    rows = [
        {"candidates": [{"f1_0.02": f1 / 2, "f1_0.05": f1, "bodies": bodies} for f1, bodies in own]} for own in pairs
    ]
    summary = selection.summarize(rows)
    assert summary["f1_0.05"] == pytest.approx({"one": 0.6, "selected": 0.65, "nearest": 0.85})
    assert summary["bodies"] == pytest.approx({"one": 3, "selected": 2.5, "nearest": 1.5})
