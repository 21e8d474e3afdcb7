"""The blocks of a grid, the flood fill in them and the crossings of grid edges, against plain dense computations."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusers_sparse3d.geometry.sdf import block_grid
from diffusers_sparse3d.geometry.sdf.block_grid import BlockGrid, _flood_by_labels, _flood_by_steps
from diffusers_sparse3d.geometry.sdf.grid_crossings import _grid_crossings, crossed_edges


RESOLUTION, BLOCK_SIZE = 16, 4


def all_coords(resolution: int = RESOLUTION) -> torch.Tensor:
    axis = torch.arange(resolution, dtype=torch.int32)
    return torch.cartesian_prod(axis, axis, axis)


def test_slots_are_those_of_active_blocks():
    coords = all_coords()
    active = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    active[0, 0, 0] = active[3, 3, 3] = True
    is_active = active[tuple((coords // BLOCK_SIZE).long().T)]
    grid = BlockGrid(coords[is_active], RESOLUTION, BLOCK_SIZE)
    slots = grid.slots(coords)
    assert (slots[~is_active] == grid.size).all()
    # Every sample of an active block, those on the faces of the grid too, has a slot of its own.
    assert slots[is_active].sort().values.tolist() == list(range(grid.size))
    assert torch.equal(grid.coords(slots[is_active]), coords[is_active])
    beyond = torch.tensor([[-1, 0, 0], [0, RESOLUTION, 0], [0, 0, -1], [15, 15, RESOLUTION]], dtype=torch.int32)
    assert (grid.slots(beyond) == grid.size).all()


@pytest.mark.parametrize("span", [range(0, 2), range(-1, 3)])
def test_bits_around_are_those_of_a_dense_grid(span, monkeypatch):
    """Samples of inactive blocks and beyond the grid have none; the cubes reach over both."""
    monkeypatch.setattr(block_grid, "CPU_CUBE_CHUNK", 1000)
    generator = torch.Generator().manual_seed(len(span))
    active = torch.rand(4, 4, 4, generator=generator) < 0.5
    active[0, 0, 0] = active[3, 3, 3] = active[3, 0, 3] = True
    dense = active.repeat_interleave(4, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    grid = BlockGrid(dense.nonzero().int(), RESOLUTION, BLOCK_SIZE)
    values = (1 << torch.randint(0, 6, (grid.size + 1,), generator=generator)).to(torch.uint8)
    values[grid.size] = 0
    # Sparse values, so that the or of a cube says which of its samples were looked at.
    values[torch.rand(grid.size + 1, generator=generator) < 0.9] = 0
    grown = torch.zeros((RESOLUTION + 8,) * 3, dtype=torch.uint8)
    coords = grid.coords(torch.arange(grid.size))
    grown[tuple((coords + 4).long().T)] = values[: grid.size]
    expected = torch.zeros(grid.size, dtype=torch.uint8)
    for step in itertools.product(span, repeat=3):
        expected |= grown[tuple((coords + 4 + torch.tensor(step)).long().T)]
    assert torch.equal(grid.bits_around(values, coords, span), expected)
    assert len(expected.unique()) > 10
    assert len(grid.bits_around(values, coords[:0], span)) == 0


@pytest.mark.parametrize("seed", range(6))
def test_flood_reaches_what_a_dense_flood_reaches(seed):
    random = np.random.default_rng(seed)
    size = RESOLUTION // BLOCK_SIZE
    # A closed wall, one sample thick, of active blocks around an inactive one, and some more active blocks.
    active = random.random((size,) * 3) < 0.3
    active[1:4, 1:4, 1:4] = True
    active[2, 2, 2] = False
    free = random.random((RESOLUTION,) * 3) < (0.4 if seed % 2 else 0.65)
    if seed < 2:
        free[4:16, 4:16, 4:16] = False
        free[5:15, 5:15, 5:15] = True
    dense_active = active.repeat(BLOCK_SIZE, 0).repeat(BLOCK_SIZE, 1).repeat(BLOCK_SIZE, 2)
    free |= ~dense_active
    labels, _ = ndimage.label(np.pad(free, 1, constant_values=True))
    expected = (labels == labels[0, 0, 0])[1:-1, 1:-1, 1:-1]
    assert seed >= 2 or not expected[4:16, 4:16, 4:16].any()

    grid = BlockGrid(torch.from_numpy(np.argwhere(dense_active)).int(), RESOLUTION, BLOCK_SIZE)
    coords = grid.coords(torch.arange(grid.size))
    tiles = grid.full(True, torch.bool)
    tiles[: grid.size] = torch.from_numpy(free)[tuple(coords.long().T)]
    wanted = torch.from_numpy(expected)[tuple(coords.long().T)]
    by_labels = _flood_by_labels(grid.tiles(tiles).numpy(), grid.blocks.numpy(), grid.table.numpy())
    np.testing.assert_array_equal(by_labels.ravel(), wanted)
    np.testing.assert_array_equal(_flood_by_steps(grid.tiles(tiles), grid.blocks, grid.table).flatten(), wanted)
    np.testing.assert_array_equal(grid.flood_from_outside(tiles)[:-1], wanted)


@pytest.mark.parametrize("axis", range(3))
def test_grid_lines_through_corners_and_edges_of_a_triangle_cross_it(axis):
    """All points of the lattice in a triangle with corners on grid lines count, those on its border too."""
    grid = BlockGrid(all_coords(8), 8, BLOCK_SIZE)
    corners = torch.tensor([[1, 1, 2.25], [5, 1, 2.25], [1, 3, 2.25]], dtype=torch.float64)
    expected = {(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 2), (2, 2), (3, 2), (1, 3)}
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        edges = crossed_edges(grid, corners[order].roll(axis + 1, dims=1)[None])
        points = edges.point[edges.axis == axis].roll(-axis - 1, dims=1)
        assert {tuple(point) for point in points[:, :2].int().tolist()} == expected
        assert len(points) == len(expected) and (points[:, 2] == 2.25).all()
        low, high = (grid.coords(ends[edges.axis == axis]).roll(-axis - 1, dims=1) for ends in edges.ends)
        assert (low[:, 2] == 2).all() and (high[:, 2] == 3).all() and torch.equal(low[:, :2], high[:, :2])


def test_all_axes_in_one_pass_are_the_axes_one_by_one():
    corners = 9 * torch.rand(30, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    # Triangles that no line along z crosses, and some beyond the grid.
    corners[::5, :, 2] = corners[::5, :1, 2]
    corners[1::5] += 8
    passes = [_grid_crossings(corners, 8, (axis,)) for axis in range(3)]
    for together, alone in zip(_grid_crossings(corners, 8, (0, 1, 2)), zip(*passes)):
        assert torch.equal(together, torch.cat(alone))
    assert min(len(base) for base, *_ in passes) > 20
    assert passes[1][2].unique().tolist() == [1] and len(passes[2][3].unique()) > 10
