"""Tests of sparse marching cubes: against scikit-image on the dense grid, and with samples cut off or missing."""

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

import diffusers_sparse3d.geometry.marching_cubes.crossed_cells as crossed_cells
import diffusers_sparse3d.geometry.marching_cubes.sample_bits as sample_bits
import diffusers_sparse3d.geometry.marching_cubes.sparse_samples as sparse_samples
import diffusers_sparse3d.geometry.marching_cubes.surface_completion as surface_completion
from diffusers_sparse3d.geometry.marching_cubes import sparse_marching_cubes, sparse_sdf_to_mesh


RESOLUTION = 64
SPACING = 2 / (RESOLUTION - 1)
TAU = 2 * SPACING


def grid_points(resolution: int = RESOLUTION) -> torch.Tensor:
    axis = -1 + 2 * torch.arange(resolution, dtype=torch.float64) / (resolution - 1)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def sphere(points: torch.Tensor, radius: float = 0.71, center: tuple[float, ...] = (0.013, -0.021, 0.034)):
    return (points - torch.tensor(center, dtype=points.dtype)).norm(dim=-1) - radius


def torus(points: torch.Tensor):
    ring = points[..., :2].norm(dim=-1) - 0.57
    return torch.hypot(ring, points[..., 2] - 0.011) - 0.23


def two_spheres(points: torch.Tensor):
    return torch.minimum(sphere(points, 0.31, (-0.51, 0.0, 0.01)), sphere(points, 0.37, (0.43, 0.02, 0.0)))


def gyroid_ball(points: torch.Tensor):
    x, y, z = (7 * points).unbind(-1)
    gyroid = (x.sin() * y.cos() + y.sin() * z.cos() + z.sin() * x.cos()) / 7
    return torch.maximum(gyroid.abs() - 0.06, sphere(points, 0.83))


def to_band(distance: torch.Tensor, tau: float = TAU) -> tuple[torch.Tensor, torch.Tensor]:
    """The narrow band of a dense field: feats `[N, 1]` and coords `[N, 4]`."""
    values = (distance / tau).float()
    coords = (values.abs() < 1).nonzero()
    feats = values[tuple(coords.T)].unsqueeze(1)
    return feats, torch.nn.functional.pad(coords, (1, 0)).int()


def on_grid_edges(vertices: np.ndarray) -> np.ndarray:
    """The vertices on edges of the grid, of which two grid coordinates are whole numbers."""
    grid = (vertices + 1) / SPACING
    return vertices[(np.abs(grid - grid.round()) < 1e-3).sum(axis=1) >= 2]


@pytest.mark.parametrize("level", [0.0, 0.2])
@pytest.mark.parametrize("shape", [sphere, torus, two_spheres, gyroid_ball])
def test_equals_dense_marching_cubes(shape, level):
    distance = shape(grid_points())
    mesh = sparse_sdf_to_mesh(*to_band(distance), RESOLUTION, level=level)
    volume = (distance / TAU).clamp(-1, 1).float().numpy()
    vertices, faces, _, _ = marching_cubes(volume, level)
    expected = trimesh.Trimesh(vertices * SPACING - 1, faces, process=False)

    # Both implementations give a few ambiguous cells a vertex inside; all other vertices lie on edges of the grid.
    ours, theirs = on_grid_edges(mesh.vertices), on_grid_edges(expected.vertices)
    assert len(ours) == len(theirs) > 0.998 * len(mesh.vertices)
    distances, match = cKDTree(ours).query(theirs)
    assert distances.max() < 1e-5 and len(np.unique(match)) == len(match)
    assert mesh.euler_number == expected.euler_number
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume > 0
    assert mesh.volume == pytest.approx(abs(expected.volume), rel=2e-3)


def test_random_field_is_a_closed_manifold():
    # Random signs produce nearly every cell configuration, those with ambiguous faces included.
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(40, 40, 40, generator=generator) * 2 - 1
    coords = torch.nn.functional.pad(torch.ones_like(values).nonzero(), (1, 0)).int()
    mesh = sparse_sdf_to_mesh(values.reshape(-1, 1), coords, 40)
    assert mesh.is_watertight and mesh.is_winding_consistent
    _, counts = np.unique(mesh.edges_sorted, axis=0, return_counts=True)
    assert (counts == 2).all()
    assert mesh.volume > 0


def test_vertices_inside_cells_are_in_the_middle_of_their_neighbours():
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(24, 24, 24, generator=generator) * 2 - 1
    mesh = sparse_sdf_to_mesh(values.reshape(-1, 1), torch.ones_like(values).nonzero(), 24)
    grid = (mesh.vertices + 1) * 23 / 2
    # On an edge of the grid two coordinates are whole numbers.
    inner = np.flatnonzero((np.abs(grid - grid.round()) < 1e-5).sum(axis=1) < 2)
    assert len(inner) > 50
    neighbours = mesh.vertex_neighbors
    for vertex in inner:
        np.testing.assert_allclose(grid[vertex], grid[neighbours[vertex]].mean(axis=0), atol=1e-4)
        # All neighbours are on the edges of one cell.
        assert np.ptp(grid[neighbours[vertex]], axis=0).max() <= 1 + 1e-5


