"""The benchmark of the preparation runs, at a tiny size, and counts the meshes of the time that it says."""

import json

import pytest
import trimesh

import preparation
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


def test_meshes_that_are_compared(meshes):
    row = preparation.compare(meshes, 32, "cpu")
    assert row["meshes"] == row["same_blocks"] == 2 and row["largest_difference"] == 0
    assert "2 of 2 meshes" in preparation.describe(row)


def test_spheres_are_closed_and_differ(meshes):
    one, other = (trimesh.load_mesh(path) for path in sorted(meshes.glob("*.ply")))
    assert one.is_watertight and len(one.faces) == 80 and abs(one.vertices - other.vertices).max() > 0.01


def test_options():
    for wrong in (["--workers", "0"], ["--seconds", "0"], ["--seconds", "70"]):
        with pytest.raises(SystemExit):
            preparation.parse_args(wrong)
