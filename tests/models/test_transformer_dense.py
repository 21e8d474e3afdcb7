"""DenseDiT: golden parity with the published module, and the behaviour of a diffusers transformer."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models.attention_processors import SSAAttnProcessor
from diffusers_sparse3d.models.transformer_dense import DenseAttnProcessor, DenseDiT
from tests.golden import load_golden, relative_error


def golden_model():
    golden = load_golden("dense_dit")
    config = golden.config
    model = DenseDiT(
        sample_size=config["resolution"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_layers=config["num_blocks"],
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["model_channels"] // config["num_heads"],
        cross_attention_dim=config["cond_channels"],
        mlp_ratio=config["mlp_ratio"],
        patch_size=config["patch_size"],
    )
    model.load_state_dict(convert_state_dict("DenseDiT", golden.state_dict))
    return model.eval(), golden.tensors


def tiny_model(**kwargs):
    """A model without the zero initialisation, which would make every test of the output trivial."""
    torch.manual_seed(0)
    config = {"sample_size": 4, "in_channels": 2, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12}
    model = DenseDiT(**{**config, "cross_attention_dim": 10, **kwargs})
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_inputs(batch_size=2, sample_size=4):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 2, *(sample_size,) * 3, generator=generator),
        "timestep": torch.tensor([17.0, 900.0, 400.0])[:batch_size],
        "encoder_hidden_states": torch.randn(batch_size, 5, 10, generator=generator),
    }


@torch.no_grad()
def test_golden():
    model, tensors = golden_model()
    sample = model(tensors["input"], tensors["timestep"], tensors["cond"]).sample
    assert relative_error(sample, tensors["output"]) < 1e-5


def test_position_embedding_buffer_is_not_loaded():
    assert convert_state_dict("DenseDiT", {"pos_emb": torch.zeros(8, 12)}) == {}


@pytest.mark.parametrize("kwargs", [{"qk_norm": True, "qk_norm_cross": True}, {"share_mod": True}, {"patch_size": 2}])
def test_options_train_and_reload(kwargs, tmp_path):
    model, inputs = tiny_model(**kwargs), tiny_inputs()
    sample = model(**inputs).sample
    assert sample.shape == inputs["hidden_states"].shape
    sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path)
    loaded = DenseDiT.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).sample, sample)


def test_patches_round_trip_and_hold_neighbouring_cells():
    model = tiny_model(patch_size=2)
    hidden_states = torch.arange(2 * 4**3.0).view(1, 2, 4, 4, 4)
    tokens = model._patchify(hidden_states)
    assert torch.equal(model._unpatchify(tokens), hidden_states)
    assert torch.equal(tokens[0, 1], hidden_states[0, :, :2, :2, 2:].flatten())


@torch.no_grad()
def test_starts_at_zero():
    model = DenseDiT(sample_size=4, in_channels=2, num_layers=1, num_attention_heads=2, cross_attention_dim=10)
    assert model(**tiny_inputs()).sample.abs().max() == 0


@torch.no_grad()
def test_samples_of_a_batch_are_independent():
    model, inputs = tiny_model(), tiny_inputs()
    alone = model(**{name: tensor[1:] for name, tensor in inputs.items()}).sample
    torch.testing.assert_close(model(**inputs).sample[1:], alone)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm_cross": True, "share_mod": True, "patch_size": 2}])
def test_samples_without_an_image(kwargs):
    """They are what tokens of zeros give, in value and gradient, up to rounding."""
    model, inputs = tiny_model(**kwargs).double(), tiny_inputs(batch_size=3)
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    zeros = inputs["encoder_hidden_states"].clone()
    zeros[:2] = 0
    results = []
    for arguments in ({"encoder_hidden_states": zeros}, {"encoder_hidden_states": zeros[2:], "num_unconditional": 2}):
        model.zero_grad()
        sample = model(**{**inputs, **arguments}).sample
        sample.square().sum().backward()
        results.append((sample.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)  # the norms are in float32


def test_samples_without_an_image_are_not_given_tokens():
    inputs = tiny_inputs(batch_size=3)
    for num_unconditional, rows in ((1, 3), (1, 1), (3, 0), (0, 2), (0, 1)):
        arguments = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:rows]}
        with pytest.raises(ValueError, match=r"`encoder_hidden_states`|`num_unconditional`"):
            tiny_model()(**arguments, num_unconditional=num_unconditional)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(**tiny_inputs()).sample.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_attention_processors_can_be_swapped():
    class DoubledProcessor(DenseAttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    assert len(model.attn_processors) == 6
    model.set_attn_processor(DoubledProcessor())
    assert not torch.allclose(model(**inputs).sample, expected)
    with pytest.raises(ValueError, match="`processor` must be one for the tokens of a grid, got SSAAttnProcessor"):
        model.set_attn_processor(SSAAttnProcessor())
    model.set_attn_processor(DenseAttnProcessor())
    assert torch.equal(model(**inputs).sample, expected)


def test_first_block_cache_with_threshold_zero_changes_nothing():
    check_cache_of_threshold_zero(tiny_model())


@torch.no_grad()
def check_cache_of_threshold_zero(model):
    inputs = tiny_inputs()
    expected = model(**inputs).sample
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        torch.testing.assert_close(model(**inputs).sample, expected)
    model.disable_cache()


@torch.no_grad()
def test_lora_scale():
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    torch.testing.assert_close(model(**inputs, attention_kwargs={"scale": 0.0}).sample, expected)
    full = model(**inputs).sample
    half = model(**inputs, attention_kwargs={"scale": 0.5}).sample
    assert not torch.allclose(full, expected) and not torch.allclose(half, full)


@torch.no_grad()
def test_half_precision_is_close():
    model, tensors = golden_model()
    model.to(torch.bfloat16)
    sample = model(tensors["input"].bfloat16(), tensors["timestep"], tensors["cond"].bfloat16()).sample
    assert sample.dtype == torch.bfloat16
    assert relative_error(sample, tensors["output"]) < 3e-2


def test_bad_shapes_name_the_argument():
    with pytest.raises(ValueError, match="`hidden_states`"):
        tiny_model()(**tiny_inputs(sample_size=5))
    with pytest.raises(ValueError, match="`sample_size`"):
        tiny_model(sample_size=5, patch_size=2)
