"""Cavities of signed distance fields: which are filled, and the surfaces that close them."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusers_sparse3d.geometry import cavities
from diffusers_sparse3d.geometry.cavities import CORNER_STEPS, fill_cavities, find_cavities
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh


R = 48
AXIS = torch.arange(R) - (R - 1) / 2
X, Y, Z = torch.meshgrid(AXIS, AXIS, AXIS, indexing="ij")


def band(distance: torch.Tensor, reach: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a field up to `reach` from its surface, in samples as `distance`: s / tau for tau = 2 samples."""
    coords = (distance.abs() < reach).nonzero()
    return (distance[tuple(coords.T)] / 2).clamp(-1, 1)[:, None], coords.int()


def shell(hole: float, thickness: float = 3.0, radius: float = 16.0) -> torch.Tensor:
    """Distances of a spherical shell with a round hole of this radius on the z axis, in samples."""
    sphere = (X**2 + Y**2 + Z**2).sqrt()
    wall = (sphere - radius + thickness / 2).abs() - thickness / 2
    if hole == 0:
        return wall
    tube = torch.maximum((X**2 + Y**2).sqrt() - hole, -Z)
    return torch.maximum(wall, -tube)


def mesh_of(rows, level=0.0):
    return sparse_sdf_to_mesh(*rows, R, level)


def width(samples: float) -> float:
    """`max_opening` for balls of this radius in samples."""
    return 4 * samples / R + 1e-9


def test_a_torn_shell_becomes_the_ball_that_it_encloses():
    torn = band(shell(hole=2))
    ball = mesh_of(band((X**2 + Y**2 + Z**2).sqrt() - 16))
    before, after = mesh_of(torn), mesh_of(fill_cavities(*torn, R, 0.0, width(3)))
    assert before.volume < 0.5 * ball.volume and before.area > 1.6 * ball.area
    assert after.is_watertight and after.body_count == 1
    assert after.volume == pytest.approx(ball.volume, rel=0.01)
    assert after.area == pytest.approx(ball.area, rel=0.02)
    # Where the hole was, the surface is no deeper than the leak that corners may need.
    over_hole = after.vertices[(np.hypot(*after.vertices[:, :2].T) < 2 * 2 / R) & (after.vertices[:, 2] > 0)]
    depth = 16 - np.linalg.norm(over_hole, axis=1) * (R - 1) / 2
    assert len(over_hole) > 5 and depth.max() < CORNER_STEPS + 2.5


def test_away_from_the_opening_the_surface_stays_as_it_is():
    torn = band(shell(hole=2))
    before, after = (mesh_of(rows) for rows in (torn, fill_cavities(*torn, R, 0.0, width(3))))
    below = [mesh.vertices[mesh.vertices[:, 2] < 0] for mesh in (before, after)]
    outer = [vertices[np.linalg.norm(vertices, axis=1) > 31 / R] for vertices in below]
    assert len(outer[0]) > 2000
    assert set(map(bytes, outer[0])) == set(map(bytes, outer[1]))


@pytest.mark.parametrize("level", [0.0, 0.2])
def test_walls_and_values_are_those_at_the_level(level):
    torn = band(shell(hole=3), reach=1.8)
    feats, coords = fill_cavities(*torn, R, level, width(4))
    walls = torn[0][:, 0] < level
    assert torch.equal(feats[: len(walls), 0][walls], torn[0][:, 0][walls])
    assert torch.equal(coords[: len(walls)], torn[1])
    assert mesh_of((feats, coords), level).is_watertight
    # The inner wall has both its sides inside, by a margin that no rounding to half precision takes away.
    radius = torch.linalg.vector_norm(torn[1].float() - (R - 1) / 2, dim=1)
    inner = (radius < 14) & (torn[1][:, 2] < R / 2) & ~walls
    assert inner.sum() > 500 and torn[0][:, 0][inner].min() < level + 0.05
    assert (feats[: len(walls), 0][inner] < level - 0.05).all()
    added = feats[len(walls) :]
    assert level - 1 <= added.min() < level - 0.5 and level + 0.5 < added.max() <= level + 1


def test_a_cavity_that_the_grid_cuts_open_is_closed_at_its_border():
    center = -11.0
    sphere = (X**2 + Y**2 + (Z - center) ** 2).sqrt()
    cut, ball = band((sphere - 14.5).abs() - 1.5), band(sphere - 16)
    filled = mesh_of(fill_cavities(*cut, R, 0.0, width(5)))
    assert filled.is_watertight and filled.body_count == 1
    assert filled.volume == pytest.approx(mesh_of(ball).volume, rel=0.02) and mesh_of(cut).volume < 0.6 * filled.volume


OPEN = {
    "a hole that the balls pass": shell(hole=6),
    "two plates": torch.maximum((Z.abs() - 4).abs() - 1.5, torch.maximum(X.abs(), Y.abs()) - 16),
    "a ring": (((X**2 + Y**2).sqrt() - 10) ** 2 + Z**2).sqrt() - 6,
    "a cup": torch.maximum(shell(hole=0), Z),
    "a ball": (X**2 + Y**2 + Z**2).sqrt() - 16,
}


