import pytest
import torch

from diffusers_sparse3d import SparseAttnProcessor, WindowAttnProcessor
from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models.autoencoder_sparse import SparseGaussianDistribution, SparseVAE
from diffusers_sparse3d.ops.coordinates import subdivide_coords, unique_coords

from ..golden import load_golden, relative_error


TINY = {
    "latent_channels": 3,
    "sample_size": 8,
    "encoder_channels": 32,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "decoder_channels": 48,
    "decoder_layers": 2,
    "decoder_heads": 4,
    "norm_num_groups": 2,
}


def tiny_vae(**kwargs) -> SparseVAE:
    """A small model in which every parameter matters."""
    torch.manual_seed(0)
    model = SparseVAE(**{**TINY, **kwargs}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else (parameter.numel() / parameter.shape[-1]) ** -0.5
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def band(resolution: int = 64, batch_size: int = 1, dtype: torch.dtype = torch.float32):
    """Narrow bands of spheres of different sizes: `feats [N, 1]` in (-1, 1) and `coords [N, 4]`."""
    grid = torch.linspace(-1, 1, resolution, dtype=dtype)
    distance = (grid[:, None, None] ** 2 + grid[None, :, None] ** 2 + grid[None, None] ** 2).sqrt()
    feats, coords = [], []
    for sample in range(batch_size):
        signed = (distance - 0.8 / (1 + sample)) * resolution / 4
        xyz = (signed.abs() < 1).nonzero()
        feats.append(signed[tuple(xyz.T)][:, None])
        coords.append(torch.nn.functional.pad(xyz.int(), (1, 0), value=sample))
    return torch.cat(feats), torch.cat(coords)


def random_latents(resolution: int, rows: int, batch_size: int = 1, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    xyz = torch.randint(0, resolution, (rows, 3), generator=generator)
    batch = torch.randint(0, batch_size, (rows, 1), generator=generator)
    coords, _ = unique_coords(torch.cat([batch, xyz], 1).int())
    coords = coords[torch.randperm(len(coords), generator=generator)]
    return torch.randn(len(coords), 3, generator=generator, dtype=dtype), coords


def test_golden_parity():
    case = load_golden("sparse_vae")
    config, tensors = case.config, case.tensors
    model = SparseVAE(
        latent_channels=config["embed_dim"],
        sample_size=config["resolution"],
        encoder_channels=config["model_channels_encoder"],
        encoder_layers=config["num_blocks_encoder"],
        encoder_heads=config["num_heads_encoder"],
        decoder_channels=config["model_channels_decoder"],
        decoder_layers=config["num_blocks_decoder"],
        decoder_heads=config["num_heads_decoder"],
    ).eval()
    model.load_state_dict(convert_state_dict("SparseVAE", case.state_dict))
    with torch.no_grad():
        encoded = model.encode(tensors["input"], tensors["coords"].int())
        decoded = model.decode(encoded.latent_dist.mode(), encoded.coords, return_features=True)
    rows = tensors["rows"]
    assert torch.equal(encoded.coords, tensors["latent_coords"].int())
    assert relative_error(encoded.latent_dist.mean, tensors["latent_mean"]) < 2e-6
    assert relative_error(encoded.latent_dist.logvar, tensors["latent_logvar"]) < 2e-6
    assert torch.equal(decoded.coords[rows], tensors["output_coords"].int())
    assert relative_error(decoded.sample[rows], tensors["output"]) < 2e-6
    assert relative_error(decoded.features[::97], tensors["output_feats_sample"]) < 2e-6


@torch.no_grad()
def test_shapes_and_coordinates():
    model = tiny_vae()
    feats, coords = band(32, batch_size=2)
    encoded = model.encode(feats, coords)
    expected = torch.unique(torch.cat([coords[:, :1], coords[:, 1:] // 8], 1), dim=0)
    assert torch.equal(encoded.coords, expected)
    assert encoded.latent_dist.mean.shape == (len(expected), 3)
    decoded = model.decode(encoded.latent_dist.mode(), encoded.coords)
    assert decoded.sample.shape == (512 * len(expected), 1) and decoded.features is None
    assert decoded.sample.abs().max() <= 1
    assert torch.equal(decoded.coords[:, 1:].view(-1, 512, 3) // 8, expected[:, None, 1:].expand(-1, 512, 3))
    assert torch.equal(decoded.coords, subdivide_coords(subdivide_coords(subdivide_coords(encoded.coords)))) and len(
        decoded.coords.unique(dim=0)
    ) == len(decoded.coords)

    posterior, latent_coords = model.encode(feats, coords, return_dict=False)
    assert torch.equal(posterior.mean, encoded.latent_dist.mean)
    sample, out_coords, features = model.decode(
        posterior.mode(), latent_coords, return_features=True, return_dict=False
    )
    assert features.shape == (len(sample), 3) and torch.equal(out_coords, decoded.coords)
    torch.testing.assert_close(torch.tanh(model.decoder.conv_out(features)), decoded.sample)
    torch.testing.assert_close(model(feats, coords).sample, decoded.sample)


@torch.no_grad()
def test_row_order_does_not_matter():
    model = tiny_vae().double()
    feats, coords = band(32, batch_size=2, dtype=torch.float64)
    encoded = model.encode(feats, coords)
    order = torch.randperm(len(feats))
    permuted = model.encode(feats[order], coords[order])
    assert torch.equal(permuted.coords, encoded.coords)
    assert relative_error(permuted.latent_dist.parameters, encoded.latent_dist.parameters) < 1e-6

    latents, coords = random_latents(8, 100, batch_size=3, dtype=torch.float64)
    expected = model.decode(latents, coords)
    order = torch.randperm(len(latents))
    permuted = model.decode(latents[order], coords[order])
    assert torch.equal(permuted.coords.view(-1, 512, 4), expected.coords.view(-1, 512, 4)[order])
    assert relative_error(permuted.sample.view(-1, 512), expected.sample.view(-1, 512)[order]) < 1e-6


@torch.no_grad()
def test_samples_of_a_batch_are_independent():
    model = tiny_vae().double()
    feats, coords = band(32, batch_size=2, dtype=torch.float64)
    gap = coords.clone()
    gap[:, 0] *= 2  # sample 1 is empty
    batched = model.encode(feats, gap)
    batched_out = model.decode(batched.latent_dist.mode(), batched.coords)
    for sample in range(2):
        rows = coords[:, 0] == sample
        single_coords = torch.nn.functional.pad(coords[rows, 1:], (1, 0))
        single = model.encode(feats[rows], single_coords)
        rows = batched.coords[:, 0] == 2 * sample
        assert torch.equal(batched.coords[rows, 1:], single.coords[:, 1:])
        assert relative_error(batched.latent_dist.parameters[rows], single.latent_dist.parameters) < 1e-6
        single_out = model.decode(single.latent_dist.mode(), single.coords)
        assert relative_error(batched_out.sample.view(-1, 512)[rows], single_out.sample.view(-1, 512)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "rows",
    [[], [[0, 0, 0, 0]], [[0, 2047, 2047, 2047], [2, 0, 2047, 0], [2, 0, 2046, 1]]],
    ids=["empty", "single", "border"],
)
def test_few_voxels(rows):
    model = tiny_vae()
    coords = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
    for tiling in (False, True):
        model.use_tiling = tiling
        output = model(torch.randn(len(rows), 1), coords)
        num_latents = len({(batch, x // 8, y // 8, z // 8) for batch, x, y, z in rows})
        assert output.sample.shape == (512 * num_latents, 1) and torch.isfinite(output.sample).all()
        assert output.coords.shape == (512 * num_latents, 4) and (output.coords < 2048).all()


@torch.no_grad()
@pytest.mark.parametrize("tile_size", [1, 5, 8])
def test_tiling_equals_untiled(tile_size, monkeypatch):
    model = tiny_vae().double()
    latents, coords = random_latents(14 if tile_size > 1 else 5, 150, batch_size=2, dtype=torch.float64)
    expected = model.decode(latents, coords, return_features=True)

    tiles = []
    tiled = model.decoder.upsample_tiled
    monkeypatch.setattr(model.decoder, "upsample_tiled", lambda *args: tiles.append(args) or tiled(*args))
    model.enable_tiling(tile_size)
    output = model.decode(latents, coords, return_features=True)
    assert len(tiles) == 1
    assert torch.equal(output.coords, expected.coords)
    torch.testing.assert_close(output.sample, expected.sample, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.features, expected.features, rtol=1e-12, atol=1e-12)
    model.disable_tiling()
    assert torch.equal(model.decode(latents, coords).sample, expected.sample) and len(tiles) == 1
    with pytest.raises(ValueError, match="tile_size"):
        model.enable_tiling(0)


@torch.no_grad()
def test_tiles_need_their_halo(monkeypatch):
    model = tiny_vae().double()
    latents, coords = random_latents(8, 300, dtype=torch.float64)
    expected = model.decode(latents, coords).sample
    model.enable_tiling(4)
    for halos in ((2, 2, 1, 0), (3, 1, 1, 0), (3, 2, 0, 0)):
        monkeypatch.setattr("diffusers_sparse3d.models.autoencoder_sparse.UP_BLOCK_HALOS", halos)
        assert relative_error(model.decode(latents, coords).sample, expected) > 1e-9


def test_gradients_against_finite_differences():
    # Directional derivatives, because the float32 layer norms limit the precision of element-wise ones.
    model = tiny_vae(encoder_layers=1, decoder_layers=1).double()
    feats, coords = band(16, dtype=torch.float64)
    feats.requires_grad_()
    target = torch.randn(512 * 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss() -> torch.Tensor:
        posterior, latent_coords = model.encode(feats, coords, return_dict=False)
        sample, _ = model.decode(posterior.mode(), latent_coords, return_dict=False)
        return (sample - target[: len(sample)]).square().mean() + 0.1 * posterior.kl().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in [("feats", feats), *model.named_parameters()]:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction = 1e-3 * (direction / direction.norm() + parameter.grad / parameter.grad.norm())
        with torch.no_grad():
            parameter += direction
            above = loss()
            parameter -= 2 * direction
            below = loss()
            parameter += direction
        expected = (above - below) / 2
        actual = (parameter.grad * direction).sum()
        assert abs(actual - expected) < 1e-2 * abs(expected) + 1e-7, (name, actual, expected)


def test_gradient_checkpointing():
    model = tiny_vae().train()
    feats, coords = band(32, batch_size=2)
    grads = []
    for tile_size in (None, None, 2):
        model.zero_grad()
        if tile_size:
            model.enable_tiling(tile_size)
        model(feats, coords).sample.square().sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert model.is_gradient_checkpointing == (len(grads) > 1)
        model.enable_gradient_checkpointing()
    assert relative_error(grads[1], grads[0]) < 1e-5
    assert relative_error(grads[2], grads[0]) < 1e-5


def test_save_and_load(tmp_path):
    model = tiny_vae(scaling_factor=0.7, exact_mean=True)
    model.save_pretrained(tmp_path)
    loaded = SparseVAE.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in model.config.items() if not name.startswith("_"))
    feats, coords = band(32)
    with torch.no_grad():
        assert torch.equal(loaded(feats, coords).sample, model(feats, coords).sample)
    half = SparseVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_low_precision():
    model = tiny_vae()
    feats, coords = band(32)
    encoded = model.encode(feats, coords)
    latents, latent_coords = encoded.latent_dist.mode(), encoded.coords
    expected = model.decode(latents, latent_coords).sample
    with torch.autocast("cpu", torch.bfloat16):
        autocast_encoded = model.encode(feats, coords).latent_dist
        autocast_sample = model.decode(latents, latent_coords).sample
    assert autocast_encoded.mean.dtype == torch.float32 and autocast_sample.dtype == torch.bfloat16
    assert relative_error(autocast_encoded.mean, latents) < 5e-2
    assert relative_error(autocast_sample, expected) < 5e-2
    half = tiny_vae().to(torch.bfloat16)
    assert relative_error(half.encode(feats, coords).latent_dist.mean, latents) < 5e-2
    assert relative_error(half.decode(latents, latent_coords).sample, expected) < 5e-2


@torch.no_grad()
def test_options():
    feats, coords = band(32)
    model, exact = tiny_vae(), tiny_vae(exact_mean=True)
    assert relative_error(exact(feats, coords).sample, model(feats, coords).sample) > 1e-3
    # Without the position embedding a shift by whole windows changes nothing.
    shift = torch.tensor([0, 64, 128, 0], dtype=torch.int32)
    encoded, shifted = model.encode(feats, coords, coord_scale=0), model.encode(feats, coords + shift, coord_scale=0)
    torch.testing.assert_close(shifted.latent_dist.mean, encoded.latent_dist.mean)
    latents = encoded.latent_dist.mode()
    expected = model.decode(latents, encoded.coords, coord_scale=0).sample
    torch.testing.assert_close(model.decode(latents, shifted.coords, coord_scale=0).sample, expected)
    assert relative_error(model.decode(latents, shifted.coords, coord_scale=0.5).sample, expected) > 1e-3
    # Doubled coordinates at half the scale have the same position embedding.
    torch.testing.assert_close(
        model.encode(feats[:1], coords[:1], coord_scale=1).latent_dist.mean,
        model.encode(feats[:1], coords[:1] // 8 * 16, coord_scale=0.5).latent_dist.mean,
    )


@torch.no_grad()
def test_attention_processors_can_be_swapped():
    model = tiny_vae()
    feats, coords = random_latents(100, 60)
    feats = feats[:, :1]
    expected = model(feats, coords).sample
    assert len(model.attn_processors) == 4
    assert {type(processor) for processor in model.attn_processors.values()} == {WindowAttnProcessor}
    model.set_attn_processor(SparseAttnProcessor())
    assert relative_error(model(feats, coords).sample, expected) > 1e-4
    model.set_attn_processor(WindowAttnProcessor(window_size=64, shift=0))  # one window holds everything
    full = model(feats, coords).sample
    model.set_attn_processor(SparseAttnProcessor())
    torch.testing.assert_close(model(feats, coords).sample, full, rtol=1e-4, atol=1e-5)
    model.set_attn_processor(WindowAttnProcessor())
    assert torch.equal(model(feats, coords).sample, expected)


def test_distribution():
    moments = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0, 0.5, -90.0, 90.0]])
    distribution = SparseGaussianDistribution(moments)
    assert torch.equal(distribution.logvar, torch.tensor([[0.0, 3.0], [-30.0, 20.0]]))
    normal = torch.distributions.Normal(distribution.mean.double(), (0.5 * distribution.logvar.double()).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(distribution.kl(), expected.float())
    samples = [distribution.sample(generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*samples) and not torch.equal(samples[0], distribution.mode())


def test_bad_input():
    model = tiny_vae()
    feats, coords = band(16)
    with pytest.raises(ValueError, match=r"`feats`.*\[rows, 1\]"):
        model.encode(feats.expand(-1, 2), coords)
    with pytest.raises(ValueError, match=r"`feats`.*floating"):
        model.encode(coords[:, :1], coords)
    with pytest.raises(ValueError, match=r"`coords`.*rows"):
        model.encode(feats, coords[1:])
    with pytest.raises(ValueError, match=r"`coords`.*int32"):
        model.encode(feats, coords.long())
    with pytest.raises(ValueError, match=r"`coords`.*shape"):
        model.encode(feats, coords[:, 1:])
    with pytest.raises(ValueError, match=r"`feats`.*finite"):
        model.encode(feats / 0, coords)
    with pytest.raises(ValueError, match=r"`coords`.*duplicate"):
        model.encode(feats.repeat(2, 1), coords.repeat(2, 1))
    latents, coords = random_latents(8, 10)
    with pytest.raises(ValueError, match=r"`latents`.*finite"):
        model.decode(latents * float("inf"), coords)
    with pytest.raises(ValueError, match=r"`coords`.*below the resolution 256"):
        model.decode(latents, coords + 250)
    with pytest.raises(ValueError, match=r"`latents`.*\[rows, 3\]"):
        model.decode(latents[:, :2], coords)
    with pytest.raises(ValueError, match="num_groups"):
        tiny_vae(norm_num_groups=3)
    assert model.decode(latents * float("nan"), coords, check_inputs=False).sample.isnan().any()
