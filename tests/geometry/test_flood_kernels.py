"""The flood fill by Triton kernels against dense floods, components on the CPU, and paths that are known before."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusers_sparse3d.geometry.kernels import flood
from diffusers_sparse3d.geometry.sdf import block_grid
from diffusers_sparse3d.geometry.sdf.block_grid import BlockGrid, _flood_by_labels

from ..ops.kernel_testing import DEVICE, spied_launches


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """The interpreter takes as long for a small program as for a large one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(flood, "_LANES", 1024)


def upsampled(blocks, size):
    return blocks.repeat(size, 0).repeat(size, 1).repeat(size, 2)


def flooded(active, free, size):
    """What the kernels reach in a dense grid `free` (bool array) with blocks `active`, for the active samples."""
    coords = torch.from_numpy(np.argwhere(upsampled(active, size))).int().to(DEVICE)
    grid = BlockGrid(coords, len(free), size)
    slots = tuple(grid.coords(torch.arange(grid.size, device=DEVICE)).long().cpu().T)
    tiles = grid.full(True, torch.bool)
    tiles[: grid.size] = torch.from_numpy(free.copy())[slots].to(DEVICE)
    reached = flood.flood_from_outside(grid.tiles(tiles), grid.blocks, grid.table)
    arrays = grid.tiles(tiles).cpu().numpy(), grid.blocks.cpu().numpy(), grid.table.cpu().numpy()
    np.testing.assert_array_equal(reached.cpu().numpy(), _flood_by_labels(*arrays))
    result = np.zeros(free.shape, dtype=bool)
    result[slots] = reached.flatten().cpu().numpy()
    return result


def winding_path(count):
    """Cells `[n, 3]` of a path of `count`^3 cells with one between each two, which starts at the face x = 0."""
    cells = []
    for x in range(count):
        for y in range(count)[:: -1 if x % 2 else 1]:
            cells += [(x, y, z) for z in range(count)[:: -1 if (x * count + y) % 2 else 1]]
    cells = 2 * np.array(cells) + 1
    between = (cells[1:] + cells[:-1]) // 2
    assert (np.abs(cells[1:] - cells[:-1]).sum(1) == 2).all()
    path = np.empty((2 * len(cells) - 1, 3), dtype=int)
    path[::2], path[1::2] = cells, between
    return np.concatenate([[[0, 1, 1]], path])


@pytest.mark.parametrize(
    ("size", "per_axis", "share", "active_share"),
    [(2, 5, 0.7, 0.5), (4, 4, 0.4, 0.6), (4, 4, 0.65, 0.6), (4, 3, 0.7, 1.0), (8, 2, 0.6, 0.7), (16, 1, 0.6, 1.0)],
)
def test_random_walls(size, per_axis, share, active_share):
    for seed in range(2):
        random = np.random.default_rng(seed)
        active = random.random((per_axis,) * 3) < active_share
        active[0, 0, 0] = True
        free = (random.random((size * per_axis,) * 3) < share) | ~upsampled(active, size)
        labels, _ = ndimage.label(np.pad(free, 1, constant_values=True))
        expected = (labels == labels[0, 0, 0])[1:-1, 1:-1, 1:-1] & upsampled(active, size)
        np.testing.assert_array_equal(flooded(active, free, size), expected)
        assert expected.any()


@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.parametrize("size", [4, 8])
def test_winding_path_through_samples(size, flips):
    """The flood follows a path of one sample's width to its end, or to where it is cut."""
    path = winding_path(3)
    cut = None if flips == (1, 1, 1) else 2 + 7 * flips[0] + 4 * flips[1] + 30
    free = np.zeros((8,) * 3, dtype=bool)
    free[tuple(path.T)] = True
    expected = free.copy()
    if cut is not None:
        free[tuple(path[cut])] = False
        expected[tuple(path[cut:].T)] = False
    mirrored = tuple(slice(None, None, flip) for flip in flips)
    reached = flooded(np.ones((8 // size,) * 3, dtype=bool), free[mirrored], size)
    np.testing.assert_array_equal(reached, expected[mirrored])


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("axis", range(3))
def test_winding_path_through_inactive_blocks(axis, cut):
    """A block at the end of a path of inactive blocks between solid ones is reached, unless the path is cut."""
    path = np.roll(winding_path(3), axis, axis=1)
    active = np.ones((8,) * 3, dtype=bool)
    active[tuple(path[:-1].T)] = False
    free = np.zeros((16,) * 3, dtype=bool) | ~upsampled(active, 2)
    last, gap = path[-1], path[20]
    free[tuple(slice(2 * place, 2 * place + 2) for place in last)] = True
    if cut:
        active[tuple(gap)] = True
        free[tuple(slice(2 * place, 2 * place + 2) for place in gap)] = False
    reached = flooded(active, free, 2)
    assert reached.sum() == (0 if cut else 8)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("surrounded", [False, True])
def test_lines_of_samples_are_entered_at_their_ends(axis, surrounded):
    """Two samples that touch the outside of the grid, or an inactive block, with one end; or are a sample away."""
    margin = 4 * surrounded
    for side, gap in itertools.product((0, 1), (0, 1)):
        place = [margin + 3, margin + 3, margin + 3]
        place[axis] = margin + (6 - gap if side else gap)
        free = np.zeros((8 + 2 * margin,) * 3, dtype=bool)
        active = np.pad(np.ones((2, 2, 2), dtype=bool), int(surrounded))
        free |= ~upsampled(active, 4)
        further = [coordinate + (index == axis) for index, coordinate in enumerate(place)]
        free[tuple(place)] = free[tuple(further)] = True
        assert flooded(active, free, 4).sum() == 2 * (gap == 0)


def test_small_programs_reach_the_same(monkeypatch):
    """Paths through samples of many programs, in rows longer than the steps of their start."""
    monkeypatch.setattr(flood, "_LANES", 256)
    free = np.zeros((16,) * 3, dtype=bool)
    free[1, 1, :15] = free[1, 1:15, 14] = free[1:15, 14, 14] = free[14, 14, 2:15] = True
    free[5, 5, 1:15] = True
    reached = flooded(np.ones((1,) * 3, dtype=bool), free, 16)
    free[5, 5] = False
    np.testing.assert_array_equal(reached, free)


def test_grid_without_blocks_is_all_outside(monkeypatch):
    monkeypatch.setattr(block_grid, "runs_kernels", lambda table: True)
    grid = BlockGrid(torch.empty(0, 3, dtype=torch.int32, device=DEVICE), 16, 8)
    assert grid.flood_from_outside(grid.full(True, torch.bool)).tolist() == [False]


def test_kernels_take_what_32_bits_count(monkeypatch):
    launches = spied_launches(monkeypatch)
    grid = BlockGrid(torch.tensor([[0, 0, 0], [0, 0, 4]], dtype=torch.int32, device=DEVICE), 8, 4)
    free = grid.full(True, torch.bool)
    monkeypatch.setattr(block_grid, "runs_kernels", lambda table: True)
    by_kernels = grid.flood_from_outside(free)
    assert len(launches) == 5 and min(launches) >= 1
    monkeypatch.setattr(block_grid, "MOST_NODES", grid.size + grid.table.numel())
    assert torch.equal(grid.flood_from_outside(free), by_kernels) and len(launches) == 5
    assert by_kernels.sum() == grid.size
