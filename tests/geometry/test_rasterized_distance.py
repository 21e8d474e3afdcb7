"""Tests of the narrow band by rasterised elements against the tree of libigl, its oracle."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.distance import SurfaceDistance
from diffusers_sparse3d.geometry.mesh import normalize_mesh
from diffusers_sparse3d.geometry.rasterized_distance import BandSamples, band_distance, closest_on_triangles
from diffusers_sparse3d.geometry.sdf import point_distance


def on_the_cpu(vertices: np.ndarray, elements: np.ndarray, resolution: int, reach: float) -> BandSamples:
    return band_distance(vertices, elements, resolution, reach, "cpu")


def turned(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh in the model cube, turned, so that no sample lies at exactly the reach."""
    mesh.apply_transform(trimesh.transformations.rotation_matrix(1.1, [0.1, 0.7, 0.4]))
    return normalize_mesh(mesh)[0]


def assert_same_band(
    vertices: np.ndarray,
    elements: np.ndarray,
    resolution: int,
    reach: float,
    function: Callable[[np.ndarray, np.ndarray, int, float], BandSamples] = on_the_cpu,
) -> None:
    bands = []
    found = function(vertices, elements, resolution, reach)
    for coords, distance, element, cell in (
        SurfaceDistance(vertices, elements).samples_within(resolution, reach),
        (tensor.cpu() for tensor in found),
    ):
        order = (coords.long() @ torch.tensor([resolution**2, resolution, 1])).argsort()
        bands.append((coords[order], distance[order], element[order], cell[order]))
    (coords, distance, _, _), (band_coords, band, element, cell) = bands
    torch.testing.assert_close(band_coords, coords, rtol=0, atol=0)
    torch.testing.assert_close(band, distance, rtol=0, atol=1e-8)
    # The distance to the returned element is the returned distance.
    points = band_coords.double() * (2 / (resolution - 1)) - 1
    corners = torch.from_numpy(vertices[elements])[element.long()]
    corners = corners if corners.shape[1] == 3 else corners[:, [0, 1, 1]]
    closest = closest_on_triangles(points, corners)
    torch.testing.assert_close((closest - points).norm(dim=1), band, rtol=0, atol=1e-6)
    # The cell holds the closest point of that element.
    place = (closest + 1) / 2 * (resolution - 1)
    inside = (cell - 1e-6 <= place) & (place <= cell + 1 + 1e-6)
    at_border = (place < 0) | (place > resolution - 1)
    assert (inside | at_border).all() and (cell >= 0).all() and (cell <= resolution - 2).all()


@pytest.mark.parametrize(
    "mesh",
    [
        trimesh.creation.box((1, 0.3, 0.02)),
        trimesh.creation.icosphere(2),
        trimesh.creation.cone(0.4, 1, sections=7),
        trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0.3, 2, 1]], [[0, 1, 2]], process=False),
    ],
    ids=["plate", "sphere", "cone", "triangle"],
)
def test_triangles(mesh):
    mesh = turned(mesh)
    assert_same_band(np.asarray(mesh.vertices), np.asarray(mesh.faces), 47, 0.07)


def test_segments():
    vertices = np.array([[-0.9, -0.5, 0.13], [0.4, 0.77, -0.2], [0.41, 0.8, 0.5]])
    assert_same_band(vertices, np.array([[0, 1], [1, 2]]), 47, 0.06)


def test_closest_point_by_minimisation():
    generator = torch.Generator().manual_seed(0)
    triangles = torch.randn(50, 3, 3, generator=generator, dtype=torch.float64)
    points = 2 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    steps = torch.linspace(0, 1, 201, dtype=torch.float64)
    u, v = torch.meshgrid(steps, steps, indexing="ij")
    u, v = u[u + v <= 1], v[u + v <= 1]
    weights = torch.stack([1 - u - v, u, v], dim=1)
    sampled = torch.einsum("sk,nkd->nsd", weights, triangles)
    nearest = (sampled - points[:, None]).norm(dim=2).amin(dim=1)
    exact = (closest_on_triangles(points, triangles) - points).norm(dim=1)
    assert (exact <= nearest + 1e-12).all()
    assert (exact >= nearest - 0.02).all()


@pytest.mark.parametrize("reach", [0.3, 1.0, 2.5, 9.0])
@pytest.mark.parametrize("num_points", [1, 200])
def test_points_against_the_tree(num_points, reach, monkeypatch):
    """Points anywhere in the cube and on its border, samples in clusters that many points are far from."""
    monkeypatch.setattr(point_distance, "CPU_PAIR_CHUNK", 1000)
    generator, resolution = torch.Generator().manual_seed(0), 40
    points = 2 * torch.rand(num_points, 3, generator=generator, dtype=torch.float64) - 1
    points[::3] = points[::3].round()
    coords = torch.cat([torch.randint(low, low + 7, (150, 3), generator=generator) for low in (0, 15, 33)])
    coords = coords.unique(dim=0)[torch.randperm(len(coords.unique(dim=0)), generator=generator)].int()
    spacing = 2 / (resolution - 1)
    arguments = (points, coords, resolution, reach * spacing)
    expected = point_distance.point_distance(*arguments)
    assert (
        expected.isfinite().any() == ((coords * spacing - 1)[:, None] - points).norm(dim=2).lt(reach * spacing).any()
    )
    torch.testing.assert_close(point_distance.rasterized_point_distance(*arguments), expected, rtol=1e-12, atol=1e-12)


def test_no_sample_lies_outside_the_grid():
    """A box that touches all faces of the cube, and a grid whose last blocks are not full."""
    mesh = trimesh.creation.box((2, 2, 2))
    assert_same_band(mesh.vertices, mesh.faces, 18, 0.3)
