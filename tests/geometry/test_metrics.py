"""Tests of the metrics on shapes whose distances are known."""

import numpy as np
import pytest
import trimesh

from diffusers_sparse3d.geometry.metrics import (
    align_meshes,
    chamfer_distance,
    compare_surfaces,
    evaluate_mesh,
    f1_score,
    normal_consistency,
    volume_iou,
)


def moved(mesh: trimesh.Trimesh, offset: tuple[float, float, float]) -> trimesh.Trimesh:
    mesh = mesh.copy()
    mesh.apply_translation(offset)
    return mesh


def sheet(height: float = 0.0) -> trimesh.Trimesh:
    return trimesh.Trimesh(
        [[-1, height, -1], [1, height, -1], [1, height, 1], [-1, height, 1]], [[0, 2, 1], [0, 3, 2]], process=False
    )


def test_equal_meshes_are_at_distance_zero():
    mesh = trimesh.creation.icosphere(3)
    result = evaluate_mesh(mesh, mesh, num_samples=5000)
    assert result["chamfer_l1"] < 1e-9 and result["chamfer_l2"] < 1e-9
    assert result["f1_0.01"] == 1 and result["volume_iou"] == 1 and result["watertight"]
    assert result["normal_consistency"] > 0.999


def test_parallel_sheets():
    first, second = sheet(), sheet(0.03)
    assert chamfer_distance(first, second) == pytest.approx(0.03)
    assert chamfer_distance(first, second, squared=True) == pytest.approx(2 * 0.03**2)
    assert f1_score(first, second, (0.029, 0.031)) == {0.029: 0, 0.031: 1}
    assert normal_consistency(first, second) == pytest.approx(1)


def test_concentric_spheres():
    first, second = (trimesh.creation.icosphere(4, radius=radius) for radius in (0.8, 0.9))
    assert chamfer_distance(first, second, num_samples=20_000) == pytest.approx(0.1, abs=1e-3)
    assert volume_iou(first, second, num_samples=20_000) == pytest.approx((8 / 9) ** 3, abs=0.01)


def test_half_of_the_reference_is_missing():
    whole = trimesh.util.concatenate([moved(sheet(), (-2, 0, 0)), moved(sheet(), (2, 0, 0))])
    half = moved(sheet(), (2, 0, 0))
    # Precision is 1, recall 1/2.
    assert f1_score(half, whole, (0.01,))[0.01] == pytest.approx(2 / 3, abs=0.01)


def test_half_of_the_reference_by_hand():
    # The reference is 4 long, the prediction covers one half. Distances on the other half are uniform in [0, 2].
    half = sheet()
    whole = trimesh.util.concatenate([half, moved(sheet(), (2, 0, 0))])
    result = evaluate_mesh(half, whole, thresholds=(0.5,))
    assert result["chamfer_l1"] == pytest.approx((0 + 1 / 2) / 2, abs=5e-3)
    assert result["chamfer_l2"] == pytest.approx(0 + 4 / 3 / 2, abs=1e-2)
    # Precision is 1, recall 1/2 + 1/8.
    assert result["f1_0.5"] == pytest.approx(2 * 0.625 / 1.625, abs=5e-3)
    swapped = evaluate_mesh(whole, half, thresholds=(0.5,))
    for name in ("chamfer_l1", "chamfer_l2", "f1_0.5"):
        assert swapped[name] == pytest.approx(result[name], abs=1e-2)


def test_normals_of_perpendicular_sheets_disagree():
    upright = sheet()
    upright.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    assert normal_consistency(sheet(), upright) < 0.01


def test_faces_without_area_have_no_say_in_normals():
    """As closed meshes in float32 have them; a point may be as near to one as to the faces beside it."""
    box = trimesh.creation.box()
    # One on every edge.
    flat = np.concatenate([box.edges_unique, box.edges_unique[:, 1:]], axis=1)
    middle = len(box.vertices) + np.arange(len(flat))
    vertices = np.concatenate([box.vertices, box.vertices[box.edges_unique].mean(axis=1)])
    faces = np.concatenate([box.faces, np.stack([flat[:, 0], middle, flat[:, 1]], axis=1)])
    with_flat = trimesh.Trimesh(vertices, faces, process=False)
    moved = trimesh.Trimesh(box.vertices * 1.1, box.faces, process=False)
    found, expected = (compare_surfaces(moved, each, num_samples=2000) for each in (with_flat, box))
    assert found.normal_consistency() == pytest.approx(expected.normal_consistency(), abs=1e-3)


