"""The benchmark of the wait in a training runs, at a tiny size, and a slow loader shows in its figures."""

import json
import time

import pytest

import loader_wait
from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.training.batches import BlockDataset
from diffusers_sparse3d.training.dataset import SparseSDFDataset


def test_a_slow_loader_is_noticed(tmp_path, monkeypatch):
    keys = []

    class SlowDataset(BlockDataset):
        def __getitem__(self, key):
            keys.append(key.row)
            time.sleep(0.1)
            return super().__getitem__(key)

    monkeypatch.setattr(loader_wait, "BlockDataset", SlowDataset)
    options = ["--tiny", "--workers", "0", "--steps", "2", "--tokens", "20", "--samples", "3"]
    loader_wait.main(
        loader_wait.parse_args([*options, "--work", str(tmp_path), "--json", str(tmp_path / "wait.json")])
    )
    report = json.loads((tmp_path / "wait.json").read_text())
    (row,) = report["rows"]
    assert (row["storage"], row["workers"]) == ("disk", 0) and "device" not in report["hardware"]
    # Seconds outside of a step: the pause, and the bookkeeping of the loop.
    assert row["outside"] * row["step_seconds"] / (1 - row["outside"]) > 0.1
    # Three steps before those that are timed, and one that is profiled.
    assert len(keys) == 6 and set(keys) == {0, 1, 2}


def test_records_are_the_cells_of_a_torus(tmp_path):
    folder = Folder(tmp_path)
    loader_wait.write_dataset(folder, 150, 2)
    dataset = SparseSDFDataset(folder, "train", 1024)
    assert dataset.num_blocks(1024).tolist() == [150] * 2
    blocks = dataset.blocks(1, 1024)
    assert blocks.values.min() < -0.3 and blocks.values.max() > 0.3 and blocks.coords.max() < 128
    with pytest.raises(ValueError, match="`samples` and `tokens`"):
        loader_wait.write_dataset(folder, 150, 0)


def test_share_outside_of_steps():
    # Steps of one second; two seconds outside of the last two.
    assert loader_wait.share_outside([1.0] * 4, [1.0, 2.0, 4.0, 6.0], 2) == pytest.approx(0.5)
    assert loader_wait.share_outside([1.0] * 4, [1.0, 2.0, 3.0, 4.0], 1) == pytest.approx(0.0)
    for first in (0, 4):
        with pytest.raises(ValueError, match="from 1 to 3"):
            loader_wait.share_outside([1.0] * 4, [1.0, 2.0, 3.0, 4.0], first)
