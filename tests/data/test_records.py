"""The record of a mesh holds its fields exactly, but for the rounding to float16."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.index import merge_index, read_index
from diffusers_sparse3d.data.records import (
    mesh_columns,
    mesh_record,
    mesh_section_names,
    pack_bits,
    sdf_section,
    unpack_bits,
)
from diffusers_sparse3d.data.sections import content_hash, decode
from diffusers_sparse3d.data.writer import ShardWriter
from diffusers_sparse3d.geometry.sdf import SDFBlocks, mesh_to_sdf_blocks


def test_record_of_a_mesh(tmp_path):
    mesh = trimesh.creation.box((1, 0.5, 0.25))
    fields = [mesh_to_sdf_blocks(mesh, resolution) for resolution in (64, 32)]
    record = mesh_record("box", fields, [b"first", b"second"], license="CC0-1.0", azimuths=[10.0])
    assert list(record.sections) == mesh_section_names([64, 32])
    assert record.picture == b"first"
    for blocks in fields:
        tensors = decode(record.sections[sdf_section(blocks.resolution)])
        assert torch.equal(tensors["coords"].int(), blocks.coords)
        values, expected = tensors["values"].float(), blocks.values.flatten(1)
        torch.testing.assert_close(values, expected, rtol=0, atol=2**-11)
        assert torch.equal(values.abs() < 1, expected.abs() < 1)
        assert np.array_equal(np.unpackbits(tensors["sharp"].numpy(), axis=1), blocks.sharp.flatten(1).numpy())
        assert tensors["values"].dtype == torch.float16
    grid = np.unpackbits(decode(record.sections["occupancy"])["occupancy"].numpy()).reshape(4, 4, 4)
    assert np.array_equal(np.argwhere(grid), fields[1].coords.numpy())
    images = decode(record.sections["images"])
    assert bytes(images["0"].numpy()) == b"first" and bytes(images["1"].numpy()) == b"second"

    with ShardWriter(tmp_path, mesh_section_names([32, 64]), mesh_columns([32, 64])) as writer:
        writer.add(record)
    merge_index(str(tmp_path))
    (row,) = read_index(Folder(tmp_path), ["id", *mesh_columns([32, 64]).names]).to_pylist()
    for blocks in fields:
        assert row[f"tokens_{blocks.resolution}"] == len(blocks.coords)
        assert row[f"voxels_{blocks.resolution}"] == len(blocks.band()[0])
    assert (row["license"], row["azimuths"], row["num_images"], row["author"]) == ("CC0-1.0", [10.0], 2, None)


def test_values_that_round_to_one_stay_in_the_band():
    values = torch.full((1, 8, 8, 8), 1 - 1e-6)
    values[0, 0, 0, 0], values[0, 0, 0, 1] = 1.0, -(1 - 1e-6)
    blocks = SDFBlocks(torch.zeros(1, 3, dtype=torch.int32), values, torch.zeros(1, 8, 8, 8, dtype=torch.bool), 16)
    stored = decode(mesh_record("x", [blocks], [b""]).sections["sdf_16"])["values"][0]
    assert stored[0] == 1 and -1 < stored[1] < 0 and (stored[1:].abs() < 1).all()


def test_the_first_flag_is_the_highest_bit():
    flags = torch.tensor([[True, *[False] * 6, True, False, True, *[False] * 6]])
    assert pack_bits(flags).tolist() == [[0b10000001, 0b01000000]]
    assert torch.equal(unpack_bits(torch.tensor([[0b10000001, 0b01000000]], dtype=torch.uint8)), flags)


def test_content_hash_knows_where_a_part_ends():
    assert content_hash(["ab", "c"]) == content_hash([b"ab", b"c"])
    assert len({content_hash(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""])}) == 4


def test_fields_of_one_resolution_are_refused():
    blocks = SDFBlocks(torch.zeros(0, 3), torch.zeros(0, 8, 8, 8), torch.zeros(0, 8, 8, 8, dtype=torch.bool), 16)
    for fields in ([], [blocks, blocks]):
        with pytest.raises(ValueError, match="`fields` must be of different resolutions"):
            mesh_record("x", fields, [])
