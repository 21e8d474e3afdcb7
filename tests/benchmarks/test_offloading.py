"""The benchmark of offloading runs, at a tiny size."""

import json

import pytest
import torch

from benchmarks import offloading, report


def run(tmp_path, *options):
    arguments = ["--work", str(tmp_path), "--tiny", "--dtype", "float32", "--device", "cpu", *options]
    offloading.main(offloading.parse_args([*arguments, "--json", str(tmp_path / "report.json")]))
    return json.loads((tmp_path / "report.json").read_text())


def test_rows_are_compared_with_that_on_the_device(tmp_path, monkeypatch):
    """Every row of a CPU has the same result but that of weights in 8 bits; one that does not run says why."""

    def fail(pipeline, args):
        raise RuntimeError("no such | place\nA second line")

    names = offloading.available_rows("cpu")
    assert len(names) == 7
    monkeypatch.setitem(offloading.ROWS, "model", fail)
    found = run(tmp_path)
    rows = {row["weights"]: row for row in found["rows"]}
    assert list(rows) == names
    assert rows["all on the GPU"]["difference"] == rows["all on the GPU"]["from_float32"] == 0
    assert rows.pop("model") == {"weights": "model", "error": "RuntimeError: no such | place"}
    assert rows.pop("layerwise casting, float8")["difference"] > 1e-3
    assert all(row["difference"] < 1e-4 and row["peak_gib"] == [] for row in rows.values()), rows
    assert {path.name for path in tmp_path.iterdir()} == {"offloading-tiny", "report.json"}
    lines = report.SECTIONS["offloading"].render(found)
    assert lines[3] == "| model | - | - | - | - | RuntimeError: no such \\| place |"
    assert lines[0].endswith("| difference | from float32 |")
    assert len({line.count(" | ") for line in lines[:-2] if "model" not in line}) == 1


def test_rows_are_compared_with_float32(tmp_path, monkeypatch):
    """Rows that round to 16 bits are equally far from it, a row with wrong weights is farther."""

    def spoil(pipeline, args):
        for parameter in pipeline.transformer.parameters():
            parameter.data.mul_(0.5)

    monkeypatch.setitem(offloading.ROWS, "model", spoil)
    first, spoilt, leaf = run(tmp_path, "--dtype", "bfloat16", "--rows", "model", "group, leaf level")["rows"]
    assert 1e-4 < first["from_float32"] == pytest.approx(leaf["from_float32"], rel=0.2)
    first, spoilt = (row["by_record"]["from_float32"] for row in (first, spoilt))
    assert 1e-4 < spoilt["dense: latents"] == first["dense: latents"] < 0.05
    assert spoilt["sparse: latents"] > 2 * first["sparse: latents"]


def test_every_model_matters(tmp_path, monkeypatch):
    """A row in which the weights of a model are wrong has another result."""

    def spoil(part):
        def change(pipeline, args):
            for parameter in getattr(pipeline, part).parameters():
                parameter.data.mul_(0.5)

        return change

    rows = dict(zip([name for name in offloading.ROWS if name != offloading.FIRST], offloading.MODELS))
    for name, part in rows.items():
        monkeypatch.setitem(offloading.ROWS, name, spoil(part))
    differences = [row["difference"] for row in run(tmp_path, "--rows", *rows)["rows"][1:]]
    assert len(differences) == 5 and min(differences) > 1e-3


def test_results_must_be_those_of_the_same_stages():
    expected = {"a": torch.ones(2), "b": torch.full((2,), 4.0)}
    found = offloading.differences({"a": torch.ones(2), "b": torch.tensor([4.0, 3.0])}, expected)
    assert found == {"a": 0, "b": 0.25}
    for records in (
        {"a": torch.ones(2)},
        {**expected, "b": torch.ones(3)},
        {**expected, "a": torch.full((2,), torch.nan)},
    ):
        with pytest.raises(ValueError, match=r"stages gave|must be finite"):
            offloading.differences(records, expected)
