"""The kernels of the narrow band against the tree of libigl, the oracle: in Triton's interpreter, or on a GPU."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry import rasterized_distance
from diffusers_sparse3d.geometry.distance import SurfaceDistance
from diffusers_sparse3d.geometry.kernels import band_distance as kernels
from diffusers_sparse3d.geometry.mesh import normalize_mesh
from diffusers_sparse3d.geometry.rasterized_distance import BandSamples
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks
from diffusers_sparse3d.ops.runtime import runtime_settings
from tests.geometry.test_rasterized_distance import assert_same_band, turned
from tests.ops.kernel_testing import DEVICE, NATIVE, needs_gpu


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    monkeypatch.setattr(rasterized_distance, "runs_kernels", lambda tensor: True)


def band(vertices: np.ndarray, elements: np.ndarray, resolution: int, reach: float) -> BandSamples:
    return rasterized_distance.band_distance(vertices, elements, resolution, reach, DEVICE)


# One without an area, and one that is nearly so.
SLIVERS = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0], [0.3, 2, 1e-9]], [[0, 1, 2], [0, 1, 3]], process=False)


@pytest.mark.parametrize(
    ("mesh", "resolution", "reach"),
    [
        (trimesh.creation.box((1, 0.3, 0.02)), 21, 0.19),
        (trimesh.creation.icosphere(1), 17, 0.2),
        # Its triangles span many tiles.
        (trimesh.creation.cone(0.4, 1, sections=3), 30, 0.12),
        (SLIVERS, 19, 0.1),
    ],
    ids=["plate", "sphere", "cone", "slivers"],
)
def test_triangles(mesh, resolution, reach):
    mesh = turned(mesh)
    assert_same_band(np.asarray(mesh.vertices), np.asarray(mesh.faces), resolution, reach, band)


def test_segments():
    vertices = np.array([[-0.9, -0.5, 0.13], [0.4, 0.77, -0.2], [0.41, 0.8, 0.5]])
    assert_same_band(vertices, np.array([[0, 1], [1, 2]]), 22, 0.11, band)


def test_no_sample_lies_outside_the_grid():
    """A box that touches all faces of the cube, and a grid whose last tiles are not full."""
    mesh = trimesh.creation.box((2, 2, 2))
    assert_same_band(mesh.vertices, mesh.faces, 10, 0.3, band)


def test_passes_of_few_pairs_give_the_same(monkeypatch):
    """Passes begin and end amid the tiles of a triangle."""
    mesh = turned(trimesh.creation.cone(0.4, 1, sections=3))
    arguments = (np.asarray(mesh.vertices), np.asarray(mesh.faces), 23, 0.15)
    expected = band(*arguments)
    launches = []
    original = kernels._list_kernel._launch
    monkeypatch.setattr(kernels._list_kernel, "_launch", lambda *given: launches.append(1) or original(*given))
    monkeypatch.setattr(kernels, "PAIR_CHUNK", 150)
    for one, other in zip(band(*arguments), expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(launches) > 2


def test_of_equally_near_triangles_the_first_counts():
    corners = np.array([[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.0, 0.5, 0.0]])
    found = band(corners, np.array([[0, 1, 2], [1, 2, 0], [2, 1, 0]]), 11, 0.3)
    assert len(found.coords) and (found.element == 0).all()


def test_without_elements():
    found = band(np.zeros((1, 3)), np.zeros((0, 3), dtype=np.int64), 12, 0.3)
    assert [tuple(field.shape) for field in found] == [(0, 3), (0,), (0,), (0, 3)]


def test_triangles_that_no_sample_is_near():
    corners = np.array([[3.0, 3.0, 3.0], [3.1, 3.0, 3.0], [3.0, 3.1, 3.0]])
    assert len(band(corners, np.array([[0, 1, 2]]), 12, 0.3).coords) == 0


@needs_gpu
@pytest.mark.parametrize("resolution", [256, 512])
def test_the_distances_of_a_large_mesh(resolution, monkeypatch):
    """Kernels, plain PyTorch and the tree."""
    monkeypatch.undo()
    mesh = turned(trimesh.creation.icosphere(6))
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    assert_same_band(vertices, faces, resolution, 5 / resolution, band)
    with runtime_settings(kernels=False):
        assert_same_band(vertices, faces, resolution, 5 / resolution, band)


@needs_gpu
def test_blocks_are_those_of_the_cpu(monkeypatch):
    monkeypatch.undo()
    mesh = normalize_mesh(turned(trimesh.creation.annulus(0.4, 0.5, 0.6, sections=31)))[0]
    blocks, expected = (mesh_to_sdf_blocks(mesh, 128, device=device) for device in ("cuda", "cpu"))
    torch.testing.assert_close(blocks.coords, expected.coords, rtol=0, atol=0)
    torch.testing.assert_close(blocks.values, expected.values, rtol=0, atol=1e-6)
    assert SurfaceDistance(mesh.vertices, mesh.faces, "cuda").samples_within(128, 0.1).coords.is_cuda and NATIVE
