"""Tests of the sparse SDF against analytic distances, and of its sign on meshes of every kind."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.distance import SurfaceDistance
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.rasterized_distance import band_distance
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks, mesh_to_sparse_sdf, narrow_band_width
from diffusers_sparse3d.geometry.sdf.block_grid import BlockGrid, _flood_by_labels, _flood_by_steps
from diffusers_sparse3d.geometry.sdf.narrow_band import SHELL_OFFSET, WIRE_OFFSET, _look_up
from diffusers_sparse3d.geometry.sdf.outer_surface import OuterSurface


RESOLUTION = 64
SPACING = 2 / (RESOLUTION - 1)
TAU = narrow_band_width(RESOLUTION)


def grid_points(resolution: int = RESOLUTION) -> np.ndarray:
    axis = -1 + 2 * np.arange(resolution) / (resolution - 1)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def box_distance(points: np.ndarray, half: np.ndarray) -> np.ndarray:
    offset = np.abs(points) - half
    return np.linalg.norm(offset.clip(0), axis=-1) + offset.max(axis=-1).clip(None, 0)


def rotation(seed: int = 0) -> np.ndarray:
    return trimesh.transformations.random_rotation_matrix(np.random.default_rng(seed).random(3))


def assert_matches(mesh: trimesh.Trimesh, expected: np.ndarray, atol: float) -> None:
    """Checks that the band has the expected samples and values, and the rest of its blocks the expected signs."""
    blocks = mesh_to_sdf_blocks(mesh, RESOLUTION, normalize=False)
    dense = np.full((RESOLUTION,) * 3, np.nan)
    for block, values in zip(blocks.coords.numpy() * 8, blocks.values.numpy()):
        dense[tuple(slice(start, start + 8) for start in block)] = values
    clear = np.abs(np.abs(expected) - TAU) > atol
    inside_band = (np.abs(expected) < TAU) & clear
    assert inside_band.sum() > 1000
    np.testing.assert_allclose(dense[inside_band] * TAU, expected[inside_band], atol=atol)
    outside_band = (np.abs(expected) > TAU) & clear & ~np.isnan(dense)
    np.testing.assert_array_equal(dense[outside_band], np.sign(expected[outside_band]))


def test_box_is_exact():
    half = np.array([0.83, 0.41, 0.27])
    assert_matches(trimesh.creation.box(2 * half), box_distance(grid_points(), half), atol=1e-6)


@pytest.mark.parametrize("block_size", [2, 4, 16])
def test_blocks_of_any_size_hold_the_same_band(block_size):
    mesh = trimesh.creation.icosphere(2, radius=0.7)
    expected = mesh_to_sdf_blocks(mesh, 32, normalize=False)
    blocks = mesh_to_sdf_blocks(mesh, 32, block_size, normalize=False)
    # No block is without a sample of the band.
    assert (blocks.values.abs() < 1).flatten(1).any(dim=1).all()
    bands = []
    for coords, values, _ in (expected.band(), blocks.band()):
        order = (coords.long() @ torch.tensor([32**2, 32, 1])).argsort()
        bands.append((coords[order], values[order]))
    assert torch.equal(bands[0][0], bands[1][0]) and torch.equal(bands[0][1], bands[1][1])
    for wrong in (1, 3, 0):
        with pytest.raises(ValueError, match="`block_size`"):
            mesh_to_sdf_blocks(mesh, 48, wrong, normalize=False)


def test_a_mesh_may_touch_the_faces_of_the_cube():
    band = mesh_to_sparse_sdf(trimesh.creation.box((2, 1, 1)), 32, normalize=False)
    assert band.coords[:, 1].min() == 0 and band.coords[:, 1].max() == 31
    with pytest.raises(ValueError, match="cube"):
        mesh_to_sparse_sdf(trimesh.creation.box((2.0001, 1, 1)), 32, normalize=False)


def test_turned_box_is_exact():
    half = np.array([0.6, 0.4, 0.3])
    mesh = trimesh.creation.box(2 * half)
    turn = rotation()
    mesh.apply_transform(turn)
    assert_matches(mesh, box_distance(grid_points() @ turn[:3, :3], half), atol=1e-6)


def test_ridge_between_two_samples_is_no_sheet():
    # A grid edge cuts the ridge off 0.3 spacings below its top, through two faces that are perpendicular.
    samples_up = 20.5
    height = (samples_up + 0.3) * SPACING
    half = np.array([height / 2**0.5, height / 2**0.5, 0.33])
    turn = trimesh.transformations.rotation_matrix(np.pi / 4, [0, 0, 1])
    mesh = trimesh.creation.box(2 * half).apply_transform(turn)
    assert_matches(mesh, box_distance(grid_points() @ turn[:3, :3], half), atol=1e-6)


def test_sphere():
    mesh = trimesh.creation.icosphere(5, radius=0.8)
    assert_matches(mesh, np.linalg.norm(grid_points(), axis=-1) - 0.8, atol=1e-3)


def test_torus():
    mesh = trimesh.creation.torus(0.6, 0.25, major_sections=192, minor_sections=96)
    points = grid_points()
    ring = np.linalg.norm(points[..., :2], axis=-1) - 0.6
    assert_matches(mesh, np.hypot(ring, points[..., 2]) - 0.25, atol=1e-3)


def test_orientation_does_not_matter():
    half = np.array([0.7, 0.5, 0.3])
    mesh = trimesh.creation.box(2 * half)
    mesh.faces[::3] = mesh.faces[::3, ::-1]
    assert_matches(mesh, box_distance(grid_points(), half), atol=1e-6)


def test_faces_inside_a_solid_are_no_surface():
    half = np.array([0.7, 0.5, 0.4])
    inner = trimesh.creation.box(1.9 * half)
    wall = trimesh.Trimesh([[0, -0.5, -0.4], [0, 0.5, -0.4], [0, 0.5, 0.4], [0, -0.5, 0.4]], [[0, 1, 2], [0, 2, 3]])
    mesh = trimesh.util.concatenate([trimesh.creation.box(2 * half), inner, wall])
    assert_matches(mesh, box_distance(grid_points(), half), atol=1e-6)


def test_overlapping_parts_become_their_union():
    first, second = np.array([0.8, 0.2, 0.2]), np.array([0.2, 0.8, 0.3])
    mesh = trimesh.util.concatenate([trimesh.creation.box(2 * first), trimesh.creation.box(2 * second)])
    union = np.minimum(box_distance(grid_points(), first), box_distance(grid_points(), second))
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False)
    expected = union[tuple(sdf.coords[:, 1:].T.numpy())]
    values = sdf.feats[:, 0].numpy() * TAU
    np.testing.assert_array_equal(np.sign(values), np.sign(expected))
    np.testing.assert_allclose(values[expected > 0], expected[expected > 0], atol=1e-6)
    # For samples inside, the outer surface is at least as far as the nearer box, but it may seem nearer at the seam.
    excess = values[expected < 0] - expected[expected < 0]
    assert excess.max() < SPACING and (excess > 1e-6).mean() < 0.02
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    assert result.is_watertight and result.body_count == 1


def test_crack_narrower_than_the_grid_is_closed():
    half = np.array([0.7, 0.5, 0.3])
    mesh = trimesh.creation.box(2 * half)
    corners = mesh.triangles.copy()
    # Every triangle shrinks a little, so that none is connected to another.
    corners += (corners.mean(axis=1, keepdims=True) - corners) * 0.01
    mesh = trimesh.Trimesh(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3), process=False)
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False)
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    assert result.is_watertight
    assert result.volume == pytest.approx(8 * half.prod(), rel=0.02)


@pytest.mark.parametrize("turned", [False, True], ids=["aligned", "turned"])
def test_open_sheet_becomes_a_closed_shell(turned):
    mesh = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    mesh.vertices *= 0.7
    if turned:
        mesh.apply_transform(rotation(3))
        mesh.vertices *= 0.8
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False)
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    assert result.is_watertight and result.body_count == 1 and result.euler_number == 2
    thickness = 2 * result.volume / result.area
    assert thickness == pytest.approx(2 * SHELL_OFFSET * SPACING, rel=0.15)


@pytest.mark.parametrize("seed", [2, 5, 8])
def test_wire_becomes_a_closed_tube(seed):
    # The wire is far thinner than a spacing and not parallel to an axis, so it passes between the samples.
    length, turn = 1.3, rotation(seed)[:3, :3]
    mesh = trimesh.creation.cylinder(0.02 * SPACING, length, sections=5)
    mesh.vertices = mesh.vertices @ turn.T
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False)
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    assert result.is_watertight and result.volume > 0
    # The surface is near every point of the wire; between samples the tube may be thin, or even interrupted.
    steps = np.linspace(-0.5, 0.5, 200)[:, None] * length
    distance, _, _ = SurfaceDistance(result.vertices, result.faces).closest(steps * turn[:, 2])
    assert distance.max() < WIRE_OFFSET * SPACING
    radius = np.linalg.norm(np.cross(result.vertices, turn[:, 2]), axis=1)
    assert radius.max() == pytest.approx(WIRE_OFFSET * SPACING, rel=0.05)


def test_thin_plate_keeps_its_area():
    mesh = trimesh.creation.box((1.2, 0.8, 0.2 * SPACING))
    mesh.apply_transform(rotation(5))
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False)
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    assert result.is_watertight and result.body_count == 1 and result.euler_number == 2
    assert result.area == pytest.approx(mesh.area, rel=0.1)


def test_open_box_is_a_shell_and_a_closed_one_is_solid():
    closed = trimesh.creation.box((1.2, 1.0, 0.8))
    open_box = trimesh.Trimesh(closed.vertices, closed.faces[closed.face_normals[:, 2] < 0.5])
    # Linear interpolation across the sheet takes up to half of the shell's thickness away.
    shell = 2 * SHELL_OFFSET * SPACING * open_box.area
    for mesh, low, high in ((closed, 0.955, 0.965), (open_box, 0.5 * shell, 1.05 * shell)):
        sdf = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False)
        result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
        assert result.is_watertight and result.body_count == 1
        assert low < result.volume < high


def test_scene_is_the_sum_of_its_parts():
    scene = trimesh.Scene()
    for offset in (-0.6, 0.6):
        ball = trimesh.creation.icosphere(3, radius=0.3)
        scene.add_geometry(ball, transform=trimesh.transformations.translation_matrix([offset, 0, 0]))
    sdf = mesh_to_sparse_sdf(scene, RESOLUTION, normalize=False)
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    assert result.body_count == 2 and result.is_watertight


def test_normalises_by_default():
    mesh = trimesh.creation.box((40, 20, 10))
    mesh.apply_translation([100, -3, 7])
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION)
    result = sparse_sdf_to_mesh(sdf.feats, sdf.coords, RESOLUTION)
    np.testing.assert_allclose(result.extents, [1.9, 0.95, 0.475], atol=1e-2)
    np.testing.assert_allclose(result.bounds.sum(axis=0), 0, atol=1e-3)


def test_sparse_sdf_is_the_band_of_the_blocks():
    mesh = trimesh.creation.icosphere(3)
    blocks = mesh_to_sdf_blocks(mesh, RESOLUTION)
    sdf, sharp = mesh_to_sparse_sdf(mesh, RESOLUTION, return_sharp=True)
    assert sdf.feats.dtype == torch.float32 and sdf.coords.dtype == torch.int32 and sharp.dtype == torch.bool
    assert blocks.coords.dtype == torch.int32 and blocks.values.dtype == torch.float32
    assert (sdf.feats.abs() < 1).all() and len(sdf.feats) == int((blocks.values.abs() < 1).sum())
    block, local = sdf.coords[:, 1:] // 8, sdf.coords[:, 1:] % 8
    row = {tuple(coords): index for index, coords in enumerate(blocks.coords.tolist())}
    rows = torch.tensor([row[tuple(coords)] for coords in block.tolist()])
    torch.testing.assert_close(blocks.values[(rows, *local.long().T)], sdf.feats[:, 0])
    keys = blocks.coords.long() @ torch.tensor([10000, 100, 1])
    assert (keys.diff() > 0).all()


def test_sharp_flags_follow_the_edges_of_a_box_and_not_of_a_sphere():
    half = np.array([0.7, 0.5, 0.4])
    sdf, sharp = mesh_to_sparse_sdf(trimesh.creation.box(2 * half), RESOLUTION, normalize=False, return_sharp=True)
    points = np.abs(grid_points()[tuple(sdf.coords[:, 1:].T.numpy())])
    # The distance to the nearest of the 12 edges has a part along the edge, beyond its end, and two across it.
    candidates = []
    for axis in range(3):
        offset = points - half
        offset[:, axis] = offset[:, axis].clip(0)
        candidates.append(np.linalg.norm(offset, axis=1))
    distance = np.min(candidates, axis=0)
    clear = np.abs(distance - TAU) > 1e-6
    np.testing.assert_array_equal(sharp.numpy()[clear], distance[clear] < TAU)
    assert not mesh_to_sparse_sdf(trimesh.creation.icosphere(4), RESOLUTION, return_sharp=True)[1].any()


def test_normalisation_centres_the_bounding_box():
    # Most vertices are at one end.
    knob = trimesh.creation.icosphere(3, radius=0.5).apply_translation([3.5, 0, 0])
    mesh = trimesh.util.concatenate([trimesh.creation.box((8, 1, 1)), knob])
    sdf = mesh_to_sparse_sdf(mesh, RESOLUTION)
    inside = sdf.coords[sdf.feats[:, 0] < 0, 1:].double() * SPACING - 1
    np.testing.assert_allclose(inside.amin(dim=0) + inside.amax(dim=0), 0, atol=1e-9)
    assert float(inside[:, 0].amax()) == pytest.approx(0.95, abs=SPACING)


@pytest.mark.parametrize(("angle", "is_sharp"), [(28, False), (32, True), (-28, False), (-32, True)])
def test_edges_are_sharp_above_thirty_degrees(angle, is_sharp):
    # The mesh is a roof whose ridge bends by the angle.
    slope = np.tan(np.radians(angle / 2))
    vertices = [[-0.9, 0.9 * -slope, -0.9], [-0.9, 0.9 * -slope, 0.9], [0, 0, -0.9], [0, 0, 0.9]]
    vertices += [[0.9, 0.9 * -slope, -0.9], [0.9, 0.9 * -slope, 0.9]]
    faces = [[0, 1, 2], [1, 3, 2], [2, 3, 4], [3, 4, 5]]
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    sdf, sharp = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=False, return_sharp=True)
    points = sdf.coords[:, 1:].double() * SPACING - 1
    middle = points[:, 2].abs() < 0.9 - TAU
    ridge = points[:, :2].norm(dim=1) < 0.9 * TAU
    assert int((middle & ridge).sum()) > 0
    assert (sharp[middle & ridge] == is_sharp).all()
    # The border of the sheet is sharp at every angle, and its faces are not.
    border = (points[:, 0].abs() - 0.9).abs() < 0.1 * TAU
    assert sharp[border & middle & (sdf.feats[:, 0] < 0)].all()
    assert not sharp[middle & (points[:, 0].abs() > 2 * TAU) & (points[:, 0].abs() < 0.9 - 2 * TAU)].any()


def test_vertices_are_welded_to_a_millionth():
    corners = np.array([[0.0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0.5, 0, 0], [0, 0.5, 0], [0.5, 0.5, 0]])
    for distance, count in ((1e-7, 4), (2e-5, 6)):
        moved = corners.copy()
        moved[3:, 2] += distance
        mesh = trimesh.Trimesh(moved, [[0, 1, 2], [4, 3, 5]], process=False)
        surface = OuterSurface(mesh, RESOLUTION)
        assert len(surface.vertices) == count and len(surface.faces) == 2
    # A face with two corners that are merged is dropped.
    mesh = trimesh.Trimesh(
        [[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [1e-7, 0.5, 0]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    assert len(OuterSurface(mesh, RESOLUTION).faces) == 1


def test_outer_surface_leaves_out_what_is_inside():
    outer, inner = trimesh.creation.icosphere(4, radius=0.8), trimesh.creation.icosphere(4, radius=0.5)
    surface = OuterSurface(trimesh.util.concatenate([outer, inner]), RESOLUTION)
    assert surface.contains(outer.triangles_center).all()
    assert not surface.contains(inner.triangles_center).any()


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_floods_agree(share):
    # Random walls: about two thirds of the samples must be free for a path through them.
    generator = torch.Generator().manual_seed(0)
    coords = 8 * (torch.rand((6, 6, 6), generator=generator) < 0.7).nonzero()
    grid = BlockGrid(coords, 48, 8)
    free = torch.rand(len(grid.blocks), 8, 8, 8, generator=generator) < share
    by_labels = _flood_by_labels(free.numpy(), grid.blocks.numpy(), grid.table.numpy())
    by_steps = _flood_by_steps(free, grid.blocks, grid.table)
    np.testing.assert_array_equal(by_steps.numpy(), by_labels)
    assert 0.05 < by_labels.mean() < share + 0.01


def test_distances_found_by_the_band_are_those_of_the_tree():
    # On a GPU distances come from the band. Samples that it lacks are too far to matter.
    mesh = trimesh.creation.icosphere(3, radius=0.6)
    surface = OuterSurface(mesh, RESOLUTION, 2 * TAU)
    rows = (~surface.outside[surface.slot]).nonzero()[:, 0]
    band = band_distance(surface.vertices, surface.faces, RESOLUTION, TAU, torch.device("cpu"))
    found, cell = _look_up(surface, rows, band)
    points = surface.coords[rows].numpy() * SPACING - 1
    expected, _, closest = SurfaceDistance(surface.vertices, surface.faces).closest(points)
    near = expected < TAU
    assert 0 < near.sum() < len(near)
    np.testing.assert_allclose(found.numpy()[near], expected[near], atol=1e-8)
    assert np.isinf(found.numpy()[~near]).all()
    # A closest point on the border of two cells may be in either.
    same = (cell.numpy() == surface.cells_of(closest).numpy()).all(axis=1)
    assert same[near].mean() > 0.95


def test_memory_follows_the_surface():
    mesh = trimesh.creation.icosphere(2)
    mesh.vertices *= 0.02
    # A dense float32 grid would take 512 MiB.
    blocks = mesh_to_sdf_blocks(mesh, 512, normalize=False)
    assert 0 < len(blocks.coords) < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 60}, "`resolution`"),
        ({"resolution": 8}, "`resolution`"),
        ({"resolution": 4096}, "`resolution`"),
        ({"resolution": 64, "block_size": 6}, "`block_size`"),
    ],
)
def test_bad_grid(arguments, message):
    with pytest.raises(ValueError, match=message):
        mesh_to_sdf_blocks(trimesh.creation.box(), **arguments)


def test_bad_mesh():
    broken = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [np.nan, 1, 0]], [[0, 1, 2]], process=False)
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    for mesh in (broken, flat, trimesh.Trimesh(), trimesh.Scene(), trimesh.PointCloud([[0, 0, 0]]), 3):
        with pytest.raises(ValueError, match="`mesh`"):
            mesh_to_sparse_sdf(mesh, RESOLUTION)
    with pytest.raises(ValueError, match="`mesh`"):
        mesh_to_sparse_sdf(trimesh.creation.box((3, 1, 1)), RESOLUTION, normalize=False)


def test_broken_faces_are_dropped():
    half = np.array([0.7, 0.5, 0.3])
    box = trimesh.creation.box(2 * half)
    vertices = np.concatenate([box.vertices, [[np.nan, 0, 0], [np.inf, 0, 0]]])
    faces = np.concatenate([box.faces, [[0, 1, 8], [0, 0, 1], [2, 9, 3]]])
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert_matches(mesh, box_distance(grid_points(), half), atol=1e-6)
