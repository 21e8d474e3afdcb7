"""Slots and values around samples by Triton kernels against plain PyTorch."""

import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.kernels import block_lookup, flood
from diffusers_sparse3d.geometry.sdf import block_grid
from diffusers_sparse3d.geometry.sdf.block_grid import BlockGrid
from diffusers_sparse3d.geometry.sdf.outer_surface import OuterSurface

from ..ops.kernel_testing import DEVICE, spied_launches


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    """Grids run their kernels while the list that it returns is not empty."""
    running = []
    monkeypatch.setattr(block_grid, "runs_kernels", lambda table: bool(running))
    if DEVICE == "cpu":
        monkeypatch.setattr(block_lookup, "_LANES", 4096)
        monkeypatch.setattr(flood, "_LANES", 4096)
    return running


def random_grid(block_size, per_axis=3, share=0.5):
    """A grid of random blocks, and all samples of it and around it."""
    generator = torch.Generator().manual_seed(block_size)
    active = torch.rand((per_axis,) * 3, generator=generator) < share
    # The first and the last sample of the grid, and the last but one block of an axis.
    active[0, 0, 0] = active[-1, -1, -1] = active[-1, 0, -2] = True
    grid = BlockGrid(active.nonzero().int().to(DEVICE) * block_size, per_axis * block_size, block_size)
    axis = torch.arange(-2, per_axis * block_size + 3, dtype=torch.int32)
    return grid, torch.cartesian_prod(axis, axis, axis).to(DEVICE)


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_slots(block_size, by_kernels):
    grid, coords = random_grid(block_size)
    expected = grid.slots(coords)
    by_kernels.append(True)
    slots = grid.slots(coords)
    assert slots.dtype == torch.int64 and torch.equal(slots, expected)
    assert len(slots.unique()) == grid.size + 1
    # Strided rows, and rows of another type.
    assert torch.equal(grid.slots(coords.T.contiguous().T.long()), expected)
    assert grid.slots(coords[:0]).shape == (0,)


@pytest.mark.parametrize("block_size", [2, 4])
@pytest.mark.parametrize("span", [range(0, 2), range(-1, 3)])
def test_bits_around(block_size, span, by_kernels):
    grid, coords = random_grid(block_size)
    coords = coords[grid.slots(coords) < grid.size]
    coords = torch.cat([coords, coords[::3]])
    generator = torch.Generator().manual_seed(len(span))
    values = (1 << torch.randint(0, 6, (grid.size + 1,), generator=generator)).to(torch.uint8)
    values[torch.rand(grid.size + 1, generator=generator) < 0.9] = 0
    values = values.to(DEVICE)
    values[grid.size] = 0
    expected = grid.bits_around(values, coords, span)
    by_kernels.append(True)
    bits = grid.bits_around(values, coords, span)
    assert bits.dtype == torch.uint8 and torch.equal(bits, expected)
    assert len(bits.unique()) > 5
    assert len(grid.bits_around(values, coords[:0], span)) == 0


def test_small_programs_and_the_device_of_the_samples(monkeypatch, by_kernels):
    grid, coords = random_grid(2, 2)
    coords = coords[grid.slots(coords) < grid.size]
    values = torch.arange(grid.size + 1, device=DEVICE).to(torch.uint8)
    expected = grid.slots(coords), grid.bits_around(values, coords, range(2))
    launches = spied_launches(monkeypatch)
    monkeypatch.setattr(block_lookup, "_LANES", 16)
    by_kernels.append(True)
    assert torch.equal(grid.slots(coords), expected[0])
    assert torch.equal(grid.bits_around(values, coords, range(2)), expected[1])
    assert len(launches) == 2 and min(launches) >= 1


def test_outer_surface_by_kernels(by_kernels):
    """A box with a sheet beside it: what is outside, the codes and the boundary, with and without kernels of grids."""
    box, sheet = trimesh.creation.box((0.9, 0.7, 0.8)), trimesh.creation.box((0.02, 0.9, 0.9))
    sheet.apply_translation((0.7, 0, 0))
    mesh = trimesh.util.concatenate([box, sheet])
    surfaces = []
    for on in (False, True):
        by_kernels.extend([True] * on)
        surface = OuterSurface(mesh, 32, device=DEVICE)
        surfaces.append(
            (surface.outside, surface.code, surface.boundary, *(surface.code_around(surface.cell, k) for k in (1, 2)))
        )
    for plain, by_kernel in zip(*surfaces):
        assert torch.equal(plain, by_kernel)
    outside, code = surfaces[0][:2]
    assert 0 < outside.sum() < len(outside) and len(code.unique()) >= 4
