"""The benchmark of reading runs, at a tiny size, and its table says what is in its rows."""

import json

import pytest

import data
import report_data
from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.training.dataset import SparseSDFDataset


RESOLUTION, TOKENS = 64, 3000


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path / "data")
    data.write_dataset(folder, RESOLUTION, TOKENS, megabytes=0)
    return folder


def test_samples_have_the_blocks_of_a_surface(folder):
    dataset = SparseSDFDataset(folder, "train", RESOLUTION)
    assert dataset.num_blocks(RESOLUTION).tolist() == [12] * 4
    blocks = dataset.blocks(0, RESOLUTION)
    cells = blocks.coords.long() @ blocks.coords.new_tensor([64, 8, 1]).long()
    assert (cells.diff() > 0).all() and cells.max() < 512
    assert blocks.values.abs().max() <= 1 and blocks.values.unique().numel() > 1000
    assert data.tokens_of(1024, 46_000) == 46_000 and data.tokens_of(256, 46_000) == 2875


def test_steps_are_those_of_the_vae_on_one_gpu(tmp_path, monkeypatch):
    """Wherever their row is in the file, and unless other ones are asked for."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    runs = (("dit", 1), ("vae", 2), ("vae", 1))
    rows = [{"model": model, "gpus": gpus, "tokens_per_second": 10 * i} for i, (model, gpus) in enumerate(runs)]
    (results / "scaling_vae.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(data, "ROOT", tmp_path)
    assert data.parse_args([]).tokens_per_second == 20
    assert data.parse_args(["--tokens_per_second", "5"]).tokens_per_second == 5


def test_reading_and_waiting(folder, monkeypatch):
    monkeypatch.setattr(data, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(data, "STEPS", 3)
    row = data.measure_reading(folder, RESOLUTION, 2, 0)
    assert row["samples_per_second"] > 0
    # 3 bytes of coordinates, 1,024 of values and 64 of bits for each of 12 blocks.
    assert row["mb_per_second"] == pytest.approx(row["samples_per_second"] * 12 * 1091 / 1e6)
    assert 0 < data.measure_wait(folder, RESOLUTION, 2, 0, 0.001) < 1
    monkeypatch.setattr(data, "batches_of", lambda *_: iter([{}] * 9))
    assert data.measure_wait(folder, RESOLUTION, 2, 0, 0.02) < 0.02


def test_large_index(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(data, "GROUP_ROWS", 40)
    large = Folder(tmp_path / "large")
    data.write_large_index(folder, large, RESOLUTION, 100)
    data.share_shards(folder, large, RESOLUTION)
    row = data.measure_index(str(large), RESOLUTION, 4)
    assert row["rows"] == 98 and 0 < row["open_seconds"] < row["first_batch_seconds"]
    dataset = SparseSDFDataset(large, "train", RESOLUTION)
    assert len(set(dataset.ids)) == 98


def test_table():
    def rows(storage, resolution, waits):
        about = {"storage": storage, "resolution": resolution, "tokens": 2875}
        speeds = {"samples_per_second": 12.5, "mb_per_second": 345.6}
        for workers, wait in enumerate(waits):
            yield {"kind": "reading", **about, "workers": workers, **speeds}
            if workers:
                yield {"kind": "wait", **about, "workers": workers, "step_seconds": 0.16, "wait": wait}

    index = {"kind": "index", "rows": 980_000, "open_seconds": 1.5, "first_batch_seconds": 6.0, "index_mb": 200.0}
    found = [*rows("disk", 256, [0, 0.3, 0.01]), *rows("disk", 1024, [0, 0.02]), *rows("s3", 256, [0, 0.5]), index]
    lines = report_data.data_tables({"rows": found})
    assert "| 256^3 | 2,875 | local disk | 2 | 12.5 | 346 | 1.0% |" in lines
    assert "| 256^3 | 2,875 | S3 on the same machine | 0 | 12.5 | 346 | - |" in lines
    text = "\n".join(lines)
    assert "An index of 980,000 meshes is open after 1.5 s and adds 200 MB" in text
    assert "local disk: 2 at 256^3, 1 at 1024^3." in text
    # 2,875 blocks of 1,091 bytes, and latents of 70.
    assert "| 256^3 | 3.14 MB | 201 kB | 3.14 GB / 201 MB | 314 GB / 20.1 GB | 31.4 TB / 2.01 TB |" in lines
    assert "S3 on the same machine: more than were tried, on this machine." in text


def test_workers_that_keep_a_training_busy():
    rows = [
        {"storage": "disk", "workers": workers, "step_seconds": 0.2, "outside": outside}
        for workers, outside in ((1, 0.3), (2, 0.021), (4, 0.012), (8, 0.01))
    ]
    lines = report_data.loader_wait_table({"rows": rows})
    assert lines[3] == "| local disk | 2 | 0.200 | 2.1% |" and lines[-1].endswith("with 4 workers.")
    assert report_data.loader_wait_table({"rows": rows[:2]})[-1].endswith("with more workers than were tried.")
