"""The recipes at the published sizes: their models are the published ones, and their batches those of the paper."""

import json
from pathlib import Path

import pytest
import torch

from diffusers_sparse3d import DenseDiT, DenseVAE, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE
from diffusers_sparse3d.loaders.original_config import model_config
from diffusers_sparse3d.loaders.random_release import release_config
from diffusers_sparse3d.training import dit
from diffusers_sparse3d.training.configuration import check_model_config, load_config, shipped_configs
from diffusers_sparse3d.training.dense_vae import DenseVAEConfig
from diffusers_sparse3d.training.dit_configuration import DiTConfig
from diffusers_sparse3d.training.phases import phase_resolutions, read_phases
from diffusers_sparse3d.training.refiner import RefinerConfig
from diffusers_sparse3d.training.sparse_vae import SparseVAEConfig


# Configuration, model and entry of the published `config.yaml` for each recipe, and its GPUs.
RECIPES = {
    "vae_dense": (DenseVAEConfig, DenseVAE, "dense_vae", 8),
    "vae_sparse": (SparseVAEConfig, SparseVAE, "sparse_vae_1024", 8),
    "dit_dense": (DiTConfig, DenseDiT, "dense_dit", 8),
    "dit_sparse_512": (DiTConfig, SparseDiT, "sparse_dit_512", 8),
    "dit_sparse_1024": (DiTConfig, SparseDiT, "sparse_dit_1024", 8),
    "dit_sparse_1024_24gb": (DiTConfig, SparseDiT, "sparse_dit_1024", 1),
    "dit_sparse_1024_16gb": (DiTConfig, SparseDiT, "sparse_dit_1024", 1),
    "refiner": (RefinerConfig, SDFRefiner, "refiner", 8),
    "refiner_1024": (RefinerConfig, SDFSignRefiner, "refiner_1024", 8),
}


def load(name):
    return load_config(RECIPES[name][0], f"published/{name}")


def test_every_recipe_is_tested():
    assert {path.stem for path in shipped_configs().glob("published/*.yaml")} == set(RECIPES)


def test_the_dense_stage_has_data_of_its_own():
    """The grid is an eighth of the lowest resolution of a dataset, and the sparse stage needs a lower one."""
    folders = {name: load(name).data for name in RECIPES}
    dense = {folders.pop("vae_dense"), folders.pop("dit_dense")}
    assert dense == {"data/published_dense"} and set(folders.values()) == {"data/published"}
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert f"`--resolutions {8 * load('vae_dense').model['sample_size']} --dense_only` in `{dense.pop()}`" in text
    resolutions = {number for name in folders for number in phase_resolutions(read_phases(load(name), [1024]))}
    assert f"`--resolutions {' '.join(map(str, sorted(resolutions)))}` in `data/published`" in text


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_the_published_ones(name):
    _, model_class, entry, _ = RECIPES[name]
    config = load(name)
    check_model_config(model_class, config.model)
    published = model_config(release_config("v1.1"), model_class.__name__, {}, entry=entry)
    with torch.device("meta"):
        model, expected = model_class(**config.model), model_class(**published)
    found, wanted = (json.loads(m.to_json_string()) for m in (model, expected))
    # None means as many as there are input channels.
    assert {**found, "out_channels": found["out_channels"] or found["in_channels"]} == wanted
    sizes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sizes == {key: tuple(value.shape) for key, value in expected.state_dict().items()}


@pytest.mark.parametrize("name", RECIPES)
def test_global_batches_and_learning_rates_are_those_of_the_paper(name):
    config, num_processes = load(name), RECIPES[name][3]
    phases = read_phases(config, [getattr(config, "resolution", None) or 8 * config.model["sample_size"]])
    passes = num_processes * (config.gradient_accumulation_steps or 1)
    found = [
        (resolution, size * passes, phase.learning_rate)
        for phase in phases
        for resolution, size in zip(phase.resolutions, phase.batch_sizes)
    ]
    sparse_1024 = [(1024, 16, 2e-5)]
    expected = {
        "vae_sparse": [(256, 32, 1e-4), (384, 32, 1e-4), (512, 32, 1e-4), (1024, 8, 1e-5)],
        "dit_sparse_512": [(256, 64, 1e-4), (384, 64, 1e-4), (512, 64, 5e-5)],
        "dit_sparse_1024": sparse_1024,
        "dit_sparse_1024_24gb": sparse_1024,
        "dit_sparse_1024_16gb": sparse_1024,
    }
    if name in expected:
        assert found == expected[name]
        # A batch of samples of the mean size (DESIGN of the paper's data) fits.
        tokens = {256: 2_100, 384: 5_500, 512: 10_700, 1024: 46_000}
        for phase in phases:
            for resolution, size, limit in zip(phase.resolutions, phase.batch_sizes, phase.max_tokens):
                assert size * tokens[resolution] <= limit
    if name.endswith("16gb"):
        assert (config.optimizer, config.batch_size) == ("adamw_8bit", 1)
    if name.endswith("24gb"):
        assert config.batch_size == 2
    assert config.gradient_checkpointing and config.mixed_precision == "bf16"


def test_a_pretrained_transformer_takes_the_arguments_that_differ(tmp_path):
    """As `dit_sparse_1024.yaml` goes on from the transformer of 512^3 on a finer grid."""
    model = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_key_value_heads": 1,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }
    first = SparseDiT(**model)
    first.save_pretrained(tmp_path / "transformer")
    values = {"data": "", "output_dir": "", "vae": "x", "stage": "sparse", "max_train_steps": 1, "image_encoder": "x"}
    changes = {"sample_size": 8, "coord_scale": 0.5}
    config = DiTConfig(**values, pretrained=str(tmp_path / "transformer"), model=changes)
    second = dit.load_transformer(config)
    assert (second.config.sample_size, second.config.coord_scale) == (8, 0.5)
    assert second.config.num_attention_heads == 2
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert json.loads((Path(tmp_path) / "transformer" / "config.json").read_text())["sample_size"] == 4
