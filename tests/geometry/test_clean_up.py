"""Tests of the clean-up of meshes, each step on shapes whose right result is known."""

import igl
import numpy as np
import pytest
import trimesh

from diffusers_sparse3d.geometry import clean_up
from diffusers_sparse3d.geometry.clean_up import (
    MeshCleanUp,
    fill_holes,
    remove_floaters,
    remove_inner_parts,
    simplify_mesh,
)
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf


def sphere(radius: float, center: tuple[float, float, float] = (0, 0, 0), inverted: bool = False) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(3, radius=radius).apply_translation(center)
    if inverted:
        mesh.invert()
    return mesh


def without(mesh: trimesh.Trimesh, faces: np.ndarray) -> trimesh.Trimesh:
    mesh.update_faces(~faces)
    mesh.remove_unreferenced_vertices()
    return mesh


def test_inner_parts_go():
    outer, beside = sphere(0.8), sphere(0.1, (0, 0, 0.9))
    cavity, island, deep = sphere(0.5, inverted=True), sphere(0.2), sphere(0.05, (0.6, 0, 0))
    # It lies in the bounding box of the large sphere, but outside the sphere.
    corner = sphere(0.1, (0.65, 0.65, 0.65))
    mesh = trimesh.util.concatenate([island, cavity, outer, beside, deep, corner])
    cleaned = remove_inner_parts(mesh)
    expected = trimesh.util.concatenate([outer, beside, corner])
    np.testing.assert_array_equal(cleaned.vertices, expected.vertices)
    np.testing.assert_array_equal(cleaned.triangles, expected.triangles)
    assert len(mesh.faces) == 6 * len(outer.faces)


def test_inner_parts_of_an_open_surface():
    outer = sphere(0.8)
    outer = without(outer, outer.triangles_center[:, 1] > 0.77)
    assert not outer.is_watertight
    cleaned = remove_inner_parts(trimesh.util.concatenate([outer, sphere(0.2)]))
    assert len(cleaned.faces) == len(outer.faces)


@pytest.mark.parametrize(("share", "is_inner"), [(0.65, True), (0.35, False)])
def test_more_than_half_of_the_view_must_be_closed(share, is_inner):
    # Both ends of the sphere are cut off. The winding number in its middle is the share of its area that is left.
    belt = sphere(0.8)
    belt = without(belt, np.abs(belt.triangles_center[:, 1]) > 0.8 * share)
    cleaned = remove_inner_parts(trimesh.util.concatenate([belt, sphere(0.05)]))
    assert (len(cleaned.faces) == len(belt.faces)) == is_inner


def test_what_sticks_out_is_no_inner_part():
    mesh = trimesh.util.concatenate([sphere(0.8), sphere(0.3, (0.7, 0, 0))])
    assert len(remove_inner_parts(mesh).faces) == len(mesh.faces)


def test_a_part_that_crosses_the_surface_is_no_inner_part():
    # It lies within the bounding box of the large sphere and has vertices inside and outside the sphere.
    crossing = sphere(0.2, (0.5, 0.5, 0.3))
    mesh = trimesh.util.concatenate([sphere(0.8), crossing])
    assert np.linalg.norm(crossing.vertices, axis=1).min() < 0.8 and np.abs(crossing.vertices).max() < 0.8
    assert len(remove_inner_parts(mesh).faces) == len(mesh.faces)


@pytest.mark.parametrize("turned", [False, True], ids=["as built", "turned"])
def test_floaters_are_smaller_than_a_twentieth_of_the_mesh(turned):
    # The longest side of the whole is 2; the longest sides of the small parts are just below and just above 0.1.
    large = trimesh.creation.box((2, 1, 1))
    below, above = (
        trimesh.creation.box((side, 0.01, 0.01)).apply_translation((0, 0.6 + side, 0)) for side in (0.098, 0.102)
    )
    mesh = trimesh.util.concatenate([below, large, above])
    if turned:
        mesh.vertices = mesh.vertices[:, [1, 2, 0]]
    kept = remove_floaters(mesh)
    expected = trimesh.util.concatenate([large, above])
    assert len(kept.faces) == len(expected.faces) and kept.area == pytest.approx(expected.area)


