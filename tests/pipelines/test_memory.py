"""Offloading, layerwise casting, tiling and slicing of the whole pipeline: the same results."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.models import feed_forward
from tests.pipelines.tiny import tiny_image, tiny_pipeline, tiny_refiners, tiny_second_stage


MODELS = (
    "image_encoder",
    "dense_vae",
    "dense_transformer",
    "vae",
    "transformer",
    "refiner",
    "vae_1024",
    "transformer_1024",
    "refiner_1024",
)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def whole_pipeline():
    return tiny_pipeline(**tiny_second_stage(), **tiny_refiners())


def generate(pipe):
    """What each stage gives, of a few cells, so that every model runs."""
    # In one patch of each refiner.
    cells, settings = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.int32), {"resolution": 64}
    calls = (
        {**settings, "output_type": "latent"},
        {**settings, "coords": cells, "output_type": "sdf"},
        {"coords_1024": cells, "output_type": "sdf"},
    )
    outputs = [pipe(tiny_image(), generator=torch.Generator().manual_seed(3), **call) for call in calls]
    return [outputs[0].latents, outputs[1].sdfs[0].feats, outputs[2].sdfs[0].feats]


@pytest.fixture(scope="module")
def expected():
    return generate(whole_pipeline())


@contextmanager
def single_layers():
    """Feed-forward layers are called one by one, as they are with hooks: fused ones are rounded otherwise.

    How far apart that is depends on the processor, while results of the same calls are the same to the last bit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_forward, "_has_onednn", lambda: False)
        yield


def assert_same(results, expected, tolerance=1e-5):
    for result, other in zip(results, expected):
        torch.testing.assert_close(result.cpu(), other.cpu(), rtol=tolerance, atol=tolerance)


def is_lost(model):
    """Whether no weight of a model is in memory: what diffusers leaves is uninitialised, which is NaN in tests."""
    return all(bool(parameter.isnan().any()) for parameter in model.parameters())


def test_weights_come_from_the_disk_for_their_blocks(expected, tmp_path):
    compare_with_weights_on_disk(expected, tmp_path, "block_level")


def test_weights_come_from_the_disk_for_their_layers(tmp_path):
    with single_layers():
        compare_with_weights_on_disk(generate(whole_pipeline()), tmp_path, "leaf_level")


def compare_with_weights_on_disk(expected, folder, offload_type):
    """Of all components at once, each of whose layers is called in its own way, in two calls."""
    pipe = whole_pipeline()
    pipe.enable_group_offload(
        CPU, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=folder, exclude_modules="vae"
    )
    assert {path.name for path in folder.iterdir()} == {*MODELS} - {"vae"}
    for _ in range(2):
        assert [name for name in MODELS if not is_lost(getattr(pipe, name))] == ["vae"]
        assert_same(generate(pipe), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_encoders_load_their_layers_too(tmp_path, offload_type):
    pipe = whole_pipeline()
    occupancy = (torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    coords = occupancy[0].nonzero().int()
    feats = torch.rand(len(coords), 1, generator=torch.Generator().manual_seed(1))
    calls = {
        "dense_vae": lambda: pipe.dense_vae.encode(occupancy).latent_dist.mode(),
        "vae": lambda: pipe.vae.encode(feats, coords).latent_dist.mode(),
    }
    for name, encode in calls.items():
        with torch.no_grad(), single_layers():
            latents, model = encode(), getattr(pipe, name)
            folder = str(tmp_path / name)
            model.enable_group_offload(
                CPU, offload_type=offload_type, num_blocks_per_group=2, offload_to_disk_path=folder
            )
            assert is_lost(model)
            torch.testing.assert_close(encode(), latents)


def test_a_folder_with_weights_of_others_is_refused(tmp_path):
    pipe = tiny_pipeline()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "group_0.safetensors").touch()
    with pytest.raises(ValueError, match=r"`offload_to_disk_path` must have no files in .*vae"):
        pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=tmp_path)
    assert not any(is_lost(getattr(pipe, name)) for name in ("vae", "transformer", "image_encoder"))


def test_offloading_to_memory_is_that_of_diffusers(expected):
    pipe = whole_pipeline()
    pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=2)
    assert_same(generate(pipe), expected)


