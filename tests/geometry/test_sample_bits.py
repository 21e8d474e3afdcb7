"""Tests of planes of bits against the same operations on plain tensors of flags."""

import numpy as np
import torch

from diffusers_sparse3d.geometry.marching_cubes.sample_bits import (
    RankedBits,
    bit_places,
    corner_planes,
    count_bits,
    count_ones,
    offsets,
    ones_in_words,
    pack_bits,
    step_table,
    transpose_bytes,
    unpack_bits,
)


def random_flags(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_pack_and_unpack():
    flags = random_flags(5, 512)
    words = pack_bits(2 * flags)
    assert words.dtype == torch.int64 and len(words) == 5 * 8
    assert torch.equal(unpack_bits(words.view(torch.uint8)).to(torch.uint8), flags.flatten())
    assert torch.equal(bit_places(words), flags.flatten().nonzero()[:, 0].int())
    assert torch.equal(count_bits(words.view(5, 8)), flags.long().sum(dim=1))


def test_counts_with_and_without_numpy(monkeypatch):
    rows = torch.arange(256).to(torch.uint8)
    expected = torch.tensor([row.bit_count() for row in range(256)], dtype=torch.uint8)
    assert torch.equal(count_ones(rows), expected)
    # Without NumPy's function the code is that of a GPU.
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert torch.equal(count_ones(rows), expected)
    assert torch.equal(ones_in_words(rows.view(torch.int32)), expected.view(64, 4).sum(dim=1).int())


def test_transpose():
    flags = random_flags(7, 8, 8)
    words = transpose_bytes(pack_bits(flags))
    assert torch.equal(words, pack_bits(flags.mT.contiguous()))


def test_numbers_and_corners_reach_into_other_tiles():
    # There are two tiles per axis, adjacent, and none beyond them.
    flags = torch.nn.functional.pad(random_flags(16, 16, 16), (0, 1, 0, 1, 0, 1))
    tiles = flags[:16, :16, :16].reshape(2, 8, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(8, 512)
    plane = torch.cat([torch.zeros(1, 8, dtype=torch.int64), pack_bits(tiles.contiguous()).view(8, 8)])
    table = torch.nn.functional.pad(torch.arange(1, 9).view(2, 2, 2), (0, 1, 0, 1, 0, 1))
    neighbours = torch.zeros(9, 8, dtype=torch.int32)
    steps = offsets(range(2), plane.device)
    for tile, place in enumerate(torch.cartesian_prod(*(torch.arange(2),) * 3), start=1):
        neighbours[tile] = table[tuple((place + steps).T)]

    planes = corner_planes(plane, neighbours[1:])
    numbers = torch.full(flags.shape, -1, dtype=torch.int32)
    ranks, table_of_steps = RankedBits(plane[:, None], neighbours), step_table(steps, [0] * 8).view(512, 8)
    place = bit_places(plane)
    origin = 8 * torch.cartesian_prod(*(torch.arange(2),) * 3)
    local = offsets(range(8), plane.device)
    numbers[tuple((origin[(place >> 9) - 1] + local[place & 511]).T)] = torch.arange(len(place), dtype=torch.int32)
    for tile in range(1, 9):
        for corner, step in enumerate(steps):
            sample = origin[tile - 1] + local + step
            seen = planes[corner & 3][tile - 1, corner >> 2 : (corner >> 2) + 8].contiguous()
            expected = flags[tuple(sample.T)].bool()
            assert torch.equal(unpack_bits(seen.view(torch.uint8)), expected)
            tiles = torch.full((512,), 8 * tile, dtype=torch.int32)
            found = ranks.numbers(tiles, table_of_steps[:, corner])
            assert torch.equal(found[expected], numbers[tuple(sample.T)][expected])
            same, gaps, _ = ranks.numbers_and_gaps(tiles, table_of_steps[:, corner])
            assert torch.equal(same, found) and torch.equal(gaps, (~expected).nonzero()[:, 0])
