"""Tests of the cells near a surface against the distance of every sample of the grid, by libigl."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.distance import SurfaceDistance
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import normalize_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf, narrow_band_width
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface


def brute_force(mesh: trimesh.Trimesh, resolution: int, cell_size: int, reach: float) -> torch.Tensor:
    axis = np.arange(resolution)
    samples = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    distance, _, _ = SurfaceDistance(mesh.vertices, mesh.faces).closest(samples * (2 / (resolution - 1)) - 1)
    return torch.from_numpy(np.unique(samples[distance < reach] // cell_size, axis=0).reshape(-1, 3)).int()


def turned(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    mesh.apply_transform(trimesh.transformations.rotation_matrix(1.1, [0.1, 0.7, 0.4]))
    return normalize_mesh(mesh)[0]


def first_stage() -> trimesh.Trimesh:
    """A surface of small triangles, as the first stage of the pipeline makes it by marching cubes."""
    sdf = mesh_to_sparse_sdf(trimesh.creation.torus(0.7, 0.2), 16)
    return normalize_mesh(sparse_sdf_to_mesh(sdf.feats, sdf.coords, 16))[0]


MESHES = {
    "marching cubes": first_stage,
    "sphere": lambda: trimesh.creation.icosphere(3, radius=0.95),
    "plate": lambda: turned(trimesh.creation.box((1, 0.7, 0.01))),
    "cone": lambda: turned(trimesh.creation.cone(0.4, 1, sections=7)),
    "triangle": lambda: trimesh.Trimesh([[-0.9, -0.8, 0.1], [0.9, 0.31, -0.7], [0.3, 0.9, 0.4]], [[0, 1, 2]]),
    "sliver": lambda: trimesh.Trimesh([[-0.9, -0.8, 0.1], [0.9, 0.31, -0.7], [0.9, 0.312, -0.7]], [[0, 1, 2]]),
    "flat triangles": lambda: trimesh.Trimesh(
        [[-0.3, 0.1, 0.2], [0.7, 0.2, 0.4], [0.2, 0.15, 0.3]], [[0, 1, 1], [2, 2, 2], [0, 1, 2]], process=False
    ),
    "border": lambda: trimesh.creation.box((2, 2, 2)),
    "half outside": lambda: trimesh.creation.icosphere(2).apply_translation([1, 0.2, -0.9]),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("resolution", "cell_size", "reach"), [(32, 8, None), (48, 8, 0.171), (40, 4, 0.02)])
def test_equals_brute_force(name, resolution, cell_size, reach):
    mesh = MESHES[name]()
    cells = cells_near_surface(mesh, resolution, cell_size, reach)
    expected = brute_force(mesh, resolution, cell_size, narrow_band_width(resolution) if reach is None else reach)
    assert len(expected) > 0
    assert cells.dtype == torch.int32 and torch.equal(cells, expected)


def test_corner_samples_decide():
    """The nearest sample of the cell is just inside the reach, or just outside."""
    resolution, spacing = 16, 2 / 15
    # The point, in grid spacings, lies beside the cell of samples 8 to 15, whose nearest sample is (8, 8, 8).
    point = np.array([6.9, 7.2, 7.7])
    distance = float(np.linalg.norm(8 - point))
    mesh = trimesh.Trimesh((point + np.eye(3) * 1e-9) * spacing - 1, [[0, 1, 2]], process=False)
    inside = cells_near_surface(mesh, resolution, 8, (distance + 1e-4) * spacing)
    outside = cells_near_surface(mesh, resolution, 8, (distance - 1e-4) * spacing)
    assert [1, 1, 1] in inside.tolist() and [1, 1, 1] not in outside.tolist()
    assert len(inside) == len(outside) + 1


def test_published_rule_and_the_cells_of_the_sparse_sdf():
    # The published 4/1024 of a unit cube is twice as much in model space, which is tau at 1024^3.
    assert narrow_band_width(1024) == pytest.approx(2 * 4 / 1024)
    # The cells of a closed surface are those that its narrow band touches, which the VAE encodes.
    mesh = MESHES["sphere"]()
    band = mesh_to_sparse_sdf(mesh, 64, normalize=False)
    expected = (band.coords[:, 1:] // 8).unique(dim=0)
    assert torch.equal(cells_near_surface(mesh, 64), expected)


def test_no_faces():
    for mesh in (trimesh.Trimesh(), trimesh.Trimesh([[0, 0, 0], [1, 0, 0]], np.empty((0, 3), int), process=False)):
        cells = cells_near_surface(mesh, 64)
        assert cells.shape == (0, 3) and cells.dtype == torch.int32


def test_vertices_without_a_face_do_not_count():
    mesh = trimesh.Trimesh([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [-0.9, -0.9, -0.9]], [[0, 1, 2]], process=False)
    assert [0, 0, 0] not in cells_near_surface(mesh, 64).tolist()


def test_bad_arguments_are_named():
    mesh = trimesh.creation.box()
    with pytest.raises(ValueError, match="`resolution`"):
        cells_near_surface(mesh, 65)
    with pytest.raises(ValueError, match="`reach`"):
        cells_near_surface(mesh, 64, reach=0)
    mesh.vertices[0] = np.nan
    with pytest.raises(ValueError, match="`mesh`"):
        cells_near_surface(mesh, 64)
