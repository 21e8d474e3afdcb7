"""The dataset gives back exactly what went in, in the orders that the models use."""

import math
import pickle
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
import trimesh
from PIL import Image

from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks
from diffusers_sparse3d.training.batches import BlockDataset, expand_blocks, pack
from diffusers_sparse3d.training.dataset import SparseSDFDataset, jitter_color
from diffusers_sparse3d.training.preparation.command import main


MESHES = {
    "box": trimesh.creation.box((1, 0.5, 0.25)),
    "torus": trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    meshes = tmp_path_factory.mktemp("meshes")
    for name, mesh in MESHES.items():
        mesh.export(meshes / f"{name}.off")
    output = tmp_path_factory.mktemp("dataset")
    options = ["--resolutions", "32", "64", "--num_views", "3", "--image_size", "32", "--num_workers", "0"]
    main(["--input", str(meshes), "--output", str(output), "--val_fraction", "0", *options])
    return output


@pytest.mark.parametrize("resolution", [32, 64])
def test_round_trip_is_exact(root, resolution):
    dataset = SparseSDFDataset(root)
    assert list(dataset.ids) == list(MESHES)
    for index, name in enumerate(MESHES):
        expected = mesh_to_sdf_blocks(MESHES[name], resolution)
        item = dataset[index, resolution]
        assert item["id"] == name
        torch.testing.assert_close(item["block_coords"], expected.coords, rtol=0, atol=0)
        # float16, and what is in the band stays in it.
        torch.testing.assert_close(item["block_values"], expected.values.flatten(1), rtol=0, atol=2**-11)
        assert torch.equal(item["block_values"].abs() < 1, expected.values.flatten(1).abs() < 1)
        assert torch.equal(item["block_sharp"], expected.sharp.flatten(1))
        coords, feats, _ = expected.band()
        assert torch.equal(item["coords"], coords)
        torch.testing.assert_close(item["feats"], feats, rtol=0, atol=2**-11)


def test_occupancy_is_the_blocks_of_the_smallest_resolution(root):
    item = SparseSDFDataset(root)[1]
    assert item["resolution"] == 32
    assert item["occupancy"].shape == (1, 4, 4, 4)
    assert torch.equal(item["occupancy"][0].nonzero(), item["block_coords"].long())


def test_vae_targets_follow_the_decoder(root):
    dataset = SparseSDFDataset(root, resolution=64)
    blocks = BlockDataset(dataset)
    coords, target, is_input, is_sharp = expand_blocks(pack([blocks[index, 64] for index in (0, 1)]))
    assert target.shape == (len(coords), 1)
    band = {
        (sample, *row): value
        for sample in (0, 1)
        for row, value in zip(dataset[sample]["coords"].tolist(), dataset[sample]["feats"][:, 0].tolist())
    }
    assert {tuple(row) for row in coords[is_input].tolist()} == band.keys()
    assert [band[tuple(row)] for row in coords[is_input].tolist()] == target[is_input, 0].tolist()
    assert (target[~is_input].abs() == 1).all()
    assert is_sharp.any() and not (is_sharp & ~is_input).any()
    # Near a sharp edge of the box: the first sample of the batch has its twelve edges there.
    box = coords[:, 0] == 0
    corner = MESHES["box"].extents * 1.9 / 2 - 0.02
    position = (-1 + 2 * coords[:, 1:] / 63).abs()
    near_corner = box & ((position - torch.tensor(corner)).norm(dim=1) < 0.05)
    assert near_corner.any() and is_sharp[near_corner & is_input].all()


def test_views_and_splits(root):
    first, last = (SparseSDFDataset(root, view=view, sdf=False, occupancy=False)[0] for view in (0, -1))
    assert set(first) == {"id", "index", "resolution", "image"}
    assert not torch.equal(first["image"], last["image"])
    random = SparseSDFDataset(root, sdf=False, occupancy=False)
    torch.manual_seed(0)
    assert len({random[0]["image"].sum().item() for _ in range(20)}) == 3
    with pytest.raises(ValueError, match=r"`split` must .* got 'val'"):
        SparseSDFDataset(root, split="val")
    with pytest.raises(ValueError, match=r"`resolution` must .* got \[128\]"):
        SparseSDFDataset(root, resolution=128)


def test_color_jitter_keeps_alpha():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    torch.manual_seed(0)
    jittered = jitter_color(image, 0.4)
    assert jittered.getpixel((0, 0))[:3] != (200, 100, 50)
    assert jittered.getpixel((0, 0))[3] == 128
    assert jitter_color(image, 0.0) is image


def test_dataset_travels_to_workers(root):
    dataset = SparseSDFDataset(root, view=0)
    expected = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))[0]
    assert torch.equal(copy["image"], expected["image"]) and torch.equal(copy["feats"], expected["feats"])


def test_azimuths_of_all_meshes_have_nan_where_one_is_not_known():
    def azimuths(*views):
        known, numbers = zip(*views)
        table = pa.table({"azimuths": pa.array(known, pa.list_(pa.float32())), "num_images": list(numbers)})
        return SparseSDFDataset.all_azimuths(SimpleNamespace(table=table)).tolist()

    assert sorted(azimuths(([0.0, 90.0], 2), ([90.0], 1))) == [0, 90]
    for views in ([([0.0], 2)], [([0.0], 1), (None, 3)]):
        known, unknown = azimuths(*views)
        assert known == 0 and math.isnan(unknown)
    assert azimuths(([0.0], 1), (None, 0)) == [0]
