"""The benchmark of the conversions between meshes and distance fields runs, at a tiny size."""

import json
import multiprocessing

import pytest

from benchmarks.geometry import main, parse_args
from benchmarks.report import SECTIONS


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("fork_server")
def test_every_step_is_in_the_report(tmp_path, monkeypatch):
    # Processes of their own, but forked from one that has imported what they need.
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", {"spawn": context}.get)
    main(parse_args(["--tiny", "--device", "cpu", "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["step"]: row for row in report["rows"]}
    on_cpu = ["mesh to SDF", "SDF to mesh", "sparse marching cubes", "scikit-image, dense"]
    assert list(rows) == [*on_cpu, "mesh to SDF, cpu", "SDF to mesh, cpu"]
    assert all(row["seconds"] > 0 for row in rows.values())
    for step, stages in (
        ("mesh to SDF, cpu", {"samples_within", "_signed_distance"}),
        ("SDF to mesh, cpu", {"from_rows", "_write_faces"}),
    ):
        assert stages <= set(rows[step]["stages"])
    # The same surface, up to the ambiguous cells.
    assert rows["SDF to mesh"]["faces"] == rows["SDF to mesh, cpu"]["faces"] == rows["sparse marching cubes"]["faces"]
    assert rows["scikit-image, dense"]["faces"] == pytest.approx(rows["SDF to mesh"]["faces"], rel=0.01)
    assert rows["mesh to SDF"]["process_mib"] > rows["mesh to SDF"]["mib"]
    _, _, line = SECTIONS["geometry"].render(report)
    assert f"{rows['mesh to SDF']['seconds']:.3f} / {rows['mesh to SDF']['mib']:,.0f}" in line
