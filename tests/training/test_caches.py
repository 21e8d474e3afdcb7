"""Caches of latents and images: made for what they were not made for yet, never taken for anything else."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from diffusers_sparse3d import DenseVAE, SparseVAE
from diffusers_sparse3d.data import record_cache
from diffusers_sparse3d.pipelines.image_processor import IMAGENET_MEAN, IMAGENET_STD, Sparse3DImageProcessor
from diffusers_sparse3d.training import images, latents
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.images import cache_images
from diffusers_sparse3d.training.latents import cache_latents, fingerprint
from diffusers_sparse3d.training.orientations import UNCHANGED, Orientation
from diffusers_sparse3d.training.preparation import command


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def encoded(monkeypatch):
    """Number of samples of each batch that was encoded, a list that grows."""
    batches = []
    encode = latents.encode_dense
    monkeypatch.setattr(
        latents, "encode_dense", lambda vae, batch: batches.append(len(batch["occupancy"])) or encode(vae, batch)
    )
    return batches


def dense_data(small_data, split="train"):
    return SparseSDFDataset(small_data, split, sdf=False, image=False)


def test_latents_are_encoded_once(tmp_path, small_data, dense_vae_model, accelerator, encoded):
    data, vae = dense_data(small_data), DenseVAE(**dense_vae_model)

    def different_occupancies(split):
        data = dense_data(small_data, split)
        return {data.occupied_cells(index).numpy().tobytes() for index in range(len(data))}

    def cache(data=data, orientation=UNCHANGED):
        encoded.clear()
        dataset = cache_latents(vae, data, tmp_path, accelerator, 2, 0, orientation)
        assert len(dataset) == len(data)
        return sum(encoded)

    # Meshes with the same occupancy have the same latents, which are encoded once.
    grids = {split: different_occupancies(split) for split in ("train", "val")}
    assert (cache(), cache()) == (len(grids["train"]), 0)
    # What differs is encoded, and nothing else: the order of the meshes and their split do not matter.
    everything = dense_data(small_data, None).select([5, 4, 3, 2, 1, 0])
    new = len(grids["val"] - grids["train"])
    assert new > 0 and (cache(everything), cache(dense_data(small_data, "val")), cache()) == (new, 0, 0)
    turned = Orientation(1)
    assert (cache(orientation=turned), cache(orientation=turned), cache()) == (len(grids["train"]), 0, 0)
    # The normalisation, which is known after encoding, changes nothing; another weight, at the very end, does.
    vae.register_to_config(shift_factor=1.0, scaling_factor=2.0)
    assert cache() == 0
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] += 0.01
    assert (cache(), cache()) == (len(grids["train"]), 0)
    abouts = [json.loads(path.read_text()) for path in tmp_path.glob("*/about.json")]
    assert len(abouts) == 3 and {about["vae"] for about in abouts} == {"DenseVAE"}


def test_latents_follow_the_content_not_the_ids(tmp_path, small_data, sparse_vae_model, accelerator):
    """The same ids, prepared anew in the same folder with another axis up: other fields, other latents."""
    meshes, output = small_data.parent, tmp_path / "data"
    options = ["--resolutions", "32", "--num_views", "1", "--image_size", "32", "--num_workers", "0", "--limit", "2"]
    vae, processor, seen = SparseVAE(**sparse_vae_model), Sparse3DImageProcessor(28, 14), []
    for extra in ([], ["--up_axis", "x", "--seed", "1"]):
        command.main(["--input", str(meshes), "--output", str(output), *options, *extra])
        data = SparseSDFDataset(output)
        dataset = cache_latents(vae, data, tmp_path / "cache", accelerator, 2, 0)
        pictures = cache_images(data, processor, tmp_path / "cache", accelerator, 0)
        seen.append((dataset[0]["mean"], pictures.view(0, 0)))
        fresh = cache_latents(vae, data, tmp_path / f"fresh{len(seen)}", accelerator, 2, 0)
        assert torch.equal(fresh[0]["mean"], dataset[0]["mean"])
        output.rename(tmp_path / f"old{len(seen)}")
    assert list(data.ids) == list(SparseSDFDataset(tmp_path / "old1").ids)
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def test_what_was_encoded_before_a_kill_is_kept(
    tmp_path, small_data, dense_vae_model, accelerator, encoded, monkeypatch
):
    data, vae = dense_data(small_data), DenseVAE(**dense_vae_model)
    count, encode = [], latents.encode_dense

    def broken(vae, batch):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return encode(vae, batch)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode_dense", broken)
        # A shard after each sample, as if ten minutes had passed.
        patch.setattr(record_cache, "COMMIT_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            cache_latents(vae, data, tmp_path, accelerator, 1, 0)
    encoded.clear()
    whole = cache_latents(vae, data, tmp_path, accelerator, 1, 0)
    assert sum(encoded) == len(data.content("occupancy").unique()) - 2 > 0
    alone = cache_latents(vae, data, tmp_path / "alone", accelerator, 1, 0)
    assert all(torch.equal(whole[index]["mean"], alone[index]["mean"]) for index in range(4))


def test_a_damaged_shard_is_not_used(tmp_path, small_data, dense_vae_model, accelerator, encoded, caplog):
    data, vae = dense_data(small_data), DenseVAE(**dense_vae_model)
    cache_latents(vae, data, tmp_path, accelerator, 2, 0)
    (shard,) = tmp_path.glob("*/shards/*.bin")
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:-1]), shard.unlink):
        damage()
        encoded.clear()
        assert len(cache_latents(vae, data, tmp_path, accelerator, 2, 0)) == 4
        # The first damage is mended by another shard; then nothing is lacking.
        assert sum(encoded) == (0 if damage == shard.unlink else len(data.content("occupancy").unique()))
        assert "must have" in caplog.text
    with pytest.raises(ValueError, match=r"must have 4 records, got none for 4 of them"):
        latents.latent_cache(vae, tmp_path, Orientation(2), 4).open(data.content("occupancy"))


def test_processes_share_the_work(tmp_path, small_data, dense_vae_model, sparse_vae_model):
    """Two samples in three processes: the third has none, and the dataset is that of one process."""
    data = SparseSDFDataset(small_data, "val", 32, image=False)
    for vae in (DenseVAE(**dense_vae_model), SparseVAE(**sparse_vae_model)):
        folder, waited = tmp_path / type(vae).__name__, []
        for index in (2, 1, 0, 2):

            @contextmanager
            def main_process_first(index=index, waited=waited):
                waited.append(index)
                yield

            process = SimpleNamespace(
                process_index=index,
                num_processes=3,
                is_main_process=index == 0,
                device=torch.device("cpu"),
                distributed_type=DistributedType.MULTI_CPU,
                mixed_precision="no",
                autocast=nullcontext,
                local_main_process_first=main_process_first,
                wait_for_everyone=lambda: None,
            )
            # The first ones do not find what the others have not written yet.
            missing = pytest.raises(ValueError, match="a folder that all processes share")
            with missing if index and len(list(folder.glob("*/shards/*.bin"))) < 2 else nullcontext():
                dataset = cache_latents(vae, data, folder, process, 2, 0)
        # One that has nothing to encode waits for the others, too, while kernels are compiled; none does once all is.
        assert waited == ([2, 1, 0] if isinstance(vae, SparseVAE) else [])
        alone = cache_latents(vae, data, tmp_path / "alone", Accelerator(cpu=True), 2, 0)
        assert len(dataset) == len(alone) == 2
        for index in range(2):
            for name, value in dataset[index].items():
                torch.testing.assert_close(value, alone[index][name], rtol=1e-2, atol=1e-2)
        assert dataset.statistics() == pytest.approx(alone.statistics(), rel=1e-2, abs=1e-3)
        assert len(list(folder.glob("*/shards/*.bin"))) == 2


def test_statistics_are_those_of_all_values(tmp_path, small_data, sparse_vae_model, accelerator):
    data = SparseSDFDataset(small_data, None, 32, occupancy=False, image=False)
    dataset = cache_latents(SparseVAE(**sparse_vae_model), data, tmp_path, accelerator, 4, 0)
    items = [dataset[index] for index in range(len(dataset))]
    sizes = [len(data.blocks(index, 32).coords) for index in range(len(data))]
    assert dataset.sizes.tolist() == [len(item["coords"]) for item in items] == sizes and len(set(sizes)) > 1
    mean, logvar = (torch.cat([item[name].double() for item in items]) for name in ("mean", "logvar"))
    average = mean.mean()
    expected = average.item(), ((mean - average).square().mean() + logvar.exp().mean()).sqrt().item()
    assert dataset.statistics() == pytest.approx(expected, rel=1e-9)


def test_images_are_prepared_once_and_exactly(tmp_path, small_data, accelerator, monkeypatch):
    data = SparseSDFDataset(small_data, "val", sdf=False, occupancy=False)
    prepared = []
    original = images._ImagePreparation.__getitem__
    monkeypatch.setattr(
        images._ImagePreparation, "__getitem__", lambda self, index: prepared.append(index) or original(self, index)
    )

    def cache(size=28, data=data):
        prepared.clear()
        cached = cache_images(data, Sparse3DImageProcessor(size, 14), tmp_path, accelerator, 0)
        assert cached.view(0, 0).shape == (4, size, size)
        return len(prepared)

    assert (cache(), cache()) == (2, 0)
    assert (cache(size=42), cache(size=42)) == (2, 0)
    # The two of the validation split are there already.
    everything = SparseSDFDataset(small_data, sdf=False, occupancy=False)
    assert (cache(data=everything), cache(data=everything)) == (4, 0)

    cached = cache_images(everything, Sparse3DImageProcessor(28, 14), tmp_path, accelerator, 0)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    different = set()
    for index in range(6):
        pixel_values, mask = Sparse3DImageProcessor(28, 14).preprocess(everything.pictures(index))
        for view in range(2):
            image = cached.view(index, view).numpy()
            np.testing.assert_allclose(image[:3] / 255, pixel_values[view].numpy() * std + mean, atol=0.502 / 255)
            assert np.array_equal(image[3:], 255 * mask[view].numpy())
            different.add(image.tobytes())
    assert len(different) == 12


def test_fingerprint_tells_encoders_and_configurations_apart():
    def model(name="weight", value=1.0, decoder=0.0, **config):
        model = torch.nn.Module()
        model.encoder, model.decoder = torch.nn.Module(), torch.nn.Module()
        model.encoder.register_parameter(name, torch.nn.Parameter(torch.full((2,), value)))
        model.decoder.register_parameter("weight", torch.nn.Parameter(torch.full((2,), decoder)))
        model.config = {"channels": 8, "_name_or_path": "somewhere", **config}
        return model

    known = fingerprint(model(), "fact")
    # Neither where a VAE is from nor what its decoder has learned since changes what it encodes to.
    assert known == fingerprint(model(_name_or_path="elsewhere"), "fact") == fingerprint(model(decoder=1.0), "fact")
    others = [model(name="bias"), model(value=2.0), model(channels=9)]
    assert len({known, fingerprint(model()), *(fingerprint(other, "fact") for other in others)}) == 5