@pytest.mark.parametrize("shape", OPEN.values(), ids=OPEN.keys())
def test_what_is_open_is_left_alone(shape):
    feats, coords = band(shape)
    found = fill_cavities(feats, coords, R, 0.0, width(4))
    assert found[0] is feats and found[1] is coords


def test_a_closed_cavity_is_filled_too_and_nothing_without_an_opening_to_close():
    feats, coords = band(shell(hole=0))
    assert mesh_of((feats, coords)).body_count == 2
    mesh = mesh_of(fill_cavities(feats, coords, R, 0.0, width(1)))
    assert mesh.body_count == 1 and mesh.is_watertight
    assert fill_cavities(feats, coords, R, 0.0, 0.0)[0] is feats


def test_order_batch_column_and_dtype_of_rows_do_not_matter():
    feats, coords = band(shell(hole=2))
    expected = mesh_of(fill_cavities(feats.half(), coords, R, 0.0, width(3)))
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))
    shuffled = feats.half()[order, 0], torch.nn.functional.pad(coords, (1, 0), value=2)[order].long()
    found = mesh_of(fill_cavities(*shuffled, R, 0.0, width(3)))
    assert np.array_equal(found.vertices, expected.vertices) and np.array_equal(found.faces, expected.faces)


def grown(mask: np.ndarray, steps: int, within: np.ndarray | None = None) -> np.ndarray:
    """The dense counterpart of `_Blocks.dilate`."""
    faces, corners = (ndimage.generate_binary_structure(3, connectivity) for connectivity in (1, 3))
    # Steps are taken four at a time, each time faces first.
    for step in range(steps):
        mask = ndimage.binary_dilation(mask, corners if step % 4 % 2 and within is None else faces)
        mask = mask if within is None else mask & within
    return mask


def dense_cavities(walls: np.ndarray, radii: list[int]) -> np.ndarray:
    """What `find_cavities` finds, in a dense grid with a margin that the outside fills."""
    solid = walls
    for radius in radii:
        fits = ~grown(solid, radius)
        labels = ndimage.label(fits)[0]
        outside = labels == labels[0, 0, 0]
        touched = grown(outside, radius) & ~solid
        closed = ~solid & ~grown(touched, CORNER_STEPS, within=~solid)
        solid = solid | grown(fits & ~outside & closed, 3 * radius + CORNER_STEPS, within=closed)
    return solid & ~walls


@pytest.mark.parametrize("seed", range(4))
def test_cavities_are_those_of_a_dense_grid(seed):
    # Noise of several lengths: walls with holes, crevices and cavities of many sizes, which the grid cuts off, too.
    noise = np.random.default_rng(seed).standard_normal((44, 44, 44))
    field = sum(ndimage.gaussian_filter(noise, sigma, mode="wrap") * sigma**1.5 for sigma in (1.5, 3.0))
    size = 37
    walls = np.abs(field[:size, :size, :size]) < 0.16
    radii, margin = [1, 2, 3], 24
    coords = torch.from_numpy(np.argwhere(ndimage.binary_dilation(walls)))
    expected = dense_cavities(np.pad(walls, margin), radii)[(slice(margin, -margin),) * 3]
    samples = cavities._Blocks(coords.int(), size, reach=2 * radii[-1])
    chosen = torch.from_numpy(walls)[tuple(coords.T)]
    found = samples.contains(find_cavities(samples, samples.set_of(chosen), radii)).numpy()
    assert found.sum() > 100
    assert np.array_equal(found, expected[tuple(coords.T.numpy())])


def test_chunks_of_blocks_give_the_same(monkeypatch):
    torn = band(shell(hole=2))
    expected = fill_cavities(*torn, R, 0.0, width(3))
    monkeypatch.setattr(cavities, "CPU_CHUNK", 7)
    found = fill_cavities(*torn, R, 0.0, width(3))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("max_opening", [-0.1, 0.6, float("nan"), "wide"])
def test_a_width_that_does_not_fit_is_an_error(max_opening):
    with pytest.raises((ValueError, TypeError), match="max_opening"):
        fill_cavities(*band(shell(hole=2)), R, 0.0, max_opening)


@pytest.mark.parametrize(("name", "value"), [("resolution", 1), ("resolution", 4096), ("level", float("nan"))])
def test_other_arguments_are_checked_as_by_marching_cubes(name, value):
    arguments = {"resolution": R, "level": 0.0} | {name: value}
    with pytest.raises(ValueError, match=name):
        fill_cavities(*band(shell(hole=2)), **arguments)


def test_no_rows_are_no_cavities():
    feats, coords = fill_cavities(torch.zeros(0, 1), torch.zeros(0, 3, dtype=torch.int32), R)
    assert feats.shape == (0, 1) and coords.shape == (0, 3)
