"""Caches of latents and images: made again whenever something that they depend on has changed, and only then."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_sparse3d import DenseVAE, SparseVAE
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor
from diffusers_sparse3d.training import images, latents
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.images import cache_images
from diffusers_sparse3d.training.latents import LatentDataset, cache_latents, latent_files
from diffusers_sparse3d.training.orientations import UNCHANGED, Orientation


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def encoded(monkeypatch):
    """Number of batches that were encoded, a list that grows."""
    batches = []
    encode = latents.encode_dense
    monkeypatch.setattr(latents, "encode_dense", lambda vae, batch: batches.append(1) or encode(vae, batch))
    return batches


def test_latents_are_encoded_once(tmp_path, small_data, dense_vae_model, accelerator, encoded):
    data = SparseSDFDataset(small_data, "train", sdf=False, image=False)
    vae = DenseVAE(**dense_vae_model)

    def cache(split="train", orientation=UNCHANGED):
        before = len(encoded)
        dataset = cache_latents(vae, data, tmp_path, split, accelerator, 2, 0, orientation)
        assert len(dataset) == len(data)
        return len(encoded) - before

    assert (cache(), cache()) == (2, 0)
    assert (cache(orientation=Orientation(1)), cache(orientation=Orientation(1)), cache()) == (2, 0, 0)
    # Another weight, at the very end of the encoder: other latents.
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] += 0.01
    assert (cache(), cache()) == (2, 0)
    # Other meshes of the same number.
    data.rows = data.rows[::-1]
    assert (cache(), cache()) == (2, 0)


def test_a_missing_part_is_noticed(tmp_path, small_data, dense_vae_model, accelerator, encoded):
    """Two of three processes' files are not the split, though both have the right identity."""
    data = SparseSDFDataset(small_data, "train", sdf=False, image=False)
    vae = DenseVAE(**dense_vae_model)
    cache_latents(vae, data, tmp_path, "train", accelerator, 2, 0)
    (whole,) = tmp_path.glob("latents-train-*.safetensors")
    with safe_open(whole, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    whole.unlink()
    for part in (0, 2):
        rows = {name: tensor[part::3].contiguous() for name, tensor in tensors.items()}
        save_file(rows, tmp_path / f"latents-train-{part:02d}-of-03.safetensors", metadata=metadata)
    encoded.clear()
    assert len(cache_latents(vae, data, tmp_path, "train", accelerator, 2, 0)) == len(data)
    assert len(encoded) == 2
    assert [path.name for path in latent_files(tmp_path, "train")] == ["latents-train-00-of-01.safetensors"]


def test_latents_of_many_processes_are_in_the_order_of_the_data(tmp_path):
    """Process p of P encodes the samples p, p + P, ...; beyond 100 processes names do not sort as numbers."""
    processes, samples = 101, 205
    for process in range(processes):
        mine = torch.arange(process, samples, processes)
        tensors = {"mean": mine.float()[:, None], "logvar": mine.float()[:, None]}
        tensors["sizes"] = torch.ones(len(mine), dtype=torch.long)
        save_file(tensors, tmp_path / f"latents-train-{process:02d}-of-{processes:02d}.safetensors")
    dataset = LatentDataset(latent_files(tmp_path, "train"))
    assert [int(dataset[index]["mean"]) for index in range(samples)] == list(range(samples))


def test_fewer_samples_than_processes(tmp_path, small_data, dense_vae_model, sparse_vae_model):
    """Two samples in three processes: the third has none, and the dataset is that of one process."""
    data = SparseSDFDataset(small_data, "val", 32, image=False)
    for vae in (DenseVAE(**dense_vae_model), SparseVAE(**sparse_vae_model)):
        folder = tmp_path / type(vae).__name__
        for index in range(3):
            process = SimpleNamespace(
                process_index=index,
                num_processes=3,
                is_main_process=index == 0,
                device=torch.device("cpu"),
                autocast=nullcontext,
                wait_for_everyone=lambda: None,
            )
            dataset = cache_latents(vae, data, folder, "val", process, 2, 0)
        alone = cache_latents(vae, data, tmp_path / "alone", "val", Accelerator(cpu=True), 2, 0)
        assert len(dataset) == len(alone) == 2
        for index in range(2):
            for name, value in dataset[index].items():
                torch.testing.assert_close(value, alone[index][name], rtol=1e-2, atol=1e-2)
        assert dataset.statistics() == pytest.approx(alone.statistics(), rel=1e-2, abs=1e-3)
        assert sorted(path.suffix for path in folder.iterdir()) == 3 * [".safetensors"]


def test_latents_of_a_split_are_not_those_of_another(tmp_path, small_data, sparse_vae_model, accelerator):
    vae = SparseVAE(**sparse_vae_model)
    sizes = {}
    for split in ("train", "val"):
        data = SparseSDFDataset(small_data, split, 32, occupancy=False, image=False)
        dataset = cache_latents(vae, data, tmp_path, split, accelerator, 2, 0)
        sizes[split] = [len(dataset[index]["coords"]) for index in range(len(dataset))]
        assert sizes[split] == [len(data.blocks(index, 32).coords) for index in range(len(data))]
    assert len(sizes["train"]) == 4 and len(sizes["val"]) == 2


def test_images_are_prepared_once(tmp_path, small_data, accelerator, monkeypatch):
    data = SparseSDFDataset(small_data, "val", sdf=False, occupancy=False)
    prepared = []
    original = images._PreparedImages.__getitem__
    monkeypatch.setattr(
        images._PreparedImages, "__getitem__", lambda self, index: prepared.append(index) or original(self, index)
    )

    def cache(size=28, data=data):
        before = len(prepared)
        array = cache_images(data, Sparse3DImageProcessor(size, 14), tmp_path, "val", accelerator, 0)
        assert array.shape == (4, 4, size, size)
        return len(prepared) - before

    assert (cache(), cache()) == (2, 0)
    assert (cache(size=42), cache(size=42)) == (2, 0)
    # A dataset of the same ids in another folder has other pictures.
    moved = SparseSDFDataset(small_data, "val", sdf=False, occupancy=False)
    moved.root = tmp_path / "copy"
    moved.root.mkdir()
    for file in small_data.glob("*.safetensors"):
        (moved.root / file.name).symlink_to(file)
    assert (cache(size=42, data=moved), cache(size=42, data=moved)) == (2, 0)


def test_prepared_images_are_in_the_order_of_the_rows(tmp_path, small_data, accelerator):
    data = SparseSDFDataset(small_data, "train", sdf=False, occupancy=False)
    processor = Sparse3DImageProcessor(28, 14)
    array = cache_images(data, processor, tmp_path, "train", accelerator, 0)
    singles = [images._PreparedImages(data, processor)[index].numpy() for index in range(len(data))]
    assert np.array_equal(array, np.concatenate(singles))
    assert len(np.unique(array.reshape(8, -1), axis=0)) == 8
