"""Tests of loading, normalising and exporting meshes."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.clean_up import count_bodies
from diffusers_sparse3d.geometry.mesh import export_mesh, load_mesh, normalize_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf


def test_load_concatenates_scenes_with_their_transforms(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([5, 0, 0]))
    scene.add_geometry(trimesh.creation.icosphere(1))
    scene.export(tmp_path / "scene.glb")
    for source in (scene, tmp_path / "scene.glb", str(tmp_path / "scene.glb")):
        mesh = load_mesh(source)
        assert isinstance(mesh, trimesh.Trimesh)
        assert len(mesh.faces) == 12 + 80
        np.testing.assert_allclose(mesh.bounds[1], [5.5, 1, 1], atol=1e-6)


def test_load_drops_broken_faces_and_leaves_the_input_alone():
    vertices = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [np.nan, 0, 0], [2, 0, 0]]
    source = trimesh.Trimesh(vertices, [[0, 1, 2], [0, 1, 3], [0, 1, 4], [2, 2, 1]], process=False)
    mesh = load_mesh(source)
    np.testing.assert_array_equal(mesh.triangles, [[[0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    assert len(source.faces) == 4


def test_load_welds_what_files_take_apart(tmp_path):
    ball = trimesh.creation.icosphere(2)
    soup = ball.copy()
    soup.unmerge_vertices()
    # -0.0 and 0.0 are one position.
    soup.vertices = np.where(
        (soup.vertices == 0) & (np.arange(len(soup.vertices))[:, None] % 2 == 0), -0.0, soup.vertices
    )
    soup.export(tmp_path / "soup.glb")
    for source in (soup, tmp_path / "soup.glb", export_mesh(ball, tmp_path / "ball.stl")):
        mesh = load_mesh(source)
        assert mesh.is_watertight and mesh.is_winding_consistent and count_bodies(mesh) == 1
        assert len(mesh.vertices) == len(ball.vertices) and len(mesh.faces) == len(ball.faces)
        # Faces and corners are in the order of the file.
        np.testing.assert_allclose(mesh.triangles, ball.triangles, atol=1e-6)
    assert len(soup.vertices) == 3 * len(ball.faces)


def test_load_welds_parts_of_a_scene_after_their_transforms():
    half = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    moved = trimesh.Trimesh([[1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    scene = trimesh.Scene([half])
    scene.add_geometry(
        moved.apply_translation([0, 0, -3]), transform=trimesh.transformations.translation_matrix([0, 0, 3])
    )
    mesh = load_mesh(scene)
    np.testing.assert_array_equal(mesh.vertices, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(mesh.faces, [[0, 1, 2], [1, 3, 2]])


def test_faces_of_two_corners_hide_no_open_edge():
    soup = trimesh.creation.box()
    soup.unmerge_vertices()
    lines = soup.edges_unique[:, [0, 1, 1]]
    mesh = load_mesh(trimesh.Trimesh(soup.vertices, np.vstack([soup.faces, lines]), process=False))
    assert mesh.is_watertight and len(mesh.vertices) == 8 and len(mesh.faces) == 12


def test_load_keeps_solids_that_touch_apart():
    mesh = load_mesh(trimesh.Scene([trimesh.creation.box(), trimesh.creation.box().apply_translation([1, 0, 0])]))
    assert mesh.is_watertight and count_bodies(mesh) == 2


def test_load_keeps_closed_surfaces_closed_that_rounding_collapses():
    ball = trimesh.creation.icosphere(2)
    vertices = ball.vertices.copy()
    # One edge collapses to a point, and the corners of another face are on a line.
    first, second = ball.edges_unique[7]
    vertices[second] = vertices[first]
    flat = ball.faces[np.flatnonzero(~np.isin(ball.faces, [first, second]).any(axis=1))[-1]]
    vertices[flat] = [[0.25, 0, 0], [0.5, 0, 0], [0.75, 0, 0]]
    source = trimesh.Trimesh(vertices, ball.faces, process=False)
    mesh = load_mesh(source)
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert len(mesh.vertices) == len(ball.vertices) - 1 and len(mesh.faces) == len(ball.faces) - 2
    assert (mesh.area_faces == 0).any()
    assert mesh.volume == pytest.approx(source.volume)


def test_faces_without_area_change_no_distance():
    # Halves of its sides are exact.
    box = trimesh.creation.box()
    first, second, third = box.faces[5]
    # Two triangles instead of one, whose new corner is on a side of the face beside it.
    vertices = np.vstack([box.vertices, (box.vertices[[first]] + box.vertices[[second]]) / 2])
    split = [[first, len(box.vertices), third], [len(box.vertices), second, third]]
    faces = np.vstack([np.delete(box.faces, 5, axis=0), split])
    sliver = [[first, second, len(box.vertices)]]
    meshes = [trimesh.Trimesh(vertices, rows, process=False) for rows in (faces, np.vstack([faces, sliver]))]
    assert not meshes[0].is_watertight and load_mesh(meshes[1]).is_watertight
    without, with_sliver = (mesh_to_sparse_sdf(mesh, 16) for mesh in meshes)
    assert torch.equal(without.coords, with_sliver.coords) and torch.equal(without.feats, with_sliver.feats)


def test_load_refuses_faces_of_vertices_that_do_not_exist():
    with pytest.raises(ValueError, match="`mesh`"):
        load_mesh(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2], [0, 1, 3]], process=False))


@pytest.mark.parametrize("source", [trimesh.Trimesh(), trimesh.Scene(), trimesh.PointCloud([[0, 0, 0]]), None])
def test_load_refuses_what_has_no_surface(source):
    with pytest.raises(ValueError, match="`mesh`"):
        load_mesh(source)


def test_normalize():
    mesh = trimesh.creation.box((4, 2, 1))
    mesh.apply_translation([10, 20, 30])
    normalized, center, scale = normalize_mesh(mesh)
    np.testing.assert_allclose(normalized.bounds, [[-0.95, -0.475, -0.2375], [0.95, 0.475, 0.2375]])
    np.testing.assert_allclose(normalized.vertices / scale + center, mesh.vertices)
    np.testing.assert_allclose(mesh.bounds[0], [8, 19, 29.5])


def lopsided() -> trimesh.Trimesh:
    """A mesh with most of its vertices at one end, whose mean is far from the centre of its bounding box."""
    knob = trimesh.creation.icosphere(3, radius=0.5).apply_translation([3.5, 0, 0])
    return trimesh.util.concatenate([trimesh.creation.box((8, 1, 1)), knob])


def test_normalize_centres_the_bounding_box():
    mesh = lopsided().apply_translation([10, 20, 30])
    assert np.abs(mesh.vertices.mean(axis=0) - mesh.bounds.mean(axis=0)).max() > 2
    normalized, center, scale = normalize_mesh(mesh)
    np.testing.assert_allclose(center, [10, 20, 30], atol=1e-12)
    assert scale == pytest.approx(1.9 / 8)
    np.testing.assert_allclose(normalized.bounds, np.outer([-1, 1], [0.95, 0.95 / 8, 0.95 / 8]), atol=1e-12)


def test_normalize_refuses_points():
    with pytest.raises(ValueError, match="`mesh`"):
        normalize_mesh(trimesh.Trimesh([[1, 1, 1]] * 3, [[0, 1, 2]], process=False))
    with pytest.raises(ValueError, match="`mesh`"):
        normalize_mesh(trimesh.Trimesh())


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".stl", ".ply", ".GLB"])
def test_export_round_trip(tmp_path, suffix):
    mesh = trimesh.creation.icosphere(2)
    mesh.apply_scale([1, 2, 3])
    path = export_mesh(mesh, tmp_path / "new" / f"mesh{suffix}")
    loaded = trimesh.load_mesh(path)
    assert len(loaded.faces) == len(mesh.faces)
    np.testing.assert_allclose(loaded.bounds, mesh.bounds, atol=1e-5)
    assert loaded.volume == pytest.approx(mesh.volume, rel=1e-4)


def test_export_writes_normals(tmp_path):
    mesh = trimesh.creation.icosphere(1)
    assert b"NORMAL" in export_mesh(mesh, tmp_path / "mesh.glb").read_bytes()
    assert b"\nvn " in export_mesh(mesh, tmp_path / "mesh.obj").read_bytes()
    assert b"property float nx" in export_mesh(mesh, tmp_path / "mesh.ply").read_bytes()


def test_export_z_up(tmp_path):
    mesh = trimesh.creation.box((1, 2, 3)).apply_translation([0, 5, 0])
    loaded = trimesh.load_mesh(export_mesh(mesh, tmp_path / "mesh.stl", up_axis="z"))
    np.testing.assert_allclose(loaded.bounds, [[-0.5, -1.5, 4], [0.5, 1.5, 6]], atol=1e-6)
    assert loaded.volume == pytest.approx(6) and mesh.bounds[1, 1] == 6
    with pytest.raises(ValueError, match="`up_axis`"):
        export_mesh(mesh, tmp_path / "mesh.stl", up_axis="x")


def test_export_refuses_other_formats(tmp_path):
    with pytest.raises(ValueError, match="`path`"):
        export_mesh(trimesh.creation.box(), tmp_path / "mesh.docx")


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_scale_of_an_export_is_positive_and_finite(tmp_path, scale):
    with pytest.raises(ValueError, match="`scale`"):
        export_mesh(trimesh.creation.box(), tmp_path / "box.stl", scale=scale)
    assert list(tmp_path.iterdir()) == []
