"""Arguments and configurations that do not fit a model are named before any work."""

import inspect
import math
import re

import pytest
import torch
from diffusers.utils import peft_utils

from diffusers_sparse3d import (
    DenseDiT,
    DenseVAE,
    SDFRefiner,
    SDFSignRefiner,
    SparseConv3d,
    SparseDiT,
    SparseVAE,
    WindowAttnProcessor,
    enable_spatial_sparse_attention,
    enable_window_attention,
)
from diffusers_sparse3d.sparse_tensor import CoordinateCache


SMALL = {
    DenseDiT: {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 6,
        "cross_attention_dim": 8,
        "sample_size": 4,
    },
    DenseVAE: {"encoder_block_out_channels": (4, 8), "decoder_block_out_channels": (8, 4), "sample_size": 8},
    SparseDiT: {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 8,
        "topk": 2,
        "norm_num_groups": 2,
    },
    SparseVAE: {
        "latent_channels": 4,
        "encoder_channels": 32,
        "decoder_channels": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_heads": 2,
        "decoder_heads": 2,
        "norm_num_groups": 2,
    },
    SDFRefiner: {
        "block_out_channels": (4, 8),
        "patch_size": 8,
        "mid_layers": 1,
        "feature_mlp_dim": 4,
        "feature_channels": 4,
    },
    SDFSignRefiner: {"block_out_channels": (4, 8), "patch_size": 8, "mid_layers": 1},
}
COORDS = torch.nn.functional.pad(torch.cartesian_prod(*[torch.arange(3)] * 3), (1, 0)).int()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {model_class: model_class(**config).eval() for model_class, config in SMALL.items()}


def arguments_of(model_class):
    """Arguments that fit the model."""
    generator = torch.Generator().manual_seed(0)
    timestep = torch.tensor([500.0, 500.0])
    if model_class is DenseDiT:
        latents = torch.randn(2, 8, 4, 4, 4, generator=generator)
        return {
            "hidden_states": latents,
            "timestep": timestep,
            "encoder_hidden_states": torch.randn(2, 3, 8, generator=generator),
        }
    encoder_coords = torch.tensor([[0, 1, 1, 0], [0, 1, 2, 0]], dtype=torch.int32)
    return {
        "hidden_states": torch.randn(len(COORDS), 4, generator=generator),
        "coords": COORDS,
        "timestep": timestep[:1],
        "encoder_hidden_states": torch.randn(2, 8, generator=generator),
        "encoder_coords": encoder_coords,
    }


WRONG_FOR_ALL = [
    ("hidden_states", lambda t: t.tolist()),
    ("hidden_states", lambda t: t.long()),
    ("hidden_states", lambda t: t.cfloat()),
    ("hidden_states", lambda t: t.double()),
    ("hidden_states", lambda t: t[..., :-1]),
    ("hidden_states", lambda t: t[None]),
    ("encoder_hidden_states", lambda t: t[..., :-1]),
    ("encoder_hidden_states", lambda t: t.bfloat16()),
    ("encoder_hidden_states", lambda t: t[0]),
    ("encoder_hidden_states", lambda t: t.to("meta")),
    ("encoder_hidden_states", lambda t: None),
    ("timestep", lambda t: 500.0),
    ("timestep", lambda t: t[0]),
    ("timestep", lambda t: t.to("meta")),
    ("timestep", lambda t: t.cfloat()),
    ("timestep", lambda t: t > 0),
    ("timestep", lambda t: -t),
    ("timestep", lambda t: 1e30 * t),
    ("timestep", lambda t: t * math.nan),
    ("hidden_states", lambda t: t.to_sparse()),
    ("encoder_hidden_states", lambda t: t * math.nan),
    ("attention_kwargs", lambda t: 3),
    ("attention_kwargs", lambda t: ["scale"]),
    ("attention_kwargs", lambda t: {1: 2}),
    ("attention_kwargs['scale']", lambda t: {"scale": "much"}),
    ("attention_kwargs['scale']", lambda t: {"scale": math.nan}),
]
WRONG = [(DenseDiT, *case) for case in WRONG_FOR_ALL] + [(SparseDiT, *case) for case in WRONG_FOR_ALL]
WRONG += [
    (DenseDiT, "timestep", lambda t: t[:1]),
    (DenseDiT, "encoder_hidden_states", lambda t: t[:1]),
    (SparseDiT, "timestep", lambda t: t * math.inf),
    (SparseDiT, "hidden_states", lambda t: t * math.inf),
    (SparseDiT, "coords", lambda t: t.tolist()),
    (SparseDiT, "encoder_coords", lambda t: t.long()),
    (SparseDiT, "encoder_coords", lambda t: t - torch.tensor([0, 2, 0, 0], dtype=torch.int32)),
    (SparseDiT, "encoder_coords", lambda t: t + torch.tensor([0, 0, 2048, 0], dtype=torch.int32)),
    (SparseDiT, "cache", lambda t: COORDS),
    (SparseDiT, "cache", lambda t: CoordinateCache(COORDS.flip(0), 1)),
    (SparseDiT, "encoder_cache", lambda t: CoordinateCache(COORDS, 1)),
]


@pytest.mark.parametrize(("model_class", "name", "change"), WRONG)
def test_transformers_name_what_does_not_fit(models, model_class, name, change):
    arguments = arguments_of(model_class)
    models[model_class](**arguments)
    argument = name.partition("[")[0]
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises((ValueError, TypeError), match=re.escape(f"`{name}`")):
        models[model_class](**arguments)


