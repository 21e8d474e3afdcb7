"""Silhouettes without a renderer, against those of the ray caster, and the search for the camera of a picture."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.render import MeshRenderer
from diffusers_sparse3d.geometry.silhouettes import View, best_view, frame_mask, silhouettes, surface_points


def chair() -> trimesh.Trimesh:
    """A chair with one arm, which no mirroring maps to itself; its back is at -z."""
    parts = {
        (1.0, 0.1, 1.0): [(0, 0, 0)],
        (1.0, 1.0, 0.1): [(0, 0.5, -0.45)],
        (0.1, 0.8, 0.1): [(x, -0.4, z) for x in (-0.45, 0.45) for z in (-0.45, 0.45)],
        (0.15, 0.15, 0.9): [(-0.45, 0.35, 0)],
    }
    boxes = [
        trimesh.creation.box(extents, trimesh.transformations.translation_matrix(place))
        for extents, places in parts.items()
        for place in places
    ]
    return trimesh.util.concatenate(boxes)


def rendered_mask(mesh: trimesh.Trimesh, view: View) -> np.ndarray:
    return np.asarray(MeshRenderer(mesh).render(*view, 128, crop=True, sky_rays=1))[..., 3] > 127


def iou(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first & second).sum() / (first | second).sum())


def test_masks_are_cropped_centred_and_scaled():
    mask = np.zeros((50, 90), dtype=bool)
    mask[30:40, 5:25] = True
    framed = frame_mask(mask, 16)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:12] = True
    assert torch.equal(framed, expected)
    assert torch.equal(frame_mask(np.kron(mask[25:, :30], np.ones((9, 9))), 16), expected)
    with pytest.raises(ValueError, match="`mask`"):
        frame_mask(np.zeros((4, 4)))


@pytest.mark.parametrize("view", [View(35, 20, 60), View(-120, -5, 25), View(80, 50, 100)])
def test_silhouettes_are_those_of_the_renderer(view):
    points, mask = surface_points(chair()), frame_mask(rendered_mask(chair(), view))
    mirrored = view._replace(azimuth=-view.azimuth)
    same, other = silhouettes(points, [view, mirrored])
    assert iou(same, mask) > 0.9
    assert iou(other, mask) < iou(same, mask) - 0.1


def test_the_perspective_is_that_of_the_renderer():
    points = surface_points(chair())
    near, far = View(35, 20, 18), View(35, 20, 200)
    for view in (near, far):
        mask = frame_mask(rendered_mask(chair(), view))
        found = [iou(silhouette, mask) for silhouette in silhouettes(points, [near, far])]
        assert found[view == near] < found[view == far] - 0.05


@pytest.mark.parametrize("view", [View(-41, 23, 50), View(160, 5, 90)])
def test_the_camera_of_a_picture_is_found(view):
    mask = frame_mask(rendered_mask(chair(), view))
    quality, found = best_view(surface_points(chair()), mask)
    assert quality > 0.9
    turn = (found.azimuth - view.azimuth + 180) % 360 - 180
    assert abs(turn) < 8 and abs(found.elevation - view.elevation) < 8
    # Within a limit that excludes it, the best is worse.
    assert view.azimuth != 160 or best_view(surface_points(chair()), mask, 45)[0] < quality - 0.1


def test_points_are_spread_by_area():
    box = trimesh.creation.box((2, 1, 0.5))
    box.vertices += 7
    points = surface_points(box, 4000).numpy()
    np.testing.assert_allclose([points.min(0), points.max(0)], [[-1, -0.5, -0.25], [1, 0.5, 0.25]], atol=1e-4)
    on_top = np.isclose(points[:, 2], 0.25, atol=1e-5).mean()
    assert on_top == pytest.approx(2 / 7, abs=0.01)
    left = points[np.isclose(points[:, 2], 0.25, atol=1e-5), 0] < 0
    assert left.mean() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="`mesh`"):
        surface_points(trimesh.Trimesh(np.zeros((3, 3)), [[0, 1, 2]]))
