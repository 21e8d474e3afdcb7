"""Datasets and caches in S3: a real server, which runs here, and every request to it counted."""

import logging
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from diffusers_sparse3d import DenseVAE
from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.range_cache import RangeCache
from diffusers_sparse3d.data.record_cache import RecordCache
from diffusers_sparse3d.data.records import Record
from diffusers_sparse3d.data.sections import encode
from diffusers_sparse3d.training import dense_vae
from diffusers_sparse3d.training.batches import BlockDataset, pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dataset import SparseSDFDataset, dataset_splits
from diffusers_sparse3d.training.latents import cache_latents
from tests.data.shapes import write_dataset
from tests.training.tiny import DENSE_VAE


moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


class Requests(logging.Handler):
    """The requests that the server has answered: method, path and status."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def take(self):
        lines, self.lines = self.lines, []
        return lines


@pytest.fixture(scope="module")
def requests():
    logger, handler = logging.getLogger("werkzeug"), Requests()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def bucket(requests):
    """The address of a bucket and the options that reach it."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "key", "secret": "secret"}
    Folder("s3://bucket", options).filesystem.mkdir("bucket")
    yield "s3://bucket", options
    server.stop()


@pytest.fixture(scope="module")
def datasets(bucket, tmp_path_factory):
    """The same dataset on the disk and in the bucket."""
    local, remote = tmp_path_factory.mktemp("data") / "shapes", Folder(f"{bucket[0]}/shapes", bucket[1])
    write_dataset(local)
    write_dataset(remote)
    return local, remote


def test_the_same_files(datasets):
    local, remote = datasets
    for suffix in (".bin", ".parquet"):
        files = {path.name: path.read_bytes() for path in (local / "shards").glob(f"*{suffix}")}
        assert len(files) > 1 and files == {
            name: remote.read(f"shards/{name}") for name in remote.sizes("shards", suffix)
        }
    assert dataset_splits(remote) == {"train", "val"}


def test_reading_a_sample_is_one_ranged_request(datasets, requests):
    local, remote = (SparseSDFDataset(folder) for folder in datasets)
    for index in range(len(local)):
        requests.take()
        blocks = remote.packed_blocks(index, 32)
        (line,) = requests.take()
        assert "GET /bucket/shapes/shards/0-00000" in line and " 206 " in line
        expected = local.packed_blocks(index, 32)
        assert all(torch.equal(blocks[name], expected[name]) for name in expected)
        assert torch.equal(remote.occupied_cells(index), local.occupied_cells(index))
        assert remote.pictures(index)[-1].tobytes() == local.pictures(index)[-1].tobytes()


def test_workers_of_a_loader_have_connections_of_their_own(datasets):
    """Forked after this process has read from the server."""
    local, remote = (BlockDataset(SparseSDFDataset(folder)) for folder in datasets)
    batches = [[(0, 32), (2, 32)], [(1, 32)], [(1, 32), (0, 32)]]
    loaders = [
        DataLoader(data, batch_sampler=batches, collate_fn=pack, num_workers=workers)
        for data, workers in ((local, 0), (remote, 2))
    ]
    for first, second in zip(*loaders, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_samples_of_a_batch_are_requested_at_the_same_time(datasets, monkeypatch):
    data, running, most = BlockDataset(SparseSDFDataset(datasets[1])), [], []
    read = Folder.read

    def slow(self, *arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return read(self, *arguments)

    monkeypatch.setattr(Folder, "read", slow)
    keys = [(row % 3, 32) for row in range(7)]
    items = data.__getitems__(keys)
    assert max(most) > 3
    assert all(torch.equal(item["values"], data[key]["values"]) for item, key in zip(items, keys))


def test_what_was_read_is_kept_on_the_disk(tmp_path, datasets, requests):
    remote = SparseSDFDataset(Folder(datasets[1], cache=RangeCache(tmp_path, 10**6)))
    first = [remote.packed_blocks(index, 32) for index in range(3)]
    requests.take()
    again = SparseSDFDataset(Folder(datasets[1], cache=RangeCache(tmp_path, 10**6)))
    requests.take()
    assert all(torch.equal(again.packed_blocks(index, 32)["values"], first[index]["values"]) for index in range(3))
    assert requests.take() == []
    # A damaged file, and one that was deleted, are fetched again.
    files = sorted(path for path in tmp_path.glob("??/*"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].unlink()
    assert all(torch.equal(again.packed_blocks(index, 32)["values"], first[index]["values"]) for index in range(3))
    assert len(requests.take()) == 2
    assert RangeCache(tmp_path, 10**6).num_bytes == sum(path.stat().st_size for path in tmp_path.glob("??/*"))


def test_a_cache_in_a_bucket(bucket, requests):
    cache = RecordCache(Folder(bucket[0], bucket[1]) / "latents", ["latents"], pa.schema([("tokens", pa.int64())]), {})
    keys = pa.array([f"key{number}" for number in (3, 1, 2, 1)])
    assert cache.missing(keys) == [0, 1, 2] and cache.missing(keys, 1, 2) == [1]

    def records(rows):
        for row in rows:
            section = encode({"mean": np.full(row + 1, row, np.float32)})
            yield Record(keys[row].as_py(), {"latents": section}, {"tokens": row + 1})

    cache.add(records(cache.missing(keys, 0, 2)))
    cache.add(records(cache.missing(keys, 1, 2)))
    reader = cache.open(keys)
    requests.take()
    assert [reader.read(row, "latents")["mean"].tolist() for row in range(4)] == [[0], [1, 1], [2, 2, 2], [1, 1]]
    assert len(requests.take()) == 4


def test_a_training_from_a_bucket(tmp_path, datasets, bucket):
    """Its latents, which are in the bucket too, are those that its VAE gives for the dataset on the disk."""
    storage = {"data": str(datasets[1]), "data_options": bucket[1], "data_cache_dir": str(tmp_path / "cache")}
    training = {"max_train_steps": 1, "batch_size": 2, "num_workers": 0, "cpu": True, "num_pictures": 1}
    paths = {"output_dir": str(tmp_path / "run"), "latents_dir": f"{bucket[0]}/training"}
    config = {**storage, **training, **paths, "model": {**DENSE_VAE, "sample_size": 2}}
    dense_vae.train(build_config(dense_vae.DenseVAEConfig, config))
    assert list((tmp_path / "cache").glob("??/*"))
    vae = DenseVAE.from_pretrained(tmp_path / "run" / "vae")
    dataset, accelerator = SparseSDFDataset(datasets[0], "train"), Accelerator(cpu=True)
    local, remote = (
        cache_latents(vae, dataset, folder, accelerator, 2, 0)
        for folder in (tmp_path / "latents", Folder(*bucket) / "training")
    )
    for index in range(2):
        assert torch.equal(local[index]["mean"], remote[index]["mean"])
    # The training has written the only shard that there is.
    assert len(Folder(*bucket).filesystem.glob("bucket/training/*/shards/*.bin")) == 1