def crossings_of_samples(dense: torch.Tensor) -> torch.Tensor:
    """The points `[n, 3]`, in grid spacings, between neighbouring samples of different sign."""
    points = []
    for axis in range(3):
        low, high = dense.narrow(axis, 0, len(dense) - 1), dense.narrow(axis, 1, len(dense) - 1)
        crossed = ((low < 0) & (high >= 0)) | ((low >= 0) & (high < 0))
        at = crossed.nonzero().double()
        at[:, axis] += low[crossed].double() / (low[crossed].double() - high[crossed].double())
        points.append(at)
    return torch.cat(points)


@pytest.mark.parametrize("where", ["narrow band", "scattered blocks"])
def test_noise_is_closed_and_stays_near_its_samples(where, monkeypatch):
    # An untrained model returns such fields: random signs, in cells anywhere.
    resolution = 64
    generator = torch.Generator().manual_seed(0)
    if where == "narrow band":
        active = sphere(grid_points(resolution)).abs() < 2 * TAU
    else:
        active = torch.rand((resolution // 8,) * 3, generator=generator) < 0.04
        active = active.repeat_interleave(8, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    dense = torch.rand((resolution,) * 3, generator=generator) * 2 - 1
    dense[~active] = torch.nan
    coords = active.nonzero()
    # Removes the minimum, which a field of so few samples would not exceed.
    monkeypatch.setattr(surface_completion, "MIN_EXTENSION_SAMPLES", 0)
    mesh = sparse_sdf_to_mesh(dense[active], coords, resolution)
    _, counts = np.unique(mesh.edges_sorted, axis=0, return_counts=True)
    assert (counts == 2).all() and mesh.is_winding_consistent
    # The surface has a vertex at every crossing of the samples, and not many times more.
    expected = crossings_of_samples(dense) * (2 / (resolution - 1)) - 1
    assert cKDTree(mesh.vertices).query(expected)[0].max() < 1e-5
    assert len(expected) < len(mesh.vertices) < 5 * len(expected)


def test_row_order_dtype_and_batch_column_do_not_matter():
    feats, coords = to_band(torus(grid_points()))
    expected = sparse_sdf_to_mesh(feats, coords, RESOLUTION)
    order = torch.randperm(len(feats), generator=torch.Generator().manual_seed(0))
    coords[:, 0] = 3
    for variant in (coords[order], coords[order, 1:].long()):
        mesh = sparse_sdf_to_mesh(feats[order].double(), variant, RESOLUTION)
        np.testing.assert_array_equal(mesh.vertices, expected.vertices)
        np.testing.assert_array_equal(mesh.faces, expected.faces)


def test_arrays_are_those_of_the_mesh():
    feats, coords = to_band(torus(grid_points()))
    vertices, faces = sparse_marching_cubes(feats, coords[:, 1:], RESOLUTION)
    assert vertices.dtype == torch.float32 and faces.dtype == torch.int32
    mesh = sparse_sdf_to_mesh(feats, coords, RESOLUTION)
    np.testing.assert_array_equal(mesh.vertices, vertices.numpy())
    np.testing.assert_array_equal(mesh.faces, faces.numpy())
    vertices, faces = sparse_marching_cubes(feats[:0], coords[:0], RESOLUTION)
    assert vertices.shape == faces.shape == (0, 3)


def test_more_blocks_than_places_can_number(monkeypatch):
    feats, coords = to_band(torus(grid_points()))
    monkeypatch.setattr(sparse_samples, "MAX_TILES", 8)
    with pytest.raises(ValueError, match=r"`coords`.*8 blocks"):
        sparse_marching_cubes(feats, coords, RESOLUTION)


@pytest.mark.parametrize("keep", ["all", "two thirds"])
def test_passes_of_one_tile_give_the_same(keep, monkeypatch):
    # Two thirds of the samples need completion, in blocks with samples and in others.
    feats, coords = to_band(gyroid_ball(grid_points()))
    if keep == "two thirds":
        kept = torch.rand(len(feats), generator=torch.Generator().manual_seed(0)) < 2 / 3
        feats, coords = feats[kept], coords[kept]
    expected = sparse_marching_cubes(feats, coords, RESOLUTION)
    monkeypatch.setattr(sample_bits, "CPU_TILE_CHUNK", 1)
    for first, second in zip(sparse_marching_cubes(feats, coords, RESOLUTION), expected):
        assert torch.equal(first, second)


def test_level_moves_the_surface_outward():
    feats, coords = to_band(sphere(grid_points(), 0.7, (0, 0, 0)))
    for level in (0.0, 0.2):
        mesh = sparse_sdf_to_mesh(feats, coords, RESOLUTION, level=level)
        radius = np.linalg.norm(mesh.vertices, axis=1)
        np.testing.assert_allclose(radius, 0.7 + level * TAU, atol=1e-3)


def test_normals_point_outward():
    mesh = sparse_sdf_to_mesh(*to_band(sphere(grid_points(), 0.7, (0, 0, 0))), RESOLUTION)
    proper = mesh.area_faces > 1e-8
    assert ((mesh.face_normals * mesh.triangles_center).sum(axis=1)[proper] > 0).all()


def test_full_blocks_have_no_inner_surface():
    # A decoder returns such fields: all samples of the blocks that the surface passes, saturated away from it.
    distance = (sphere(grid_points()) / TAU).tanh()
    blocks = (distance.reshape(8, 8, 8, 8, 8, 8).abs() < 0.9).any(dim=5).any(dim=3).any(dim=1)
    active = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    coords = active.nonzero()
    mesh = sparse_sdf_to_mesh(distance[tuple(coords.T)].unsqueeze(1), coords, RESOLUTION)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2


def test_few_wrong_signs_stay_local():
    # A decoder makes such errors. Some are next to the empty inside, which must not become outside.
    distance = (sphere(grid_points(128), 0.9) * 63.5 / 4).clamp(-1, 1)
    blocks = (distance.reshape(16, 8, 16, 8, 16, 8).abs() < 0.9).any(dim=5).any(dim=3).any(dim=1)
    coords = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1).repeat_interleave(8, 2).nonzero()
    feats = distance[tuple(coords.T)].unsqueeze(1)
    deep = (feats[:, 0] < -0.99).nonzero()[:, 0]
    wrong = deep[torch.randperm(len(deep), generator=torch.Generator().manual_seed(0))[: len(deep) // 500]]
    right_mesh = sparse_sdf_to_mesh(feats, coords, 128)
    feats[wrong] = 0.9
    mesh = sparse_sdf_to_mesh(feats, coords, 128)
    assert mesh.is_watertight
    assert mesh.area < 1.06 * right_mesh.area


def test_missing_block_is_bridged():
    distance = sphere(grid_points(), 0.71) / TAU
    keep = distance.abs() < 1
    keep[32:36, 24:40, 48:] = False
    coords = keep.nonzero()
    mesh = sparse_sdf_to_mesh(distance[tuple(coords.T)].unsqueeze(1), coords, RESOLUTION)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2


def test_surface_that_leaves_the_samples_for_good_is_closed():
    # The samples are a slab around a plane, far from the border of the grid.
    coords = torch.cartesian_prod(torch.arange(20, 40), torch.arange(20, 40), torch.arange(28, 36))
    mesh = sparse_sdf_to_mesh((coords[:, 2:] - 31.4) / 4, coords, RESOLUTION)
    assert mesh.is_watertight and mesh.body_count == 1
    top = mesh.vertices[:, 2].max()
    assert top == pytest.approx(-1 + 31.4 * SPACING, abs=0.2 * SPACING)


def test_shape_cut_off_by_the_grid_is_closed():
    distance = sphere(grid_points(), 0.9, (0.6, 0.0, -0.7))
    mesh = sparse_sdf_to_mesh(*to_band(distance), RESOLUTION)
    assert np.abs(mesh.vertices).max() <= 1
    assert mesh.is_watertight and mesh.body_count == 1
    assert mesh.volume == pytest.approx(float((distance < 0).sum()) * SPACING**3, rel=0.03)


def test_single_sample():
    mesh = sparse_sdf_to_mesh(torch.tensor([[-0.5]]), torch.tensor([[0, 0, 0, 0]]), RESOLUTION)
    assert np.abs(mesh.vertices).max() <= 1
    empty = sparse_sdf_to_mesh(torch.tensor([[0.5]]), torch.tensor([[0, 5, 5, 5]]), RESOLUTION)
    assert len(empty.faces) == 0
    empty = sparse_sdf_to_mesh(torch.zeros(0, 1), torch.zeros(0, 4, dtype=torch.int32), RESOLUTION)
    assert len(empty.faces) == 0


def test_bad_input():
    feats, coords = torch.zeros(2, 1), torch.tensor([[0, 1, 1, 1], [0, 2, 2, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="`coords`"):
        sparse_sdf_to_mesh(feats, coords.float(), RESOLUTION)
    with pytest.raises(ValueError, match="`coords`"):
        sparse_sdf_to_mesh(feats, coords[:, :2], RESOLUTION)
    with pytest.raises(ValueError, match="`coords`"):
        sparse_sdf_to_mesh(feats, torch.tensor([[0, 1, 1, 1], [1, 2, 2, 2]]), RESOLUTION)
    with pytest.raises(ValueError, match="`coords`"):
        sparse_sdf_to_mesh(feats, coords + RESOLUTION, RESOLUTION)
    with pytest.raises(ValueError, match="`coords`"):
        sparse_sdf_to_mesh(feats, coords - 2, RESOLUTION)
    # The repeated rows are not adjacent, have equal or different values, and lie at the border of the grid or away
    # from it.
    for corner in (0, 60, RESOLUTION - 3):
        block = torch.cartesian_prod(*(torch.arange(corner, corner + 3),) * 3)
        with pytest.raises(ValueError, match="`coords` must not repeat"):
            sparse_sdf_to_mesh(torch.linspace(-1, 1, 28), torch.cat([block, block[:1]]), RESOLUTION)
        with pytest.raises(ValueError, match="`coords` must not repeat"):
            sparse_sdf_to_mesh(torch.ones(28), torch.cat([block, block[5:6]]).int(), RESOLUTION)
        assert len(sparse_sdf_to_mesh(torch.linspace(-1, 1, 27), block, RESOLUTION).faces)
    with pytest.raises(ValueError, match="`feats`"):
        sparse_sdf_to_mesh(feats[:1], coords, RESOLUTION)
    with pytest.raises(ValueError, match="`feats`"):
        sparse_sdf_to_mesh(feats / 0, coords, RESOLUTION)


def test_a_surface_is_followed_out_of_its_samples_so_far(monkeypatch):
    """A flat patch goes on for as many samples as there are rounds, then ends within the next spacing."""
    axis = torch.arange(24, 32)
    x, y, z = torch.cartesian_prod(axis, axis, torch.arange(30, 34)).unbind(1)
    coords = torch.stack([x, y, z], dim=1)
    feats = (z - 31.5) / 4
    for rounds in (2, 5):
        monkeypatch.setattr(surface_completion, "MAX_EXTENSION", rounds)
        vertices, _ = sparse_marching_cubes(feats, coords, RESOLUTION)
        places = (vertices[:, :2] + 1) / SPACING
        assert (places.amax(dim=0) > 31 + rounds).all() and (places.amax(dim=0) < 32 + rounds).all()
        assert (places.amin(dim=0) < 24 - rounds).all() and (places.amin(dim=0) > 23 - rounds).all()


def test_a_value_of_zero_is_outside():
    """Also in cells that lack corners: they are completed only where the surface crosses one of their edges."""
    coords = torch.tensor([[8, 8, 8], [9, 8, 8], [9, 9, 9]]) + 4
    for first, empty in ((0.0, True), (1e-6, True), (-1e-6, False)):
        vertices, _ = sparse_marching_cubes(torch.tensor([first, 0.5, -0.5]), coords, RESOLUTION)
        assert (len(vertices) == 0) == empty


def test_coordinates_end_before_the_resolution():
    feats = torch.tensor([-0.5, 0.5])
    sparse_marching_cubes(feats, torch.tensor([[0, 0, 30], [0, 0, 31]]), 32)
    for coords in ([[0, 0, 31], [0, 0, 32]], [[0, -1, 0], [0, 0, 0]]):
        with pytest.raises(ValueError, match="`coords` must lie in"):
            sparse_marching_cubes(feats, torch.tensor(coords), 32)


@pytest.mark.parametrize("seed", range(4))
def test_both_sides_below_the_faces_and_edges_of_blocks(seed):
    """Random samples, of which most faces and edges of blocks have one side alone, against a search by coordinates."""
    generator = torch.Generator().manual_seed(seed)
    coords = (torch.rand(32**3, generator=generator) < (0.003, 0.01, 0.03, 0.1)[seed]).nonzero()[:, 0]
    coords = torch.stack([coords // 1024, coords // 32 % 32, coords % 32], dim=1).int() + 16
    feats = torch.randn(len(coords), generator=generator)
    samples = sparse_samples.SparseSamples.from_rows(feats, coords, RESOLUTION, 0.0)
    found = crossed_cells._both_sides_below(samples)
    lowest = samples.index.coords(torch.arange(len(samples.known), dtype=torch.int32) * 512)
    inside = feats < 0
    for tile in range(1, len(lowest)):  # 0 stands for blocks without samples
        place = coords - lowest[tile]
        near = ((place >= 0) & (place <= 8)).all(dim=1)
        on_low = place == 0
        x, y, z = on_low.unbind(1)
        expected = [(near & at & inside).any() & (near & at & ~inside).any() for at in (x, y, z, x & y, x & z, y & z)]
        assert found[tile].tolist() == [bool(flag) for flag in expected]
