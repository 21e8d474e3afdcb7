"""Any set of voxels: neighbours, blocks, coarser and finer grids against dictionaries; what is none is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_sparse3d.checks import check_integer, check_number
from diffusers_sparse3d.ops.coordinates import check_coords, decode_coords, encode_coords
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.properties.strategies import ANYTHING, voxels


@given(voxels(size=2048, samples=1 << 16))
def test_keys_have_the_order_of_the_rows(coords):
    check_coords(coords)
    keys = encode_coords(coords)
    assert torch.equal(decode_coords(keys), coords)
    rows = coords.tolist()
    assert [rows[i] for i in keys.argsort().tolist()] == sorted(rows)


@given(voxels())
def test_neighbours_are_those_of_a_dictionary(coords):
    row_of = {tuple(row): index for index, row in enumerate(coords.tolist())}
    offsets = [(x, y, z) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    expected = [
        [row_of.get((b, x + dx, y + dy, z + dz), len(coords)) for b, x, y, z in coords.tolist()]
        for dx, dy, dz in offsets
    ]
    assert CoordinateCache(coords).neighbour_map().tolist() == expected


@given(voxels(), st.integers(1, 4), st.integers(0, 4))
def test_blocks_hold_the_rows_of_one_key(coords, block_size, shift):
    partition = CoordinateCache(coords, 3).partition(block_size, shift)
    assert partition.inverse[partition.order].tolist() == list(range(len(coords)))
    keys = [(b, *((c + shift) // block_size for c in xyz)) for b, *xyz in coords.tolist()]
    bounds = partition.cu_seqlens.tolist()
    blocks = [{keys[row] for row in partition.order[i:j].tolist()} for i, j in itertools.pairwise(bounds)]
    assert all(len(block) == 1 for block in blocks)
    assert [key for (key,) in blocks] == sorted(set(keys))


@given(voxels(), st.integers(1, 5))
def test_coarser_and_finer_grids(coords, factor):
    cache = CoordinateCache(coords)
    coarse, parents = cache.downsample(factor)
    expected = [[b, *(c // factor for c in xyz)] for b, *xyz in coords.tolist()]
    assert coarse.coords[parents].tolist() == expected
    assert coarse.coords.tolist() == sorted(map(list, {tuple(row) for row in expected}))
    fine = cache.subdivide()
    check_coords(fine.coords)
    back, rows = fine.downsample(2)
    assert sorted(back.coords.tolist()) == sorted(coords.tolist())
    assert torch.equal(back.coords[rows], coords.repeat_interleave(8, dim=0))


@given(voxels(least=1), st.data())
def test_rows_that_are_no_voxels(coords, data):
    row, column = data.draw(st.integers(0, len(coords) - 1)), data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["dtype", "shape", "negative", "large", "twice"]))
    if kind == "dtype":
        wrong = coords.to(data.draw(st.sampled_from([torch.int64, torch.float32, torch.bool, torch.complex64])))
    elif kind == "shape":
        wrong = data.draw(st.sampled_from([coords[:, :3], coords[0], coords[None], coords.flatten()]))
    elif kind == "twice":
        wrong = torch.cat([coords, coords[row : row + 1]])
    else:
        wrong = coords.clone()
        wrong[row, column] = -1 if kind == "negative" else 6 if column else 1 << 16
    with pytest.raises(ValueError, match="`coords`"):
        check_coords(wrong, 6)


@given(ANYTHING)
def test_single_values_are_taken_or_named(value):
    for check, kind in ((check_integer, int), (check_number, float)):
        try:
            result = check("size", value, 0, 64)
        except ValueError as error:
            assert str(error).startswith("`size` must be")
        else:
            assert type(result) is kind and 0 <= result <= 64 and result == value and not isinstance(value, bool)
