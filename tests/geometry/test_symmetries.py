"""Metamorphic tests: the mesh or the field is turned, mirrored, scaled, moved or reordered, and the result follows."""

import itertools

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

from diffusers_sparse3d.geometry.marching_cubes import sparse_marching_cubes
from diffusers_sparse3d.geometry.mesh import normalize_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface


RESOLUTION = 48
SPACING = 2 / (RESOLUTION - 1)
# Signed permutations of the axes: quarter turns about each axis, mirrors, and exchanges of axes.
SYMMETRIES = {
    "turn about x": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    "turn about y": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    "turn about z": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    "mirror x": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "mirror all": [[-1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "exchange": [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
}


def lopsided_mesh() -> trimesh.Trimesh:
    """A solid, an open sheet, and a box that overlaps the solid, none of them symmetric to any axis."""
    solid = trimesh.creation.icosphere(2, radius=0.5)
    solid.vertices *= 1 + 0.2 * np.sin(5 * solid.vertices @ [1.0, 0.7, -0.4])[:, None]
    box = trimesh.creation.box((0.9, 0.21, 0.33))
    box.apply_transform(trimesh.transformations.rotation_matrix(0.6, [0.3, 1, 0.2], [0.1, 0, 0]))
    sheet = trimesh.Trimesh([[-0.83, 0.61, -0.57], [0.71, 0.67, -0.6], [0.2, 0.9, 0.78]], [[0, 1, 2]])
    return normalize_mesh(trimesh.util.concatenate([solid, box, sheet]))[0]


def sorted_sdf(mesh: trimesh.Trimesh, normalize: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coordinates in ascending order, values and sharp flags."""
    sdf, sharp = mesh_to_sparse_sdf(mesh, RESOLUTION, normalize=normalize, return_sharp=True)
    return sort_rows(sdf.coords[:, 1:], sdf.feats[:, 0], sharp)


def sort_rows(coords: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    order = (coords.long() @ torch.tensor([RESOLUTION**2, RESOLUTION, 1])).argsort()
    return coords[order], *(other[order] for other in others)


def assert_same_sdf(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert torch.equal(found[2], expected[2])
    assert 0 < int(expected[2].sum()) < len(expected[2])


def move_coords(coords: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Grid coordinates under a signed permutation of the axes of the model cube."""
    centered = 2 * coords.long() - (RESOLUTION - 1)
    return ((centered @ matrix.T + RESOLUTION - 1) // 2).to(coords.dtype)


@pytest.mark.parametrize("name", SYMMETRIES)
def test_sdf_turns_with_the_mesh(name):
    matrix = torch.tensor(SYMMETRIES[name])
    mesh = lopsided_mesh()
    coords, values, sharp = sorted_sdf(mesh)
    mesh.vertices = mesh.vertices @ matrix.numpy().T
    assert_same_sdf(sorted_sdf(mesh), sort_rows(move_coords(coords, matrix), values, sharp))


def test_sdf_is_that_of_the_normalised_mesh():
    mesh = lopsided_mesh()
    expected = sorted_sdf(mesh)
    mesh.vertices = 13 * mesh.vertices + [5.0, -70.0, 0.3]
    assert_same_sdf(sorted_sdf(mesh, normalize=True), expected)


def test_sdf_does_not_depend_on_the_order_of_vertices_faces_and_corners():
    mesh = lopsided_mesh()
    # Vertices are welded by rounding: they stay away from where it changes.
    mesh.vertices = np.rint((mesh.vertices + 1) * 1e6) / 1e6 - 1
    expected = sorted_sdf(mesh)
    generator = np.random.default_rng(0)
    place = generator.permutation(len(mesh.vertices))
    vertices = np.empty_like(mesh.vertices)
    vertices[place] = mesh.vertices
    faces = generator.permutation(place[mesh.faces])
    shuffled = np.stack([generator.permutation(face) for face in faces])
    assert_same_sdf(sorted_sdf(trimesh.Trimesh(vertices, shuffled, process=False)), expected)
    # A triangle soup, whose corners agree up to rounding: it is welded.
    corners = vertices[shuffled].reshape(-1, 3)
    corners += generator.uniform(-1e-9, 1e-9, corners.shape)
    soup = trimesh.Trimesh(corners, np.arange(len(corners)).reshape(-1, 3), process=False)
    assert_same_sdf(sorted_sdf(soup), expected)


@pytest.mark.parametrize("name", SYMMETRIES)
def test_cells_turn_with_the_mesh(name):
    matrix = torch.tensor(SYMMETRIES[name])
    mesh = lopsided_mesh()
    cells = cells_near_surface(mesh, 8 * RESOLUTION)
    mesh.vertices = mesh.vertices @ matrix.numpy().T
    assert torch.equal(
        *(sort_rows(each)[0] for each in (cells_near_surface(mesh, 8 * RESOLUTION), move_coords(cells, matrix)))
    )


def field(torn: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A lopsided narrow band: values `[N]`, coords `[N, 3]`. Torn, a tenth of the samples and a slab are missing."""
    axis = torch.linspace(-1, 1, RESOLUTION, dtype=torch.float64)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = torch.hypot(torch.hypot(x - 0.04, 1.1 * y) - 0.55, z + 0.13 * x - 0.03) - 0.21
    values = (distance / (2 * SPACING)).float()
    kept = values.abs() < 1
    if torn:
        kept &= torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) < 0.9
        kept[:, 20:23, 9:] = False
    return values[kept], kept.nonzero()


def assert_same_points(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each point has another one within a thousandth of a spacing, in both directions."""
    assert len(found) == len(expected)
    for first, second in ((found, expected), (expected, found)):
        assert cKDTree(first.numpy()).query(second.numpy())[0].max() < 1e-3 * SPACING


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("name", SYMMETRIES)
def test_surface_turns_with_the_field(name, torn):
    matrix = torch.tensor(SYMMETRIES[name])
    values, coords = field(torn)
    vertices, faces = sparse_marching_cubes(values, coords, RESOLUTION, 0.1)
    moved, moved_faces = sparse_marching_cubes(values, move_coords(coords, matrix), RESOLUTION, 0.1)
    assert_same_points(moved, vertices @ matrix.T.float())
    before, after = (
        trimesh.Trimesh(points.numpy(), triangles.numpy(), process=False)
        for points, triangles in ((vertices, faces), (moved, moved_faces))
    )
    # The same loops of vertices are cut into triangles by other diagonals.
    assert len(faces) == len(moved_faces) and after.is_watertight and after.euler_number == before.euler_number
    assert after.volume == pytest.approx(before.volume, rel=1e-3)
    assert after.area == pytest.approx(before.area, rel=1e-3)


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("shift", [(8, 0, -8), (1, -3, 5)], ids=["by blocks", "by samples"])
def test_surface_moves_with_the_field(shift, torn):
    values, coords = field(torn)
    # A larger grid, so that no border is near.
    resolution, offset = 2 * RESOLUTION, RESOLUTION // 2
    spacing = 2 / (resolution - 1)
    (vertices, faces), (moved, moved_faces) = (
        sparse_marching_cubes(values, coords + offset + torch.tensor(by), resolution) for by in ((0, 0, 0), shift)
    )
    difference = (moved.double() - vertices.double().mean(dim=0)).mean(dim=0) / spacing
    torch.testing.assert_close(difference, torch.tensor(shift, dtype=torch.float64), rtol=0, atol=0.02)
    assert len(moved) == len(vertices) and len(moved_faces) == len(faces)
    if not torn:
        torch.testing.assert_close(difference, torch.tensor(shift, dtype=torch.float64), rtol=0, atol=1e-4)


def test_surface_follows_values_and_level():
    values, coords = field(torn=False)
    expected = sparse_marching_cubes(values, coords, RESOLUTION, 0.125)
    # Exact in binary, so the results are equal bit by bit.
    for scale, level in itertools.product((0.5, 4.0), (0.0, 0.125)):
        result = sparse_marching_cubes(scale * (values.double() - 0.125 + level), coords, RESOLUTION, scale * level)
        for found, wanted in zip(result, expected):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
