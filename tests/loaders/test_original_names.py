"""Names of published parameters and of ours, there and back."""

import pytest
import torch

from diffusers_sparse3d import SDFRefiner, SDFSignRefiner
from diffusers_sparse3d.loaders.original_checkpoint import convert_parameters
from diffusers_sparse3d.loaders.original_config import convert_config
from diffusers_sparse3d.loaders.original_names import RULES, convert_state_dict, original_name, restore_state_dict
from tests.golden import load_golden


CASES = {
    "dense_vae": "DenseVAE",
    "dense_dit": "DenseDiT",
    "sparse_vae": "SparseVAE",
    "sparse_dit": "SparseDiT",
    "refiner": "SDFRefiner",
    "refiner_sign": "SDFSignRefiner",
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    state_dict = load_golden(case).state_dict
    state_dict.pop("pos_emb", None)
    restored = restore_state_dict(CASES[case], convert_state_dict(CASES[case], state_dict))
    assert restored.keys() == state_dict.keys()
    assert all(torch.equal(restored[name], state_dict[name]) for name in state_dict)


@pytest.mark.parametrize("model_name", RULES)
def test_unknown_name(model_name):
    with pytest.raises(ValueError, match=f"original {model_name}"):
        original_name(model_name, "no_such.weight")
    with pytest.raises(ValueError, match=r"no_such\.weight"):
        convert_state_dict(model_name, {"no_such.weight": torch.zeros(1)})


@pytest.mark.parametrize("model_class", [SDFRefiner, SDFSignRefiner])
def test_refiners_from_published_configuration(model_class):
    name = model_class.__name__
    golden = load_golden({value: case for case, value in CASES.items()}[name])
    config = convert_config(name, golden.config, golden.state_dict)
    assert config["block_out_channels"] == [8, 32, 128, 512] and config["sample_size"] == 512
    with torch.device("meta"):
        model = model_class(**config)
    assert (config["patch_size"], model.patch_stride) == ((192, 160) if name == "SDFRefiner" else (256, 128))
    assert convert_parameters(model, name, golden.state_dict).keys() == model.state_dict().keys()
