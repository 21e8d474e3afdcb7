"""DenseVAE: golden parity with the published module, and the behaviour of a diffusers autoencoder."""

import pytest
import torch

from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models.autoencoder_dense import DenseUpsample, DenseVAE
from tests.golden import load_golden, relative_error


def golden_model():
    golden = load_golden("dense_vae")
    model = DenseVAE(
        latent_channels=golden.config["embed_dim"],
        encoder_block_out_channels=golden.config["model_channels_encoder"],
        decoder_block_out_channels=golden.config["model_channels_decoder"],
        layers_per_block=golden.config["num_res_blocks_encoder"],
        mid_layers=golden.config["num_res_blocks_middle_encoder"],
        decoder_layers_per_block=golden.config["num_res_blocks_decoder"],
        decoder_mid_layers=golden.config["num_res_blocks_middle_decoder"],
        sample_size=16,
    )
    model.load_state_dict(convert_state_dict("DenseVAE", golden.state_dict))
    return model.eval(), golden.tensors


def tiny_model(**kwargs):
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (4, 8), "decoder_block_out_channels": (8, 4), "latent_channels": 2}
    return DenseVAE(**{**channels, "layers_per_block": 1, "mid_layers": 1, "sample_size": 8, **kwargs})


def tiny_occupancy(batch_size=2, dtype=torch.float32):
    occupancy = torch.rand(batch_size, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.7
    return occupancy.to(dtype)


@torch.no_grad()
def test_golden_encode():
    model, tensors = golden_model()
    posterior = model.encode(tensors["input"]).latent_dist
    assert relative_error(posterior.mean, tensors["latent_mean"]) < 1e-5
    assert relative_error(posterior.logvar, tensors["latent_logvar"]) < 1e-5


@torch.no_grad()
def test_golden_decode():
    model, tensors = golden_model()
    sample = model.decode(tensors["latent_mean"]).sample
    assert relative_error(sample, tensors["output"]) < 1e-5
    for index in range(2):
        occupied = (sample[index, 0].sigmoid() >= 0.5).nonzero()
        assert torch.equal(occupied.int(), tensors[f"index_sample{index}"][:, 1:])


@torch.no_grad()
def test_forward_is_encode_then_decode():
    model, occupancy = tiny_model(), tiny_occupancy()
    posterior = model.encode(occupancy).latent_dist
    assert torch.equal(model(occupancy).sample, model.decode(posterior.mode()).sample)
    drawn = posterior.sample(torch.Generator().manual_seed(3))
    sample = model(occupancy, sample_posterior=True, generator=torch.Generator().manual_seed(3), return_dict=False)[0]
    assert torch.equal(sample, model.decode(drawn).sample)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_occupancy_of_any_dtype(dtype):
    model = tiny_model()
    expected = model.encode(tiny_occupancy()).latent_dist.mean
    assert torch.equal(model.encode(tiny_occupancy(dtype=dtype)).latent_dist.mean, expected)


def test_upsample_puts_channel_groups_into_children():
    upsample = DenseUpsample(1, 2)
    torch.nn.init.zeros_(upsample.conv.weight)
    upsample.conv.bias.data = torch.arange(16.0)
    children = upsample(torch.zeros(1, 1, 1, 1, 1))
    assert torch.equal(children, torch.arange(16.0).view(1, 2, 2, 2, 2))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(tiny_occupancy()).sample.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_save_and_load(tmp_path):
    model, occupancy = tiny_model(scaling_factor=0.5), tiny_occupancy()
    model.save_pretrained(tmp_path)
    loaded = DenseVAE.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 0.5
    assert torch.equal(loaded(occupancy).sample, model(occupancy).sample)


@torch.no_grad()
def test_half_precision_is_close():
    model, tensors = golden_model()
    sample = model.to(torch.bfloat16).decode(tensors["latent_mean"].bfloat16()).sample
    assert sample.dtype == torch.bfloat16
    assert relative_error(sample, tensors["output"]) < 2e-2


def test_bad_shapes_name_the_argument():
    model = tiny_model()
    with pytest.raises(ValueError, match="`occupancy`"):
        model.encode(torch.zeros(1, 1, 7, 8, 8))
    with pytest.raises(ValueError, match="`occupancy`"):
        model.encode(torch.zeros(1, 8, 8, 8))
    with pytest.raises(ValueError, match="`latents`"):
        model.decode(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="`encoder_block_out_channels`"):
        tiny_model(encoder_block_out_channels=(4, 8, 16))


def random_model(**kwargs):
    """Residual blocks are not the identity, so that each convolution looks at its neighbours."""
    model = tiny_model(**kwargs).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize(("layers", "tile_size"), [(1, 4), (2, 6)])
def test_tiling_and_slicing_change_nothing(layers, tile_size):
    """Of a grid that is no multiple of the tiles, with tiles at the border and inside."""
    model = random_model(
        layers_per_block=layers,
        encoder_block_out_channels=(2, 4, 4),
        decoder_block_out_channels=(4, 4, 2),
    )
    occupancy = torch.rand(2, 1, 16, 8, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    moments, sizes = model.encode(occupancy).latent_dist.parameters, []
    logits = model.decode(moments[:, :2]).sample
    model.encoder.conv_in.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape))
    model.decoder.conv_out.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape))
    model.enable_tiling(tile_size)
    model.enable_slicing()
    assert relative_error(model.encode(occupancy).latent_dist.parameters, moments) < 1e-12
    assert relative_error(model.decode(moments[:, :2]).sample, logits) < 1e-12
    assert {size[0] for size in sizes} == {1}
    tiles = len(sizes)
    model.disable_tiling()
    model.disable_slicing()
    assert torch.equal(model.encode(occupancy).latent_dist.parameters, moments)
    assert torch.equal(model.decode(moments[:, :2]).sample, logits)
    # One call for the whole batch each, many before.
    assert len(sizes) == tiles + 2 and tiles >= 2 * 2 * (16 // tile_size)


@torch.no_grad()
def test_one_level_has_nothing_to_tile():
    model = random_model(encoder_block_out_channels=(4,), decoder_block_out_channels=(4,))
    occupancy = tiny_occupancy()
    moments = model.encode(occupancy).latent_dist.parameters
    logits = model.decode(moments[:, :2]).sample
    model.enable_tiling(2)
    assert torch.equal(model.encode(occupancy).latent_dist.parameters, moments)
    assert torch.equal(model.decode(moments[:, :2]).sample, logits)


@pytest.mark.parametrize("tile_size", [0, -2, 5])
def test_tiles_that_are_none(tile_size):
    with pytest.raises(ValueError, match="`tile_size` must be positive and even"):
        tiny_model().enable_tiling(tile_size)
