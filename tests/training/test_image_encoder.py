"""Trained image encoders that condition the transformers: a DINOv2 of either kind, its first layers, another size."""

import logging
import os

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from diffusers_sparse3d.pipelines.conditioning import encode_image
from diffusers_sparse3d.training.assembly import assemble, parse_arguments
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dit_configuration import DiTConfig
from diffusers_sparse3d.training.image_encoder import load_image_encoder
from tests.pipelines.tiny import tiny_image, tiny_pipeline


SETTINGS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 84, "patch_size": 14}


def configuration(folder, **changes):
    values = {"data": "x", "output_dir": "x", "max_train_steps": 1, "vae": "x", "image_encoder": str(folder)}
    return build_config(DiTConfig, {**values, **changes})


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers"])
def trained(request, tmp_path_factory):
    """A folder with an encoder whose every parameter differs from its initial value, and the encoder."""
    torch.manual_seed(0)
    if request.param == "dinov2":
        encoder = Dinov2Model(Dinov2Config(**SETTINGS))
    else:
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SETTINGS, num_register_tokens=2))
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    encoder.save_pretrained(folder)
    return folder, encoder.eval()


@pytest.mark.parametrize("launched", [None, "true"])
@pytest.mark.parametrize("found", [True, False])
def test_every_process_reads_the_weights_under_fsdp(trained, tmp_path, monkeypatch, launched, found):
    """Of a model that is not sharded, transformers before version 5 would leave those of other processes empty."""
    folder, encoder = trained
    variable, seen = "FSDP_CPU_RAM_EFFICIENT_LOADING", []
    if launched is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, launched)
    load = type(encoder).from_pretrained

    def from_pretrained(source, **options):
        seen.append(os.environ[variable])
        return load(source if found else tmp_path, **options)

    monkeypatch.setattr(type(encoder), "from_pretrained", from_pretrained)
    if found:
        loaded = load_image_encoder(configuration(folder))
        assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), encoder.parameters()))
    else:
        with pytest.raises(OSError, match="image_encoder"):
            load_image_encoder(configuration(folder))
    assert seen == ["false"] and os.environ.get(variable) == launched


@torch.no_grad()
def test_first_layers_at_another_size(trained, tmp_path):
    folder, encoder = trained
    changes = {"num_hidden_layers": 2, "image_size": 56}
    adapted = load_image_encoder(configuration(folder, image_encoder_model=changes)).eval()
    assert type(adapted) is type(encoder) and not any(parameter.requires_grad for parameter in adapted.parameters())
    pixels = torch.randn(2, 3, 56, 56)
    hidden = encoder(pixels, output_hidden_states=True).hidden_states[2]
    expected = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
    assert torch.allclose(encode_image(adapted, pixels), expected, atol=1e-5)
    # What is saved is read again as an encoder of that size.
    adapted.save_pretrained(tmp_path)
    again = load_image_encoder(configuration(tmp_path)).eval()
    assert (again.config.image_size, again.config.num_hidden_layers) == (56, 2)
    assert torch.equal(encode_image(again, pixels), encode_image(adapted, pixels))


def test_without_changes_it_is_the_trained_one(trained):
    folder, encoder = trained
    loaded = load_image_encoder(configuration(folder, train_image_encoder=True))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in encoder.state_dict().items())
    assert loaded.encoder.layer[0].norm1.weight.requires_grad and not loaded.layernorm.weight.requires_grad


def test_weights_of_half_precision_are_trained_in_float32(trained, tmp_path):
    folder, encoder = trained
    type(encoder).from_pretrained(folder).half().save_pretrained(tmp_path)
    loaded = load_image_encoder(configuration(tmp_path, train_image_encoder=True))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.layernorm.bias, encoder.layernorm.bias.half().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "`image_encoder_model.num_hidden_layers` must be from 1 to 3, got 4"),
        ({"image_size": 60}, "`image_encoder_model.image_size` must be a multiple of 14"),
        ({"hidden_size": 64}, "`image_encoder_model` must have keys of"),
    ],
)
def test_changes_that_do_not_fit(trained, changes, message):
    with pytest.raises(ValueError, match=message):
        load_image_encoder(configuration(trained[0], image_encoder_model=changes))


def test_other_models_are_refused(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**small, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`image_encoder` must be one of"):
        load_image_encoder(configuration(tmp_path))


def test_pipeline_with_an_encoder_without_registers(tmp_path, caplog):
    pipe = tiny_pipeline()
    settings = {name: getattr(pipe.image_encoder.config, name) for name in SETTINGS}
    torch.manual_seed(0)
    encoder = Dinov2Model(Dinov2Config(**settings))
    encoder.save_pretrained(tmp_path / "encoder")
    pipe.save_pretrained(tmp_path / "base")
    given = ["--base", str(tmp_path / "base"), "--image_encoder", str(tmp_path / "encoder")]
    assemble(parse_arguments([*given, "--output", str(tmp_path / "pipeline")]))
    with caplog.at_level(logging.WARNING):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert not caplog.records
    assert isinstance(loaded.image_encoder, Dinov2Model)
    assert torch.equal(loaded.image_encoder.state_dict()["layernorm.bias"], encoder.layernorm.bias)
    loaded.set_progress_bar_config(disable=True)
    tokens = loaded(tiny_image(), num_inference_steps=1, dense_num_inference_steps=1, output_type="latent")
    assert tokens is not None
