"""Datasets of the format before shards of records: read as they are, and converted."""

import pickle

import numpy as np
import pytest
import torch

from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.training.convert_dataset import main
from diffusers_sparse3d.training.dataset import SparseSDFDataset, dataset_splits
from tests.data.shapes import RESOLUTIONS, SHAPES, write_dataset, write_old_dataset


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same shapes in the old format, converted from it, and written at once."""
    root = tmp_path_factory.mktemp("datasets")
    write_old_dataset(root / "old")
    main(["--input", str(root / "old"), "--output", str(root / "converted"), "--shard_size", "1"])
    write_dataset(root / "new")
    return [root / name for name in ("old", "converted", "new")]


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) if isinstance(first[key], torch.Tensor) else first[key] == second[key]
        for key in first
    )


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_all_formats_are_one_dataset(folders, split):
    datasets = [SparseSDFDataset(folder, split, view=-1) for folder in folders]
    names = [name for number, name in enumerate(SHAPES) if split in (None, "val" if number == 1 else "train")]
    for data in datasets:
        assert list(data.ids) == names and [data.find(name) for name in names] == list(range(len(names)))
        assert dataset_splits(data.folder) == {"train", "val"}
        # Every shape has a given image, whose azimuth is not known.
        single = {azimuth for index in range(len(names)) for azimuth in data.azimuths(index)}
        together = data.all_azimuths()
        assert np.isnan(together).sum() == 1 and {*together[~np.isnan(together)]} == {x for x in single if x == x}
        assert data.num_images.tolist() == [list(SHAPES).index(name) + 1 for name in names]
    for index, resolution in ((index, resolution) for index in range(len(names)) for resolution in RESOLUTIONS):
        first, second, third = (data[index, resolution] for data in datasets)
        assert same(first, second) and same(first, third)
        assert len({len(data.pictures(index)) for data in datasets}) == 1
        assert len({data.row(index)["num_images"] for data in datasets}) == 1
        assert np.array_equal(datasets[0].azimuths(index), datasets[1].azimuths(index), equal_nan=True)
    for resolution in RESOLUTIONS:
        assert len({tuple(data.num_blocks(resolution)) for data in datasets}) == 1
    # So caches of the one are those of the other.
    for section in ("occupancy", "sdf_16", "sdf_32", "images"):
        first, second, third = (data.content(section).to_pylist() for data in datasets)
        assert first == second == third and None not in first


def test_some_meshes(folders):
    for folder in folders:
        data = SparseSDFDataset(folder).select([2, 0]).select([1, 0, 0])
        assert list(data.ids) == ["box", "annulus", "annulus"] and data.ids[1:] == ["annulus", "annulus"]
        whole = SparseSDFDataset(folder)
        assert torch.equal(data.packed_blocks(1, 32)["values"], whole.packed_blocks(2, 32)["values"])
        expected = [whole.content("sdf_32")[row].as_py() for row in (0, 2, 2)]
        assert data.content("sdf_32").to_pylist() == expected
        assert torch.equal(pickle.loads(pickle.dumps(data)).blocks(0, 16).values, whole.blocks(0, 16).values)
        with pytest.raises(ValueError, match=r"`name` must be the id of a mesh .* got 'sphere'"):
            data.find("sphere")


def test_conversion_can_be_started_again(tmp_path, folders):
    target = tmp_path / "target"
    main(["--input", str(folders[0]), "--output", str(target), "--shard_size", "1"])
    before = {path.name: path.read_bytes() for path in (target / "shards").iterdir()}
    assert before == {path.name: path.read_bytes() for path in (folders[1] / "shards").iterdir()}
    kept = sorted(before)[:2]
    for name in before.keys() - set(kept):
        (target / "shards" / name).unlink()
    times = {name: (target / "shards" / name).stat().st_mtime_ns for name in kept}
    main(["--input", str(folders[0]), "--output", str(target), "--shard_size", "1"])
    assert before == {path.name: path.read_bytes() for path in (target / "shards").iterdir()}
    assert times == {name: (target / "shards" / name).stat().st_mtime_ns for name in kept}
    assert len(SparseSDFDataset(target)) == 3


def test_what_is_no_dataset_is_refused(tmp_path, folders, capsys):
    with pytest.raises(ValueError, match=r"`root` must be a dataset, got .* no metadata.json"):
        SparseSDFDataset(tmp_path)
    (tmp_path / "metadata.json").write_text((folders[0] / "metadata.json").read_text())
    with pytest.raises(ValueError, match=r"whose preparation is complete, .* no index.parquet"):
        SparseSDFDataset(tmp_path)
    (tmp_path / "metadata.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version 99"):
        SparseSDFDataset(tmp_path)
    for arguments in (["--input", str(folders[2])], ["--input", str(tmp_path / "none")]):
        with pytest.raises(SystemExit):
            main([*arguments, "--output", str(tmp_path / "x")])
        assert "must be a dataset of the format before" in capsys.readouterr().err
    assert not Folder(tmp_path / "x").exists("metadata.json")