def test_floaters_go():
    large, small, tiny = sphere(0.5), sphere(0.1, (0.8, 0, 0)), sphere(0.02, (0, 0.8, 0))
    mesh = trimesh.util.concatenate([tiny, large, small])
    np.testing.assert_array_equal(remove_floaters(mesh).triangles, trimesh.util.concatenate([large, small]).triangles)
    np.testing.assert_array_equal(remove_floaters(mesh, min_size=0.3).triangles, large.triangles)
    assert len(remove_floaters(mesh, min_size=0).faces) == len(mesh.faces)
    # Of two small parts far apart the larger one is kept.
    mesh = trimesh.util.concatenate([sphere(0.02, (0.9, 0, 0)), sphere(0.03, (-0.9, 0, 0))])
    assert remove_floaters(mesh).bounds[1, 0] < 0
    with pytest.raises(ValueError, match="`min_size`"):
        remove_floaters(mesh, min_size=2)


def test_parts_of_mixed_order_with_vertices_that_no_face_has():
    """Against a search from vertex to vertex; the numbers of vertices and the order of faces say nothing of parts."""
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(6), [3, 8, 1, 5, 2, 11])
    vertices = generator.normal(size=(len(owners), 3))
    # A strip of triangles around the vertices of an owner, who needs three of them.
    strips = [np.flatnonzero(owners == owner) for owner in (0, 1, 3, 5)]
    faces = np.concatenate([np.stack([strip, np.roll(strip, 1), np.roll(strip, 2)], axis=1) for strip in strips])
    order = generator.permutation(len(owners))
    mesh = trimesh.Trimesh(vertices[np.argsort(order)], generator.permutation(order[faces]), process=False)
    owner_of = np.empty(len(owners), dtype=int)
    owner_of[order] = owners

    part, low, high = clean_up._parts(mesh)
    assert clean_up.count_bodies(mesh) == len(low) == len(high) == 4
    found = {int(number): owner_of[mesh.faces[part == number]] for number in range(4)}
    for number, own in found.items():
        assert len(set(own.reshape(-1).tolist())) == 1
        corners = mesh.vertices[np.unique(mesh.faces[part == number])]
        assert (low[number] == corners.min(axis=0)).all() and (high[number] == corners.max(axis=0)).all()
    kept = remove_floaters(mesh, 1.0)
    largest = np.argmax((high - low).max(axis=1))
    assert len(kept.faces) == (part == largest).sum() and len(kept.vertices) == len(
        np.unique(mesh.faces[part == largest])
    )
    assert (kept.triangles == mesh.triangles[part == largest]).all()


def test_holes_are_filled():
    mesh = sphere(1.0)
    center = mesh.triangles_center
    ring = np.abs(np.hypot(center[:, 0], center[:, 1]) - 0.5) < 0.15
    # The holes are one that is not convex, one at the other end, and a single triangle.
    cut = (center[:, 2] > 0.5) & ring & ~((center[:, 0] > 0) & (np.abs(center[:, 1]) < 0.3))
    cut |= center[:, 2] < -0.9
    cut[np.argmax(center[:, 0])] = True
    mesh = without(mesh, cut)
    filled = fill_holes(mesh)
    assert filled.is_watertight and filled.is_winding_consistent and not mesh.is_watertight
    assert filled.volume == pytest.approx(sphere(1.0).volume, rel=0.05)
    np.testing.assert_allclose(filled.vertices, mesh.vertices, atol=1e-7)
    partly = fill_holes(mesh, max_size=0.15)
    assert len(mesh.faces) < len(partly.faces) < len(filled.faces)
    closed = sphere(1.0)
    np.testing.assert_array_equal(fill_holes(closed).faces, closed.faces)


