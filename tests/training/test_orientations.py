"""Quarter turns and mirroring by their definition: which way they turn, for dense grids and for blocks."""

import math

import pytest
import torch

from diffusers_sparse3d.geometry.sdf import SDFBlocks
from diffusers_sparse3d.training.orientations import UNCHANGED, Orientation, facing


def test_a_turn_takes_z_to_x_and_mirroring_exchanges_left_and_right():
    grid = torch.zeros(4, 4, 4)
    grid[1, 2, 3] = 1  # at +z, a little to the left
    places = {
        Orientation(1): [3, 2, 2],
        Orientation(2): [2, 2, 0],
        Orientation(-1): [0, 2, 1],
        Orientation(0, True): [2, 2, 3],
        Orientation(1, True): [0, 2, 2],
        UNCHANGED: [1, 2, 3],
    }
    for orientation, place in places.items():
        assert orientation.apply_to_grid(grid).nonzero().tolist() == [place]


@pytest.mark.parametrize("quarter_turns", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_blocks_turn_as_the_grid_of_their_samples(quarter_turns, mirrored):
    orientation = Orientation(quarter_turns, mirrored)
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(16, 16, 16, generator=generator)
    coords = torch.tensor([[0, 1, 2], [0, 3, 3], [1, 0, 0], [3, 2, 0]], dtype=torch.int32)

    def blocks_of(grid: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        return torch.stack([grid[4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 4 * z : 4 * z + 4] for x, y, z in coords])

    values = blocks_of(dense, coords)
    turned = orientation.apply_to_blocks(SDFBlocks(coords, values, values < 0.5, 16))
    expected = orientation.apply_to_grid(dense)
    assert torch.equal(turned.values, blocks_of(expected, turned.coords))
    assert torch.equal(turned.sharp, turned.values < 0.5)
    keys = turned.coords.long() @ torch.tensor([16, 4, 1])
    assert (keys.diff() > 0).all()
    filled = torch.zeros(4, 4, 4)
    filled[tuple(coords.long().T)] = 1
    assert orientation.apply_to_grid(filled).nonzero().tolist() == turned.coords.tolist()


def test_names_of_cached_files_differ():
    prefixes = {Orientation(turns, mirrored).prefix for turns in (-1, 0, 1, 2) for mirrored in (False, True)}
    assert len(prefixes) == 8 and UNCHANGED.prefix == ""


@pytest.mark.parametrize("azimuth", [0, 30, -44, 46, 90, 130, -100, 180, 269, 359])
def test_facing_brings_a_view_to_the_front(azimuth):
    """A view from azimuth a becomes that from a + 90 turns."""
    seen_from = (azimuth + 90 * facing(azimuth) + 180) % 360 - 180
    assert abs(seen_from) <= 45
    assert facing(math.nan) == 0
