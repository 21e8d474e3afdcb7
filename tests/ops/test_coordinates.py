"""Voxel coordinates: keys, neighbour maps, coarser and finer grids, partitions, validation."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sparse3d.ops.coordinates import (
    check_coords,
    decode_coords,
    downsample_coords,
    encode_coords,
    neighbour_map,
    partition_coords,
    subdivide_coords,
    subdivide_neighbour_map,
    unique_coords,
)


def random_coords(resolution: int = 6, rows: int = 300, batch_size: int = 3, seed: int = 0) -> torch.Tensor:
    """Distinct voxels in random row order."""
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.randint(0, resolution, (rows, 3), generator=generator)
    batch = torch.randint(0, batch_size, (rows, 1), generator=generator)
    coords, _ = unique_coords(torch.cat([batch, xyz], 1).int())
    return coords[torch.randperm(len(coords), generator=generator)]


EMPTY = torch.zeros(0, 4, dtype=torch.int32)
# Voxels that would follow one another if an axis ran over into the next one.
SEAM = torch.tensor(
    [[0, 0, 0, 2047], [0, 0, 1, 0], [0, 3, 2047, 5], [0, 4, 0, 5], [0, 2047, 7, 7], [1, 0, 7, 7]], dtype=torch.int32
)
CORNER = torch.tensor([[0, 2047, 2047, 2047], [0, 0, 0, 0], [1, 2047, 0, 2047]], dtype=torch.int32)


def test_keys_are_ordered_and_reversible():
    coords = random_coords(2048, 500)
    keys = encode_coords(coords)
    assert torch.equal(decode_coords(keys), coords)
    expected = np.lexsort(coords.numpy().T[::-1])
    assert torch.equal(keys.argsort(), torch.from_numpy(expected))
    assert torch.equal(decode_coords(encode_coords(CORNER)), CORNER)


@pytest.mark.parametrize("coords", [random_coords(), EMPTY, CORNER, SEAM], ids=["random", "empty", "corner", "seam"])
def test_neighbour_map_against_dictionary(coords):
    rows = {tuple(row): index for index, row in enumerate(coords.tolist())}
    neighbours = neighbour_map(coords)
    assert neighbours.shape == (27, len(coords)) and neighbours.dtype == torch.int32
    for k in range(27):
        offset = (k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1)
        expected = [
            rows.get((batch, x + offset[0], y + offset[1], z + offset[2]), len(coords))
            for batch, x, y, z in coords.tolist()
        ]
        assert neighbours[k].tolist() == expected


@pytest.mark.parametrize("coords", [random_coords(), EMPTY, CORNER // 2], ids=["random", "empty", "corner"])
def test_subdivision(coords):
    children = subdivide_coords(coords)
    assert torch.equal(children[:, 0].view(-1, 8), coords[:, :1].expand(-1, 8))
    assert torch.equal(children[:, 1:].view(-1, 8, 3) // 2, coords[:, None, 1:].expand(-1, 8, 3))
    corners = children[:, 1:].view(-1, 8, 3) % 2
    assert (corners @ torch.tensor([4, 2, 1], dtype=torch.int32) == torch.arange(8)).all()
    assert torch.equal(subdivide_neighbour_map(neighbour_map(coords)), neighbour_map(children))


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_downsample(factor):
    coords = random_coords(20)
    coarse, parents = downsample_coords(coords, factor)
    expected = np.unique(np.concatenate([coords[:, :1], coords[:, 1:] // factor], 1), axis=0)
    assert np.array_equal(coarse.numpy(), expected)
    assert torch.equal(coarse[parents][:, 1:], coords[:, 1:] // factor)
    assert torch.equal(coarse[parents][:, 0], coords[:, 0])


@pytest.mark.parametrize("block_size, shift", [(8, 0), (8, 4), (3, 1), (2048, 0)])
@pytest.mark.parametrize("far", [False, True])
def test_partition(block_size, shift, far):
    coords = random_coords(20, batch_size=4)
    coords = coords[coords[:, 0] != 1]  # sample 1 is empty
    if far:  # at both ends of the largest grid, on each axis
        mirrored = torch.rand(len(coords), 3, generator=torch.Generator().manual_seed(0)) < 0.5
        coords[:, 1:] = torch.where(mirrored, 2047 - coords[:, 1:], coords[:, 1:])
    partition = partition_coords(coords, block_size, shift, batch_size=5)
    assert torch.equal(partition.order[partition.inverse], torch.arange(len(coords)))
    blocks = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // block_size], 1)
    assert torch.equal(partition.coords[partition.block_index], blocks)
    assert np.array_equal(partition.coords.numpy(), np.unique(blocks.numpy(), axis=0))
    packed = torch.cat([blocks, coords[:, 1:]], 1)[partition.order].numpy()
    assert np.array_equal(packed, packed[np.lexsort(packed.T[::-1])])  # by block, inside by (x, y, z)
    lengths = partition.cu_seqlens.diff()
    assert torch.equal(lengths, torch.bincount(partition.block_index, minlength=len(lengths)).int())
    assert partition.max_seqlen == int(lengths.max())
    assert partition.cu_seqlens.dtype == torch.int32
    per_sample = torch.bincount(partition.coords[:, 0], minlength=5)
    assert torch.equal(partition.batch_cu_blocks.diff(), per_sample.int())


def test_partition_of_nothing():
    partition = partition_coords(EMPTY, 8, 4, batch_size=2)
    assert partition.cu_seqlens.tolist() == [0] and partition.max_seqlen == 0
    assert partition.coords.shape == (0, 4) and partition.batch_cu_blocks.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "coords, message",
    [
        (torch.zeros(2, 4), "int32"),
        (torch.zeros(2, 4, dtype=torch.int64), "int32"),
        ([[0, 0, 0, 0]], "int32"),
        (torch.zeros(2, 3, dtype=torch.int32), "shape"),
        (torch.zeros(4, dtype=torch.int32), "shape"),
        (torch.tensor([[0, 0, -1, 0]], dtype=torch.int32), "non-negative"),
        (torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32), "non-negative"),
        (torch.tensor([[0, 0, 0, 64]], dtype=torch.int32), "resolution 64"),
        (torch.tensor([[0, 1, 2, 3], [1, 1, 2, 3], [0, 1, 2, 3]], dtype=torch.int32), "1 duplicate"),
        (torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [1, 1, 2, 3]], dtype=torch.int32), "1 duplicate"),
    ],
)
def test_check_coords_rejects(coords, message):
    with pytest.raises(ValueError, match=f"`voxels`.*{message}"):
        check_coords(coords, 64, name="voxels")


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["ascending", "random"])
def test_check_coords_sorts_only_if_needed(order):
    """Nor is a single value asked for, for which a GPU would be waited for: all facts come at once."""
    coords = random_coords() if order == "random" else unique_coords(random_coords())[0]
    with Calls() as calls:
        check_coords(coords)
    assert ("sort" in calls.names) == (order == "random")
    assert calls.names.count("_local_scalar_dense") == (order == "random")


def test_check_coords_accepts():
    for coords in (random_coords(), EMPTY, CORNER):
        samples = len(coords) and int(coords[:, 0].max()) + 1
        assert check_coords(coords) == check_coords(coords.flip(0)) == samples
    with pytest.raises(ValueError, match="2048"):
        check_coords(torch.full((1, 4), 2048, dtype=torch.int32))
