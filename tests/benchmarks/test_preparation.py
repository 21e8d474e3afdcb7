"""The benchmark of the preparation runs, at a tiny size, and counts the meshes of the time that it says."""

import json

import pytest
import trimesh

import preparation
import report_data
from benchmark_meshes import write_bumpy_spheres


@pytest.fixture
def meshes(tmp_path):
    write_bumpy_spheres(tmp_path / "meshes", 2, 1)
    return tmp_path / "meshes"


def timed(started, done, seconds=10.0, ran_out=False):
    found = preparation.TimedPreparation(None, None, seconds=seconds, begin=0.0)
    found.started, found.done, found.ran_out = started, done, ran_out
    return found


def test_a_row_has_the_meshes_of_its_time(meshes, tmp_path):
    (meshes / "broken.ply").write_text("no mesh")
    options = ["--tiny", "--workers", "1", "--seconds", "1", "--limit", "30", "--rows", "400"]
    options += ["--meshes", str(meshes), "--json", str(tmp_path / "preparation.json")]
    preparation.main(preparation.parse_args(options))
    report = json.loads((tmp_path / "preparation.json").read_text())
    (row,) = report["rows"]
    assert report["settings"]["meshes"] == "meshes" and "device" not in report["hardware"]
    assert (row["device"], row["workers"], row["resolution"]) == ("cpu", 1, 32)
    # The first mesh starts the clock, and one may be done after its end. Every third is broken.
    assert row["meshes_per_second"] >= row["meshes"] - 2 > 0 and sum(row["failures"].values()) > 0
    assert "meshes/s" in preparation.describe(row)


def test_too_few_rows_are_no_rate(meshes, tmp_path):
    args = preparation.parse_args(["--tiny", "--workers", "1", "--limit", "30"])
    assert preparation.write_index(meshes, tmp_path / "index.csv", 3) == 4
    row = preparation.measure(args, tmp_path / "index.csv", "cpu", 1, 32)
    assert row["meshes"] == 4 and row["error"].startswith("too few --rows") and "meshes_per_second" not in row
    with pytest.raises(ValueError, match="`workers` must be at least 1"):
        preparation.measure(args, tmp_path / "index.csv", "cpu", 0, 32)


def test_rate_is_that_of_the_time_after_the_start():
    # One of them is done before all processes have started, and one after the end.
    assert timed(2.0, [1.0, 2.0, 3.0, 6.0, 12.5]).rate() == pytest.approx(2 / 4)
    assert timed(None, [1.0]).rate() is None and timed(1.0, [1.0]).rate() is None
    assert timed(2.0, [2.0, 3.0], ran_out=True).rate() is None


def test_meshes_that_are_compared(meshes, monkeypatch):
    row = preparation.compare(meshes, 32, "cpu")
    assert row["meshes"] == row["same_blocks"] == 2 and row["differing_share"] == 0
    assert "2 of 2 meshes" in preparation.describe(row)
    # Ten samples of the second mesh and the blocks of the first are others on the other device.
    original, calls = preparation.mesh_to_sdf_blocks, []

    def changed(mesh, *arguments, **options):
        blocks = original(mesh, *arguments, **options)
        calls.append(int((blocks.values.abs() < 1).sum()))
        if len(calls) == 2:
            blocks.coords[0] += 1
        if len(calls) == 4:
            blocks.values[0].view(-1)[:10] += 0.1
        return blocks

    monkeypatch.setattr(preparation, "mesh_to_sdf_blocks", changed)
    row = preparation.compare(meshes, 32, "cpu")
    assert (row["same_blocks"], row["differing_share"]) == (1, 10 / calls[2])


def test_table_of_rates():
    rates = [("cuda", 4, 20.0), ("cuda", 8, 30.0), ("cpu", 4, 5.0)]
    rows = [
        {"kind": "rate", "device": device, "resolution": 256, "workers": workers, "meshes_per_second": rate}
        for device, workers, rate in rates
    ]
    rows += [{"kind": "rate", "device": "cpu", "resolution": 512, "workers": 4, "error": "too slow"}]
    rows += [{"kind": "comparison", "resolution": 256, "meshes": 6, "same_blocks": 5, "differing_share": 0.0012}]
    lines = report_data.preparation_table({"rows": rows})
    assert [line.split(" | ")[1:] for line in lines[2:5]] == [
        ["GPU", "4", "20.0", "4.0 |"],
        ["GPU", "8", "30.0", "6.0 |"],
        ["CPU", "4", "5.0", "- |"],
    ]
    assert lines[7] == "" and "not measured" in lines[6]
    assert [line.split(" | ") for line in lines[10:13]] == [
        ["| 256^3", "one GPU, 4 processes", "50 s", "83 minutes", "5.8 days |"],
        ["| 256^3", "one GPU, 8 processes", "33 s", "56 minutes", "3.9 days |"],
        ["| 256^3", "4 CPU processes", "3.3 minutes", "5.6 hours", "23 days |"],
    ]
    assert lines[13] == "" and "5 of 6 meshes" in lines[14] and "0.12% of their" in lines[14] and len(lines) == 15


def test_times_are_in_units_that_suit_them():
    hour, day = 3600, 24 * 3600
    times = [0.44, 119, 120, 119 * 60, 2 * hour, 47 * hour, 2 * day, 700 * day, 3 * 365 * day]
    assert [report_data.duration_text(seconds) for seconds in times] == [
        *("0.4 s", "119 s", "2.0 minutes", "119 minutes", "2.0 hours"),
        *("47 hours", "2.0 days", "700 days", "3.0 years"),
    ]


def test_spheres_are_closed_and_differ(meshes):
    one, other = (trimesh.load_mesh(path) for path in sorted(meshes.glob("*.ply")))
    assert one.is_watertight and len(one.faces) == 80 and abs(one.vertices - other.vertices).max() > 0.01


def test_options():
    for wrong in (["--workers", "0"], ["--seconds", "0"], ["--seconds", "70"]):
        with pytest.raises(SystemExit):
            preparation.parse_args(wrong)
