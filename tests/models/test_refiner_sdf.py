"""SDFRefiner and SDFSignRefiner on patches and on sparse volumes.

Parity with the published modules takes minutes, since their group norms see whole patches of 192^3 and 256^3:
`python -m tests.models.golden_refiner`. Here the same weights run on a small patch, whose expected values come from
this package at a state that had passed (8 of the 27 patches).
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models.refiner_layers import AdaptiveFilter
from diffusers_sparse3d.models.refiner_patches import surrounding_coords
from diffusers_sparse3d.models.refiner_sdf import SDFRefiner, SDFSignRefiner
from tests.golden import FIXTURES, load_golden, relative_error
from tests.models.golden_refiner import CASES, load_model


RESOLUTION, SIZE, STRIDE = 20, 8, 6
TINY = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "mid_layers": 1,
    "norm_num_groups": 2,
    "patch_size": SIZE,
    "patch_stride": STRIDE,
}


def tiny_refiner(**kwargs):
    torch.manual_seed(0)
    return SDFRefiner(**{**TINY, "feature_channels": 3, "feature_mlp_dim": 8, "sample_size": RESOLUTION, **kwargs})


def tiny_sign_refiner(**kwargs):
    torch.manual_seed(0)
    model = SDFSignRefiner(**{**TINY, "sample_size": RESOLUTION, **kwargs})
    # About half of the untrained network's logits are positive.
    with torch.no_grad():
        logits = model(torch.ones(1, 1, SIZE, SIZE, SIZE).index_fill_(2, torch.arange(3), -0.5)).sample
        model.conv_out.bias -= logits.median()
    return model


def shell(resolution, batch_size=2):
    """Signed distances, features and coordinates of a sphere in each sample, rows in random order."""
    axis = torch.arange(resolution)
    grid = torch.cartesian_prod(axis, axis, axis)
    feats, coords = [], []
    for sample in range(batch_size):
        distance = (grid - resolution * (0.4 + 0.1 * sample)).norm(dim=1) - resolution * (0.2 + 0.05 * sample)
        band = distance.abs() < 3
        feats.append(distance[band, None] / 3)
        coords.append(F.pad(grid[band], (1, 0), value=sample))
    order = torch.randperm(sum(map(len, feats)), generator=torch.Generator().manual_seed(1))
    feats, coords = torch.cat(feats)[order], torch.cat(coords)[order].int()
    return feats, coords, torch.sin(coords[:, 1:] * torch.tensor([0.3, 0.5, 0.7]))


def dense(values, coords, resolution, background):
    volume = values.new_full((int(coords[:, 0].max()) + 1, values.shape[1], *(resolution,) * 3), background)
    batch, x, y, z = coords.long().unbind(1)
    volume[batch, :, x, y, z] = values
    return volume


def lookup(volume, coords):
    batch, x, y, z = coords.long().unbind(1)
    return volume[batch, :, x, y, z]


def mix(parts, axis, overlap):
    """Neighbouring patches joined along one axis, with a linear transition across their overlap."""
    ramp = torch.linspace(0, 1, overlap).view([-1 if dim == axis else 1 for dim in range(5)])
    joined = parts[0]
    for part in parts[1:]:
        keep = joined.shape[axis] - overlap
        left, left_edge = joined.split([keep, overlap], dim=axis)
        right_edge, right = part.split([overlap, part.shape[axis] - overlap], dim=axis)
        joined = torch.cat([left, left_edge * (1 - ramp) + right_edge * ramp, right], dim=axis)
    return joined


def all_patches(model, *volumes):
    """The published way: every patch of the dense volume, as a nested list."""
    starts = range(0, RESOLUTION - SIZE + 1, STRIDE)

    def crop(volume, x, y, z):
        return volume[:, :, x : x + SIZE, y : y + SIZE, z : z + SIZE]

    return [
        [[model(*(crop(volume, x, y, z) for volume in volumes)).sample for z in starts] for y in starts]
        for x in starts
    ]


def count_patches(model):
    """A list that grows by the batch size of every call of the U-Net."""
    counts = []
    model.unet.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    return counts


@torch.no_grad()
def test_refine_equals_all_patches_of_the_dense_volume():
    model = tiny_refiner()
    feats, coords, features = shell(RESOLUTION)
    patches = all_patches(model, dense(feats, coords, RESOLUTION, 1), dense(features, coords, RESOLUTION, 0))
    overlap = SIZE - STRIDE
    expected = mix([mix([mix(line, 4, overlap) for line in layer], 3, overlap) for layer in patches], 2, overlap)

    output = model.refine(feats, coords, features)
    assert torch.equal(output.coords, coords)
    torch.testing.assert_close(output.sample, lookup(expected, coords), atol=1e-5, rtol=1e-5)

    everywhere = (expected[:, 0] == expected[:, 0]).nonzero().int()
    output = model.refine(feats, coords, features, patch_batch_size=5, output_coords=everywhere)
    torch.testing.assert_close(output.sample, lookup(expected, everywhere), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sign_refiner_equals_all_patches_of_the_dense_volume():
    model = tiny_sign_refiner()
    feats, coords, _ = shell(2 * RESOLUTION, batch_size=1)
    volume = dense(feats, coords, 2 * RESOLUTION, 1)
    known = dense(torch.ones_like(feats), coords, 2 * RESOLUTION, 0)
    count = 8 * F.avg_pool3d(known, 2)
    pooled = torch.where(count > 0, 8 * F.avg_pool3d(volume * known, 2) / (count + 1), 1)
    signs = torch.empty(1, 1, RESOLUTION, RESOLUTION, RESOLUTION)
    for i, layer in enumerate(all_patches(model, pooled)):
        for j, line in enumerate(layer):
            for k, logits in enumerate(line):
                x, y, z = (STRIDE * index for index in (i, j, k))
                signs[:, :, x : x + SIZE, y : y + SIZE, z : z + SIZE] = torch.where(logits.sigmoid() >= 0.5, 1, -1)
    for axis in (2, 3, 4):
        signs = signs.repeat_interleave(2, dim=axis)
    assert 0.01 < (signs > 0).float().mean() < 0.99
    expected = torch.where(known > 0, volume, signs)

    everywhere = (signs[:, 0] == signs[:, 0]).nonzero().int()
    output = model.refine(feats, coords, patch_batch_size=4, output_coords=everywhere)
    # Sums over a patch are rounded in another order: a logit next to 0 may fall to the other side.
    assert (output.sample != lookup(expected, everywhere)).float().mean() < 1e-4

    output = model.refine(feats, coords)
    assert torch.equal(output.coords[: len(coords)], coords)
    assert torch.equal(output.sample[: len(coords)], feats)
    surroundings = output.coords[len(coords) :]
    assert (output.sample != lookup(expected, output.coords)).float().mean() < 1e-4
    near = F.max_pool3d(known, 3, stride=1, padding=1) - known
    assert torch.equal(surroundings, near[:, 0].nonzero().int())


@torch.no_grad()
@pytest.mark.parametrize("resolution", [5, 15, 21])
def test_any_resolution(resolution):
    model = tiny_refiner()
    feats, coords, features = shell(resolution)
    output = model.refine(feats, coords, features, resolution=resolution)
    # Patches that the volume fills do not depend on what lies beyond it.
    expected = model.refine(feats, coords, features, resolution=26)
    assert output.sample.shape == feats.shape and output.sample.isfinite().all()
    inner = (coords[:, 1:] < STRIDE * ((resolution - SIZE) // STRIDE + 1)).all(dim=1)
    assert torch.equal(output.sample[inner], expected.sample[inner])


@torch.no_grad()
def test_only_patches_with_voxels_are_computed():
    coords = torch.tensor([[0, 5, 5, 5], [2, 5, 7, 5]], dtype=torch.int32)
    model = tiny_refiner()
    counts = count_patches(model)
    model.refine(torch.zeros(2, 1), coords, torch.zeros(2, 3), patch_batch_size=2)
    assert counts == [2, 1]  # one patch of sample 0; two of sample 2, in whose overlap the voxel lies

    model = tiny_sign_refiner()
    counts = count_patches(model)
    model.refine(torch.zeros(2, 1), coords)
    assert counts == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize("patch_batch_size", [2, 7])
def test_patch_batch_size_and_row_order_do_not_matter(patch_batch_size):
    feats, coords, features = shell(RESOLUTION)
    order = torch.randperm(len(feats), generator=torch.Generator().manual_seed(2))
    model = tiny_refiner()
    expected = model.refine(feats, coords, features).sample[order]
    shuffled = feats[order], coords[order]
    actual = model.refine(*shuffled, features[order], patch_batch_size=patch_batch_size).sample
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)

    model = tiny_sign_refiner()
    expected, actual = model.refine(feats, coords), model.refine(*shuffled, patch_batch_size=patch_batch_size)
    assert torch.equal(actual.sample[len(feats) :], expected.sample[len(feats) :])
    assert torch.equal(actual.coords[len(feats) :], expected.coords[len(feats) :])


def test_empty_input():
    feats, coords = torch.zeros(0, 1), torch.zeros(0, 4, dtype=torch.int32)
    assert tiny_refiner().refine(feats, coords, torch.zeros(0, 3)).sample.shape == (0, 1)
    output = tiny_sign_refiner().refine(feats, coords)
    assert output.sample.shape == (0, 1) and output.coords.shape == (0, 4)
    somewhere = torch.tensor([[1, 3, 4, 5]], dtype=torch.int32)
    assert tiny_sign_refiner().refine(feats, coords, output_coords=somewhere).sample.abs() == 1


def test_published_strides_are_the_defaults():
    with torch.device("meta"):
        assert SDFRefiner().patch_stride == 160
        assert SDFSignRefiner().patch_stride == 128


def test_surrounding_coords_stay_in_the_grid():
    corner = torch.tensor([[0, 0, 0, 0], [1, 7, 3, 7]], dtype=torch.int32)
    surroundings = surrounding_coords(corner, 8)
    assert (surroundings[:, 0] == 0).sum() == 7 and (surroundings[:, 0] == 1).sum() == 11
    assert surroundings[:, 1:].min() == 0 and surroundings[:, 1:].max() == 7


def test_adaptive_filter_is_a_convolution_with_a_kernel_per_voxel():
    torch.manual_seed(0)
    adaptive_filter = AdaptiveFilter(2).double()
    hidden_states, guide = torch.randn(2, 1, 2, 4, 3, 5, dtype=torch.float64).unbind(0)
    kernels = adaptive_filter.conv_out(adaptive_filter.conv_in(guide).relu())
    kernels = F.normalize(kernels, dim=1, p=1)
    expected = hidden_states
    for _ in range(3):
        windows = F.pad(expected, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).flatten(5)
        expected = torch.einsum("bcxyzk,bkxyz->bcxyz", windows, kernels)
    torch.testing.assert_close(adaptive_filter(hidden_states, guide), expected)


@pytest.mark.parametrize("make", [tiny_refiner, tiny_sign_refiner])
def test_gradient_checkpointing_gives_the_same_gradients(make):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.rand(2, 1, SIZE, SIZE, SIZE, generator=generator)]
    if make is tiny_refiner:
        inputs.append(torch.randn(2, 3, SIZE, SIZE, SIZE, generator=generator))
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs).sample.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_refine_can_be_trained_through():
    model = tiny_refiner(block_out_channels=(2, 2), sample_size=4, patch_size=4, patch_stride=2).double()
    coords = torch.tensor([[0, 0, 1, 2], [0, 3, 3, 1]], dtype=torch.int32)
    feats = torch.tensor([[0.3], [-0.2]], dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *args: model.refine(args[0], coords, args[1]).sample, (feats, features))


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_refiner, tiny_sign_refiner])
def test_save_and_load(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.patch_stride == STRIDE
    feats, coords, features = shell(RESOLUTION)
    args = (feats, coords, features) if make is tiny_refiner else (feats, coords)
    assert torch.equal(loaded.refine(*args).sample, model.refine(*args).sample)
    assert torch.equal(loaded.refine(*args, return_dict=False)[0], model.refine(*args).sample)


@torch.no_grad()
def test_half_precision_is_close():
    feats, coords, features = shell(RESOLUTION)
    expected = tiny_refiner().refine(feats, coords, features).sample
    actual = tiny_refiner().to(torch.bfloat16).refine(feats, coords, features).sample
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 2e-2

    expected = tiny_sign_refiner().refine(feats, coords).sample
    actual = tiny_sign_refiner().to(torch.bfloat16).refine(feats.bfloat16(), coords).sample
    assert actual.dtype == torch.bfloat16
    assert (actual.sign() == expected.sign()).float().mean() > 0.95


@pytest.mark.parametrize("case", list(CASES))
def test_every_published_parameter_has_its_place(case):
    with torch.device("meta"):
        model = load_model(case, with_weights=False)
        shapes = load_golden(case, with_weights=False).state_dict
    converted = convert_state_dict(type(model).__name__, shapes)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
def test_published_architecture_on_a_small_patch(case):
    model = load_model(case)
    axis = torch.linspace(-1, 1, 24)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    sample = (x.square() + y.square() + z.square()).sqrt()[None, None] - 0.6
    inputs = [sample]
    if case == "refiner":
        frequencies = torch.arange(32).view(1, 32, 1, 1, 1)
        inputs.append(torch.sin(frequencies * x + (frequencies % 5) * y - (frequencies % 3) * z))
    actual = model(*inputs).sample.flatten()[::27]
    expected = load_file(FIXTURES / "refiner_patch.safetensors")[case]
    assert relative_error(actual, expected) < 1e-4


def test_bad_input_names_the_argument():
    refiner, sign_refiner = tiny_refiner(), tiny_sign_refiner()
    feats, coords, features = torch.zeros(2, 1), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 3)
    coords[1, 1] = 1
    for kwargs, name in (
        ({"feats": feats[:1]}, "feats"),
        ({"feats": feats.long()}, "feats"),
        ({"feats": feats * torch.nan}, "feats"),
        ({"coords": coords.long()}, "coords"),
        ({"coords": coords * 0}, "coords"),
        ({"coords": coords + 100}, "coords"),
        ({"output_coords": coords - 1}, "output_coords"),
        ({"patch_batch_size": 0}, "patch_batch_size"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": 4096}, "resolution"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            refiner.refine(**{"feats": feats, "coords": coords, "features": features, **kwargs})
        with pytest.raises(ValueError, match=f"`{name}`"):
            sign_refiner.refine(**{"feats": feats, "coords": coords, **kwargs})
    with pytest.raises(ValueError, match="`features`"):
        refiner.refine(feats, coords, torch.zeros(2, 4))
    for shape in ((1, 1, 7, 8, 8), (1, 2, 8, 8, 8), (1, 8, 8, 8), (1, 1, 8, 8, 0)):
        with pytest.raises(ValueError, match="`sample`"):
            sign_refiner(torch.zeros(shape))
    with pytest.raises(ValueError, match="`features`"):
        refiner(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="`patch_size`"):
        tiny_refiner(patch_size=7)
    with pytest.raises(ValueError, match="`patch_stride`"):
        tiny_sign_refiner(patch_stride=3)
    with pytest.raises(ValueError, match="`block_out_channels`"):
        tiny_refiner(block_out_channels=(3, 8))