def test_size_of_a_hole_is_half_its_diagonal():
    # Round holes with radii of about 0.3 and 0.45, whose bounding boxes have half diagonals of 0.42 and 0.64.
    mesh = sphere(1.0)
    height = mesh.triangles_center[:, 1]
    mesh = without(mesh, (height > 0.955) | (height < -0.9))
    assert len(fill_holes(mesh, max_size=0.35).faces) == len(mesh.faces)
    partly, filled = fill_holes(mesh, max_size=0.55), fill_holes(mesh, max_size=0.8)
    assert len(mesh.faces) < len(partly.faces) < len(filled.faces)
    assert not partly.is_watertight and filled.is_watertight


@pytest.mark.parametrize("num_faces", [1280, 300, 40])
def test_simplify(num_faces):
    mesh = sphere(0.7)
    simple = simplify_mesh(mesh, num_faces)
    assert len(simple.faces) == num_faces and simple.is_watertight and len(mesh.faces) == 1280
    assert simple.volume == pytest.approx(mesh.volume, rel=0.2)
    squared_distance = igl.point_mesh_squared_distance(simple.vertices, mesh.vertices, mesh.faces)[0]
    assert squared_distance.max() < 0.01


def test_simplify_spends_faces_where_the_surface_bends():
    box = trimesh.creation.box((1, 2, 3)).subdivide().subdivide().subdivide()
    simple = simplify_mesh(box, 12)
    assert simple.volume == pytest.approx(6) and len(simple.faces) == 12


def test_simplify_keeps_a_generated_surface_closed():
    sdf = mesh_to_sparse_sdf(trimesh.creation.annulus(0.6, 1, 0.7), 64)
    mesh = sparse_sdf_to_mesh(sdf.feats, sdf.coords, 64)
    simple = simplify_mesh(mesh, 500)
    assert mesh.is_watertight and len(mesh.faces) > 20 * len(simple.faces)
    assert len(simple.faces) == 500 and simple.is_watertight and simple.euler_number == 0
    assert simple.volume == pytest.approx(mesh.volume, rel=5e-3)


def test_simplify_refuses_what_it_cannot_do():
    mesh = sphere(1)
    vertices = np.vstack([mesh.vertices, [[2, 2, 2]]])
    fin = [[*mesh.faces[0][:2], len(mesh.vertices)]]
    with pytest.raises(ValueError, match="`mesh`"):
        simplify_mesh(trimesh.Trimesh(vertices, np.vstack([mesh.faces, fin]), process=False), 100)


def test_all_in_order():
    outer = sphere(0.8)
    outer = without(outer, outer.triangles_center[:, 1] > 0.7)
    mesh = trimesh.util.concatenate([outer, sphere(0.2), sphere(0.01, (0, 0, 0.9))])
    cleaned = MeshCleanUp(remove_inner_parts=True, remove_floaters=True, fill_holes=True, num_faces=200)(mesh)
    assert cleaned.is_watertight and cleaned.body_count == 1 and len(cleaned.faces) == 200
    assert MeshCleanUp()(mesh) is mesh


def test_no_faces():
    empty = trimesh.Trimesh()
    for result in (remove_inner_parts(empty), remove_floaters(empty), fill_holes(empty), simplify_mesh(empty, 10)):
        assert len(result.faces) == 0


@pytest.mark.parametrize("num_faces", [3, 0, 10.5])
def test_bad_number_of_faces(num_faces):
    for call in (lambda: simplify_mesh(sphere(1), num_faces), lambda: MeshCleanUp(num_faces=num_faces)):
        with pytest.raises(ValueError, match="`num_faces`"):
            call()


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({"remove_inner_parts": True}, "igl"),
        ({"remove_floaters": True}, "scipy"),
        ({"fill_holes": True}, "pyvista"),
        ({"num_faces": 10}, "igl"),
    ],
)
def test_missing_library_is_said_beforehand(options, module, monkeypatch):
    monkeypatch.setattr("diffusers_sparse3d.geometry.clean_up.find_spec", lambda name: None if name == module else 1)
    with pytest.raises(ImportError, match=rf"`{next(iter(options))}` needs {module}.*\[mesh\]"):
        MeshCleanUp(**options)

    MeshCleanUp()
