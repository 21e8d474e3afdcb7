"""Reports of prints, on shapes whose figures are known."""

import re

import numpy as np
import pytest
import trimesh

from diffusers_sparse3d import cli
from diffusers_sparse3d.geometry.printing import prepare_for_printing, print_report, wall_thickness


def test_on_the_plate_in_millimetres():
    mesh = prepare_for_printing(trimesh.creation.box(extents=(2, 1, 0.5)).apply_translation((5, 6, 7)), 80)
    # y is up in the mesh, z on the printer.
    np.testing.assert_allclose(mesh.bounds, [[-40, -10, 0], [40, 10, 40]])
    assert mesh.volume > 0
    for size in (0, -1, np.nan):
        with pytest.raises(ValueError, match="`size`"):
            prepare_for_printing(mesh, size)


def test_a_cube():
    report = print_report(prepare_for_printing(trimesh.creation.box(), 20))
    assert report.watertight and report.consistent and report.parts == 1 and report.problems == []
    np.testing.assert_allclose([report.volume, report.area, report.thinnest_wall], [8, 24, 20], rtol=1e-3)
    assert report.overhang_share == 0 and "Nothing stands against" in str(report)


def test_walls_of_a_hollow_ball():
    outer, inner = trimesh.creation.icosphere(4, 10.0), trimesh.creation.icosphere(4, 9.0)
    inner.invert()
    ball = outer + inner
    np.testing.assert_allclose(np.median(wall_thickness(ball)), 1.0, atol=0.02)
    report = print_report(ball, min_wall=1.2)
    assert report.parts == 2 and report.thin_share > 0.99 and report.thinnest_wall == pytest.approx(1.0, abs=0.03)
    np.testing.assert_allclose(report.volume, 4 / 3 * np.pi * (1 - 0.729), rtol=0.01)
    assert any("1.2 mm" in problem for problem in report.problems)
    assert print_report(ball, min_wall=0.8).thin_share == 0


def test_what_is_inside_out_is_turned():
    ball = trimesh.creation.icosphere(3)
    expected = prepare_for_printing(ball)
    ball.invert()
    turned = prepare_for_printing(ball)
    assert turned.volume == pytest.approx(expected.volume) and turned.is_watertight and ball.volume < 0
    report = print_report(turned)
    assert report.problems == [] and report.thinnest_wall == pytest.approx(
        print_report(expected).thinnest_wall, rel=0.01
    )
    # The side of an open surface that is out is not known.
    ball.update_faces(np.arange(len(ball.faces)) > 0)
    np.testing.assert_array_equal(prepare_for_printing(ball).faces, ball.faces)


def test_a_surface_with_nothing_behind_it_is_a_problem():
    inverted = trimesh.creation.icosphere(3, 10.0)
    inverted.invert()
    sheet = trimesh.Trimesh([[0, 0, 0], [10, 0, 0], [0, 10, 0]], [[0, 1, 2]])
    for mesh in (inverted, sheet):
        report = print_report(mesh)
        assert report.thinnest_wall is None and report.thin_share is None
        assert any("inside out" in problem for problem in report.problems)
        assert "none found" in str(report) and "Nothing stands" not in str(report)


def test_a_table_needs_supports():
    top, leg = trimesh.creation.box((20, 20, 2)), trimesh.creation.box((2, 2, 10))
    top.apply_translation((0, 0, 11))
    leg.apply_translation((0, 0, 5))
    report = print_report(top + leg)
    # The underside of the top; the foot of the leg, alike in direction, is on the plate. The faces between count too.
    np.testing.assert_allclose(report.overhang_share, 400 / (2 * 400 + 4 * 40 + 2 * 4 + 4 * 20), rtol=1e-3)


def test_what_is_wrong_is_named():
    box = trimesh.creation.box((10, 10, 10))
    box.update_faces(np.arange(12) != 3)
    report = print_report(box)
    assert report.open_edges == 3 and not report.watertight and "3 edges" in report.problems[0]
    fan = trimesh.Trimesh([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [-1, 0, 0]], [[0, 1, 2], [0, 1, 3], [0, 1, 4]])
    assert print_report(fan).crowded_edges == 1
    with pytest.raises(ValueError, match="`min_wall`"):
        print_report(box, -1)


@pytest.mark.parametrize("suffix", ["3mf", "stl"])
def test_command(tmp_path, capsys, suffix):
    pytest.importorskip("lxml", reason="the extra `mesh` is missing")
    trimesh.creation.box(extents=(1, 3, 1)).export(tmp_path / "box.glb")
    output = tmp_path / f"box.{suffix}"
    assert cli.main(["print", str(tmp_path / "box.glb"), "-o", str(output), "--size", "60"]) == 0
    assert "20.0 x 20.0 x 60.0 mm" in capsys.readouterr().out
    mesh = trimesh.load(output, force="mesh")
    np.testing.assert_allclose(mesh.bounds, [[-10, -10, 0], [10, 10, 60]], atol=1e-4)
    assert cli.main(["print", str(tmp_path / "box.glb"), "-o", str(tmp_path / "box.obj")]) == 1


def test_command_on_a_file_without_shared_vertices_that_is_inside_out(tmp_path, capsys):
    ball = trimesh.creation.icosphere(2)
    ball.invert()
    ball.export(tmp_path / "ball.stl")
    output = tmp_path / "print.stl"
    assert cli.main(["print", str(tmp_path / "ball.stl"), "-o", str(output)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"watertight +yes\nparts +1\n", text) and "Nothing stands against" in text
    assert trimesh.load(output).volume > 0