def test_whole_models_are_offloaded(expected):
    pipe = whole_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert_same(generate(pipe), expected)


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
def test_weights_are_kept_in_fewer_bits(storage):
    """The result is that of weights that were rounded once, beside those that keep their precision."""
    pipe, rounded = whole_pipeline(), whole_pipeline()
    for name in MODELS[1:]:
        model = getattr(pipe, name)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        kept = {key for key, parameter in model.named_parameters() if parameter.dtype == torch.float32}
        assert len(kept) < len([*model.parameters()])
        for key, parameter in getattr(rounded, name).named_parameters():
            if key not in kept:
                parameter.data = parameter.data.to(storage).float()
    with single_layers():
        assert_same(generate(pipe), generate(rounded))


def test_tiling_and_slicing_of_all_components(expected):
    pipe = whole_pipeline()
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    assert (
        pipe.dense_vae.use_tiling and pipe.dense_vae.use_slicing and pipe.vae.use_tiling and pipe.vae_1024.use_tiling
    )
    for model in (pipe.dense_vae, pipe.vae, pipe.vae_1024):
        model.tile_size = 4
    assert_same(generate(pipe), expected, tolerance=1e-4)
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert_same(generate(pipe), expected)


@needs_gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "leaf_level"},
        {"offload_type": "leaf_level", "use_stream": True},
        {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True, "record_stream": True},
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_groups_are_loaded_onto_a_gpu(tmp_path, settings, on_disk):
    expected = generate(whole_pipeline().to("cuda"))
    pipe = whole_pipeline()
    if on_disk:
        settings = {**settings, "offload_to_disk_path": tmp_path}
    pipe.enable_group_offload(torch.device("cuda"), **settings)
    for _ in range(2):
        results = generate(pipe)
        assert all(result.is_cuda for result in results)
        assert_same(results, expected, tolerance=1e-4)


@needs_gpu
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_of_accelerate(kind):
    expected = generate(whole_pipeline().to("cuda"))
    pipe = whole_pipeline()
    getattr(pipe, f"enable_{kind}_cpu_offload")()
    for _ in range(2):
        assert_same(generate(pipe), expected, tolerance=1e-4)
    assert all(getattr(pipe, name).device.type in ("cpu", "meta") for name in MODELS)


def recorder(model, device="meta"):
    """Stands in for a model that `device_map` has placed elsewhere: keeps the devices of the tensors it is given."""
    devices = set()

    def record(*args, **kwargs):
        devices.update(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if kwargs.get("return_dict") is False:
            return (torch.ones(1, 1, 8, 8, 8),)
        return SimpleNamespace(sample=torch.zeros(2, 1), coords=torch.zeros(2, 4).int(), features=torch.zeros(2, 4))

    hook = SimpleNamespace(execution_device=device)
    facts = {"config": model.config, "dtype": model.dtype, "devices": devices, "spatial_compression_ratio": 8}
    return SimpleNamespace(decode=record, refine=record, _hf_hook=hook, **facts)


def test_tensors_go_to_where_a_model_is():
    """As with a balanced `device_map`, which puts components on several GPUs."""
    meta, pipe = torch.device("meta"), tiny_pipeline(**tiny_refiners())
    dense = replace(pipe.dense_stage, vae=recorder(pipe.dense_vae))
    dense.find_cells(torch.zeros(1, 2, 4, 4, 4))
    first = pipe.sparse_stages[0]
    transformer = recorder(first.transformer)
    stage = replace(first, transformer=transformer, vae=recorder(first.vae), refiner=recorder(first.refiner, meta))
    coords = torch.zeros(3, 4, dtype=torch.int32)
    stage.decode_latents(torch.zeros(3, 4), coords, 0)
    assert dense.vae.devices == stage.vae.devices == stage.refiner.devices == {meta}
    place = stage.to_transformer(coords)
    arguments = stage.transformer_arguments(place, {"encoder_hidden_states": torch.zeros(1)}, 1)
    assert arguments["coords"].device == arguments["encoder_hidden_states"].device == meta
    assert first.to_transformer(coords) is coords


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_components_on_several_gpus(tmp_path):
    expected = generate(whole_pipeline().to("cuda"))
    whole_pipeline().save_pretrained(tmp_path)
    pipe = Direct3DS2Pipeline.from_pretrained(tmp_path, device_map="balanced")
    assert len({getattr(pipe, name).device for name in MODELS}) > 1
    assert_same(generate(pipe), expected, tolerance=1e-4)
