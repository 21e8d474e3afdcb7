"""The Triton kernels against the reference: small cases in Triton's interpreter, larger ones on a GPU."""

import pytest
import torch

from diffusers_sparse3d.ops.coordinates import reference
from diffusers_sparse3d.ops.coordinates.kernels.neighbour_map import neighbour_map
from diffusers_sparse3d.ops.coordinates.kernels.subdivided_map import subdivide_neighbour_map

from .kernel_testing import (
    DEVICE,
    NATIVE,
    spied_launches,
)
from .test_coordinates import CORNER, EMPTY, SEAM, random_coords


LATTICE = torch.cartesian_prod(torch.arange(2), *[torch.arange(0, 40, 8)] * 3).int()
CASES = {
    "several samples": random_coords(6, 300, 3),
    "one sample in a corner": random_coords(4, 60, 1) + torch.tensor([0, 2044, 2044, 2044], dtype=torch.int32),
    "lattice": LATTICE,  # every voxel has the same place in its cube
    "corner": CORNER,
    "seam": SEAM,
    "empty": EMPTY,
    "many samples": random_coords(3, 200, 70),
    "scattered": random_coords(2048, 400, 2),
}
if NATIVE:
    CASES["large"] = random_coords(100, 300_000, 3)
    CASES["large lattice"] = torch.cartesian_prod(torch.arange(2), *[torch.arange(0, 512, 16)] * 3).int()


@pytest.mark.parametrize("name", CASES)
def test_neighbour_map(name):
    coords = CASES[name].to(DEVICE)
    neighbours = neighbour_map(coords)
    assert neighbours.dtype == torch.int32
    assert torch.equal(neighbours, reference.neighbour_map(coords))


@pytest.mark.parametrize("name", ["several samples", "lattice", "empty"])
def test_subdivided_map(name):
    neighbours = reference.neighbour_map(CASES[name].to(DEVICE))
    assert torch.equal(subdivide_neighbour_map(neighbours), reference.subdivide_neighbour_map(neighbours))


def test_launches_on_the_device_of_the_inputs(monkeypatch):
    launches = spied_launches(monkeypatch)
    subdivide_neighbour_map(neighbour_map(CASES["corner"].to(DEVICE)))
    assert len(launches) == 3 and min(launches) >= 1