def test_orientation_does_not_count():
    mesh = trimesh.creation.box()
    flipped = mesh.copy()
    flipped.invert()
    assert normal_consistency(mesh, flipped) == pytest.approx(normal_consistency(mesh, mesh), abs=1e-9)


def test_point_to_point_has_a_floor():
    mesh = trimesh.creation.icosphere(4)
    floor = chamfer_distance(mesh, mesh, num_samples=20000, point_to_point=True)
    # The mean distance to the nearest of random points is 1 / (2 sqrt(density)).
    assert floor == pytest.approx(0.5 * (mesh.area / 20000) ** 0.5, rel=0.05)


def test_seeded():
    first, second = trimesh.creation.box(), trimesh.creation.icosphere(2)
    once, again, other = (
        compare_surfaces(first, second, num_samples=1000, seed=seed).prediction_distance for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_outer_surface_only():
    outer, inner = trimesh.creation.icosphere(3, radius=0.8), trimesh.creation.icosphere(3, radius=0.5)
    reference = trimesh.util.concatenate([outer, inner])
    assert f1_score(outer, reference, (0.01,), num_samples=10_000)[0.01] < 0.9
    assert f1_score(outer, reference, (0.01,), num_samples=10_000, outer_resolution=64)[0.01] > 0.999
    assert normal_consistency(outer, reference, num_samples=10_000, outer_resolution=64) > 0.999
    # A prediction with faces inside the solid loses precision.
    assert f1_score(reference, reference, (0.01,), num_samples=10_000, outer_resolution=64)[0.01] < 0.9


def test_volume_iou_of_overlapping_boxes():
    box = trimesh.creation.box((1, 1, 1))
    flipped = moved(box, (0.5, 0, 0))
    flipped.invert()
    assert volume_iou(box, flipped) == pytest.approx(1 / 3, abs=0.01)
    assert volume_iou(box, moved(box, (2, 0, 0))) == 0


def test_volume_needs_watertight_meshes():
    with pytest.raises(ValueError, match="`reference`"):
        volume_iou(trimesh.creation.box(), sheet())
    assert evaluate_mesh(trimesh.creation.box(), sheet(), num_samples=100)["volume_iou"] is None


@pytest.mark.parametrize("yaw", [0, 75, 270])
def test_alignment_finds_the_yaw_and_the_scale(yaw):
    chair = trimesh.util.concatenate(
        [trimesh.creation.box((1, 0.1, 0.8)), moved(trimesh.creation.box((0.1, 1, 0.8)), (0.5, 0.5, 0))]
    )
    turned = chair.copy()
    turned.apply_scale(7)
    turned.apply_transform(trimesh.transformations.rotation_matrix(-np.radians(yaw), [0, 1, 0]))
    prediction, reference, found = align_meshes(moved(turned, (3, 4, 5)), chair)
    assert found == yaw
    assert chamfer_distance(prediction, reference, num_samples=5000) < 1e-6
    np.testing.assert_allclose(reference.extents.max(), 1.9)


def test_alignment_counts_both_directions():
    # The reference has a large plate near one end of a bar, and a small one at the other. The small plate of the
    # prediction fits the small one exactly, but then nothing is near the large one.
    bar = trimesh.creation.box((2, 0.1, 0.1))
    large, small = trimesh.creation.box((0.02, 1.6, 1.6)), trimesh.creation.box((0.02, 0.8, 0.8))
    reference = trimesh.util.concatenate([bar, moved(large, (0.9, 0, 0)), moved(small, (-0.99, 0, 0))])
    prediction = trimesh.util.concatenate([bar, moved(small, (0.99, 0, 0))])
    assert align_meshes(prediction, reference)[2] == 0


@pytest.mark.parametrize("name", ["prediction", "reference"])
def test_empty_meshes_are_named(name):
    meshes = {"prediction": trimesh.creation.box(), "reference": trimesh.creation.box(), name: trimesh.Trimesh()}
    with pytest.raises(ValueError, match=f"`{name}`"):
        chamfer_distance(**meshes)
