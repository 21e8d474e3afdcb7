"""`from_single_file` of published checkpoint files, through diffusers' own mechanism."""

import shutil
import sys

import pytest
import torch
import yaml

from diffusers_sparse3d import DenseDiT, DenseVAE, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE
from diffusers_sparse3d.loaders.convert import convert
from diffusers_sparse3d.loaders.random_release import IMAGE_ENCODER_FILE, make_release


MODELS = [
    (DenseVAE, "model_dense.ckpt", "dense_vae"),
    (DenseDiT, "model_dense.ckpt", "dense_transformer"),
    (SparseVAE, "model_sparse_512.ckpt", "vae"),
    (SparseDiT, "model_sparse_512.ckpt", "transformer"),
    (SparseVAE, "model_sparse_1024.ckpt", "vae_1024"),
    (SparseDiT, "model_sparse_1024.ckpt", "transformer_1024"),
    (SDFRefiner, "model_refiner.ckpt", "refiner"),
    (SDFSignRefiner, "model_refiner_1024.ckpt", "refiner_1024"),
]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    make_release(folder, "v1.0", tiny=True)
    return folder


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert(release, folder, image_encoder=release / IMAGE_ENCODER_FILE)
    return folder


def assert_same(model, expected):
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert config == {name: value for name, value in expected.config.items() if not name.startswith("_")}
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, expected.state_dict()[name]), name


@pytest.mark.parametrize(("model_class", "file", "component"), MODELS)
def test_equals_the_converted_model(model_class, file, component, release, converted):
    model = model_class.from_single_file(release / file)
    assert not model.training
    assert_same(model, model_class.from_pretrained(converted, subfolder=component))


def test_places_of_the_configuration(release, converted, tmp_path):
    expected = SparseDiT.from_pretrained(converted, subfolder="transformer_1024")
    file = shutil.copy(release / "model_sparse_1024.ckpt", tmp_path / "mine.ckpt")
    config = yaml.safe_load((release / "config.yaml").read_text())
    kwargs = {"original_config": release / "config.yaml", "original_entry": "sparse_dit_1024"}
    assert_same(SparseDiT.from_single_file(str(file), **kwargs), expected)
    assert_same(SparseDiT.from_single_file(file, **{**kwargs, "original_config": config}), expected)
    assert_same(SparseDiT.from_single_file(file, original_config=config["sparse_dit_1024"]), expected)
    assert_same(SparseDiT.from_single_file(file, config=str(converted), subfolder="transformer_1024"), expected)
    checkpoint = torch.load(file, weights_only=True)
    assert_same(SparseDiT.from_single_file(checkpoint, original_config=config["sparse_dit_1024"]), expected)
    assert_same(SparseDiT.from_single_file(checkpoint["dit"], original_config=config["sparse_dit_1024"]), expected)
    assert_same(SparseDiT.from_single_file(file, **kwargs, low_cpu_mem_usage=False), expected)


def test_dtype(release):
    model = SparseVAE.from_single_file(release / "model_sparse_512.ckpt", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_configuration_that_cannot_be_told(release, tmp_path):
    file = shutil.copy(release / "model_sparse_512.ckpt", tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match="give `original_config`"):
        SparseDiT.from_single_file(file)
    with pytest.raises(ValueError, match="say which with `original_entry`"):
        SparseDiT.from_single_file(file, original_config=release / "config.yaml")
    with pytest.raises(ValueError, match="`original_entry` 'sparse_vae_512' is not"):
        SparseDiT.from_single_file(file, original_config=release / "config.yaml", original_entry="sparse_vae_512")
    with pytest.raises(ValueError, match=r"SparseSDFVAE, not the original SparseDiT"):
        config = yaml.safe_load((release / "config.yaml").read_text())
        SparseDiT.from_single_file(file, original_config=config["sparse_vae_512"])
    with pytest.raises(ValueError, match="no entry for SparseDiT"):
        SparseDiT.from_single_file(file, original_config={"dense_dit": config["dense_dit"]})


def test_parameters_that_do_not_fit_are_listed(release):
    checkpoint = torch.load(release / "model_dense.ckpt", weights_only=True)
    config = yaml.safe_load((release / "config.yaml").read_text())
    checkpoint["dit"]["extra"] = checkpoint["dit"].pop("out_layer.bias")
    with pytest.raises(ValueError, match=r"1 missing: out_layer\.bias; 1 unexpected: extra"):
        DenseDiT.from_single_file(checkpoint, original_config=config)
    with pytest.raises(ValueError, match=r"no parameters of SDFRefiner at 'refiner', but \['dit', 'vae'\]"):
        SDFRefiner.from_single_file(checkpoint, original_config=config)


class Foreign:
    """Not a tensor; unpickling it would run code."""

    def __reduce__(self):
        return (sys.exit, ("code of a checkpoint ran",))


def test_foreign_file(release, tmp_path):
    torch.save(Foreign(), tmp_path / "model_dense.ckpt")
    shutil.copy(release / "config.yaml", tmp_path)
    with pytest.raises(OSError, match=r"model_dense\.ckpt"):
        DenseDiT.from_single_file(tmp_path / "model_dense.ckpt")