@pytest.mark.parametrize("model_class", [DenseDiT, SparseDiT])
def test_attention_kwargs_by_place_are_those_by_name(models, model_class, monkeypatch):
    scales = []
    monkeypatch.setattr(peft_utils, "scale_lora_layers", lambda model, scale: scales.append(scale))
    monkeypatch.setattr(peft_utils, "unscale_lora_layers", lambda model, scale: None)
    model, arguments = models[model_class], arguments_of(model_class)
    (by_place,) = model(*arguments.values(), {"scale": 0.5}, False)
    (by_name,) = model(**arguments, attention_kwargs={"scale": 0.5}, return_dict=False)
    assert torch.equal(by_place, by_name) and scales == [0.5, 0.5]
    with pytest.raises(TypeError, match="`attention_kwargs`"):
        model(*arguments.values(), 3)


def test_autocast_takes_other_dtypes(models):
    arguments = arguments_of(DenseDiT)
    with torch.autocast("cpu", torch.bfloat16):
        models[DenseDiT](**{**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].bfloat16()})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("feats", ([1.0], COORDS)),
        ("feats", (torch.ones(27, 1, dtype=torch.cfloat), COORDS)),
        ("coords", (torch.ones(27, 1), COORDS.tolist())),
        ("coords", (torch.ones(27, 1), COORDS.to("meta"))),
        ("cache", (torch.ones(27, 1), COORDS, 1.0, True, True, CoordinateCache(COORDS.flip(0)))),
        ("cache", (torch.ones(27, 1), COORDS, 1.0, True, False, CoordinateCache(COORDS[1:]))),
        ("cache", (torch.ones(27, 1), COORDS, 1.0, True, False, "cache")),
        ("coord_scale", (torch.ones(27, 1), COORDS, math.nan)),
        ("coord_scale", (torch.ones(27, 1), COORDS, "1")),
    ],
)
def test_sparse_vae_names_what_does_not_fit(models, name, arguments):
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        models[SparseVAE].encode(*arguments)


def test_layers_and_processors_name_what_does_not_fit(models):
    for arguments in ({"window_size": 0}, {"window_size": 2.5}, {"window_size": 4, "shift": -1}):
        with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}` must be an integer"):
            WindowAttnProcessor(**arguments)
    for channels in ((0, 4), (4, "4")):
        with pytest.raises(ValueError, match=r"`(in|out)_channels` must be an integer"):
            SparseConv3d(*channels)
    with pytest.raises(TypeError, match="`feats` must be a tensor or a sparse tensor, got list"):
        SparseConv3d(4, 4)([1.0])
    for enable in (enable_spatial_sparse_attention, enable_window_attention):
        with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got NoneType"):
            enable(None)


def test_dense_models_name_what_does_not_fit(models):
    volume = torch.zeros(1, 1, 8, 8, 8)
    for occupancy in (volume.cfloat(), volume.tolist(), None):
        with pytest.raises(TypeError, match="`occupancy`"):
            models[DenseVAE].encode(occupancy)
    for latents in (volume.long(), volume.tolist()):
        with pytest.raises((TypeError, ValueError), match="`latents`"):
            models[DenseVAE].decode(latents)
    for model_class in (SDFRefiner, SDFSignRefiner):
        with pytest.raises((TypeError, ValueError), match="`sample`"):
            models[model_class](volume.long(), *([volume] if model_class is SDFRefiner else []))
        for resolution in (0, 2049, 8.0, "8"):
            values = (torch.ones(27, 1), COORDS, *([torch.ones(27, 4)] if model_class is SDFRefiner else []))
            with pytest.raises(ValueError, match="`resolution`"):
                models[model_class].refine(*values, resolution=resolution)


@pytest.mark.parametrize("model_class", SMALL)
def test_configurations_are_checked_before_layers_are_made(model_class):
    parameters = list(inspect.signature(model_class).parameters.values())
    assert len(parameters) >= 9
    for parameter in parameters:
        for value in (-1, "3", [3], math.nan, 10**9):
            fits = parameter.name == "shift_factor" and value in (-1, 10**9)
            fits |= parameter.name in ("mlp_ratio", "scaling_factor", "coord_scale", "norm_eps") and value == 10**9
            fits |= parameter.name.endswith("block_out_channels") and value == [3]
            if fits:
                continue
            with pytest.raises(ValueError, match=f"`{parameter.name}`"):
                model_class(**{**SMALL[model_class], parameter.name: value})


@pytest.mark.parametrize(
    ("model_class", "name", "value"),
    [
        (SparseDiT, "mlp_ratio", 0.0),
        (SparseVAE, "scaling_factor", 0),
        (SparseVAE, "encoder_layers", -1),
        (SparseVAE, "encoder_channels", 40),
        (SparseVAE, "decoder_heads", 3),
        (SparseDiT, "window_size", 0),
        (SparseDiT, "num_layers", 2.0),
        (DenseVAE, "encoder_block_out_channels", []),
    ],
)
def test_saved_configurations_are_checked(model_class, name, value):
    config = {**model_class(**SMALL[model_class]).config, name: value}
    # diffusers takes the class's own value for these.
    config.pop("_use_default_values")
    with pytest.raises(ValueError, match=name):
        model_class.from_config(config)
