"""The Triton kernels against the reference in float64: small cases in Triton's interpreter, larger ones on a GPU."""

import dataclasses
import itertools

import pytest
import torch

from diffusers_sparse3d.ops import sparse_conv
from diffusers_sparse3d.ops.sparse_conv import api, operator, plan, reference
from diffusers_sparse3d.ops.sparse_conv.kernels import common, convolution, weight_gradient
from diffusers_sparse3d.ops.sparse_conv.kernels.convolution import ConvolutionShape
from diffusers_sparse3d.ops.sparse_conv.kernels.offset_masks import offset_masks
from diffusers_sparse3d.ops.sparse_conv.kernels.weight_gradient import GradientShape
from diffusers_sparse3d.ops.sparse_conv.plan import ConvolutionPlan, GradientPlan
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import (
    DEVICE,
    DTYPES,
    NATIVE,
    check_captured,
    check_compiled,
    needs_gpu,
    spied_launches,
)
from .test_coordinates import random_coords


CORNERS = torch.tensor([[0, 0, 0, 0], [0, 2047, 2047, 2047], [0, 2047, 2047, 2046], [2, 0, 0, 2047], [2, 0, 1, 0]])
# Coordinates, input and output channels, batch size.
CASES = {
    "several samples": (random_coords(5, 60, 3), 16, 16, 3),
    "odd channels": (random_coords(4, 22, 2, seed=1), 5, 19, 2),
    "one channel": (random_coords(4, 30, 1, seed=2), 1, 3, 1),
    "several steps of channels": (random_coords(2, 4, 1, seed=3), 70, 33, 1),
    "empty samples": (random_coords(4, 40, 2, seed=4) + torch.tensor([1, 0, 0, 0]), 16, 8, 5),
    "border": (CORNERS.int(), 16, 16, 3),
    "single voxel": (CORNERS[1:2].int(), 8, 8, 1),
    "nothing": (torch.zeros(0, 4, dtype=torch.int32), 8, 8, 1),
    "wide": (random_coords(2, 4, 1, seed=5), 1, 65, 1),
    "few": (random_coords(2, 4, 1, seed=6), 2, 3, 1),
    "others": (random_coords(2, 3, 2, seed=6), 2, 3, 2),
}
if NATIVE:
    CASES |= {
        "narrow": (random_coords(40, 60_000, 2), 32, 32, 2),
        "medium": (random_coords(40, 60_000, 2), 64, 64, 2),
        "512": (random_coords(20, 6_000, 2), 512, 512, 2),
        "down": (random_coords(20, 6_000, 2), 128, 512, 2),
    }
LAYERS = ("sparse_conv3d", "sparse_subdivide_conv3d")


def make_case(name, dtype):
    """The cache of the case and feats, weight and bias in float64, with the values that they have in `dtype`."""
    coords, in_channels, out_channels, batch_size = CASES[name]
    generator = torch.Generator().manual_seed(1)
    shapes = ((len(coords), in_channels), (27, in_channels, out_channels), (out_channels,))
    tensors = [torch.randn(shape, generator=generator).to(dtype).double().to(DEVICE) for shape in shapes]
    return CoordinateCache(coords.to(DEVICE), batch_size), tensors


@pytest.fixture
def as_wide(monkeypatch):
    """Rows of narrow layers are sorted too, and go through pairs: the interpreter needs seconds for wide ones."""
    for name, settings in (
        ("convolution_shape", {"by_mask": True}),
        ("gradient_shape", {"by_pairs": True, "entries": 1}),
    ):
        original = getattr(operator, name)
        for module in (operator, plan):
            monkeypatch.setattr(
                module,
                name,
                lambda *layer, original=original, settings=settings: dataclasses.replace(original(*layer), **settings),
            )


def check(layer, name, dtype):
    """Output and gradients of all inputs."""
    cache, inputs = make_case(name, dtype)
    results = []
    for module, number_type in ((operator, dtype), (reference, torch.float64)):
        leaves = [tensor.to(number_type).requires_grad_() for tensor in inputs]
        if module is operator:
            output = getattr(operator, layer)(*leaves, cache)
        else:
            output = getattr(reference, layer + "_reference")(*leaves, cache.neighbour_map())
        assert output.dtype == number_type
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(output)
        results.append((output, *torch.autograd.grad(output, leaves, grad_output)))
    for result, found, expected in zip(("output", "feats", "weight", "bias"), *results):
        assert found.shape == expected.shape and found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        error = (found.double() - expected).norm()
        assert error <= tolerance * expected.norm(), f"{result}: {error / expected.norm():.2e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_against_reference(layer, name):
    check(layer, name, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES if NATIVE else ["odd channels", "wide"])
@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision(layer, name, dtype):
    check(layer, name, dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_shapes_and_parts_do_not_matter(layer, wide, monkeypatch):
    convolution_shape = ConvolutionShape(16, 16, 16, 4, 2, by_mask=wide)
    gradient_shape = GradientShape(1 if wide else 4, 16, 16, 16, 4, 2, by_pairs=wide)
    for module in (operator, plan):
        monkeypatch.setattr(module, "convolution_shape", lambda *_: convolution_shape)
        monkeypatch.setattr(module, "gradient_shape", lambda *_: gradient_shape)
    # Programs for several parts of the offsets and of the rows, and 64-bit places.
    monkeypatch.setattr(convolution, "offset_parts", lambda *_: 3)
    monkeypatch.setattr(weight_gradient, "num_multiprocessors", lambda _: 50)
    monkeypatch.setattr(convolution, "LARGE_TENSOR", 0)
    monkeypatch.setattr(weight_gradient, "LARGE_TENSOR", 0)
    check(layer, "odd channels", torch.float32)


@pytest.mark.usefixtures("as_wide")
@pytest.mark.parametrize("layer", LAYERS)
def test_64_bits_where_the_largest_tensor_needs_them(layer, monkeypatch):
    """The output and its gradient of the subdividing layer are eight times as long as its input."""
    cache, (feats, weight, bias) = make_case("single voxel", torch.float32)
    feats, weight = feats.float().requires_grad_(), weight.float().requires_grad_()
    chosen = []
    for module in (convolution, weight_gradient):
        original = module.make_layer
        monkeypatch.setattr(
            module,
            "make_layer",
            lambda *settings, original=original: chosen.append(settings[3]) or original(*settings),
        )
    largest = feats.numel() * (8 if layer == "sparse_subdivide_conv3d" else 1)
    for threshold in (largest, largest + 1):
        monkeypatch.setattr(convolution, "LARGE_TENSOR", threshold)
        monkeypatch.setattr(weight_gradient, "LARGE_TENSOR", threshold)
        getattr(operator, layer)(feats, weight, bias.float(), cache).sum().backward()
    # Output, gradient of the features, gradient of the weights.
    assert chosen == [True] * 3 + [False] * 3


def test_stages_fit_in_shared_memory(monkeypatch):
    """Of n stages, n - 1 are buffered."""
    monkeypatch.setattr(common, "_shared_memory", lambda index: 1000 * (index + 1))
    for num_stages, stage_bytes, index, expected in [(4, 300, 0, 4), (5, 300, 0, 4), (5, 300, 1, 5), (3, 1001, 0, 1)]:
        assert common.fit_stages(num_stages, stage_bytes, torch.device("cuda", index)) == expected
    assert common.fit_stages(7, 1001, torch.device("cpu")) == 7


@pytest.mark.parametrize("layer", LAYERS)
def test_no_bias_and_mixed_dtypes(layer):
    cache, (feats, weight, bias) = make_case("several samples", torch.float16)
    convolved = getattr(operator, layer)(feats.half(), weight.float(), None, cache)
    expected = getattr(reference, layer + "_reference")(feats, weight, None, cache.neighbour_map())
    assert convolved.dtype == torch.float16
    assert (convolved.double() - expected).norm() < 1e-2 * expected.norm()
    leaf = bias.float().requires_grad_()
    biased = getattr(operator, layer)(feats.half(), weight.float(), leaf, cache)
    assert (biased.double() - expected - bias).norm() < 1e-2 * expected.norm()
    biased.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, len(biased)))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_bias_with_gaps(layer):
    """One that is a column of a matrix, or one value for all channels."""
    cache, (feats, weight, bias) = make_case("several samples", torch.float32)
    columns = torch.stack([bias, bias + 9], dim=1).float()
    for each in (columns[:, 0], columns[:1, 1].expand(len(bias))):
        found = getattr(operator, layer)(feats.float(), weight.float(), each, cache)
        expected = getattr(operator, layer)(feats.float(), weight.float(), each.contiguous(), cache)
        assert torch.equal(found, expected)


def test_plan():
    cache = CoordinateCache(random_coords(6, 200, 2).to(DEVICE), 2)
    neighbours = cache.neighbour_map()
    exists = neighbours < neighbours.shape[1]
    expected = (exists.long() << torch.arange(27, device=DEVICE)[:, None]).sum(0).int()
    assert torch.equal(offset_masks(neighbours), expected)
    rows = ConvolutionPlan.of(cache, by_mask=True)
    assert rows is ConvolutionPlan.of(cache, by_mask=True) and rows is not ConvolutionPlan.of(cache, by_mask=False)
    assert torch.equal(rows.order.sort().values, torch.arange(rows.num_rows, device=DEVICE).int())
    assert torch.equal(rows.masks, expected[rows.order]) and (rows.masks.diff() >= 0).all()
    assert torch.equal(rows.neighbours, neighbours[:, rows.order])


def test_pairs():
    cache = CoordinateCache(random_coords(12, 1200, 2).to(DEVICE), 2)
    neighbours = cache.neighbour_map()
    pairs = GradientPlan.of(cache, by_pairs=True)
    assert pairs is GradientPlan.of(cache, by_pairs=True) and len(GradientPlan.of(cache, by_pairs=False).tensors) == 1
    assert pairs.neighbours is neighbours and GradientPlan(*pairs.tensors) == pairs
    starts = pairs.starts.tolist()
    for offset, (start, end) in enumerate(itertools.pairwise(starts)):
        (rows,) = torch.where(neighbours[offset] < len(cache.coords))
        assert torch.equal(pairs.output_rows[start:end], rows.int())
        assert torch.equal(pairs.input_rows[start:end], neighbours[offset, rows])
    assert offset == 13


@pytest.mark.skipif(not NATIVE, reason="programs run one after the other in the interpreter")
@pytest.mark.parametrize("layer", LAYERS)
def test_results_are_reproducible(layer):
    cache, inputs = make_case("medium", torch.bfloat16)
    leaves = [tensor.bfloat16().requires_grad_() for tensor in inputs]
    runs = []
    for _ in range(2):
        output = getattr(operator, layer)(*leaves, cache)
        runs.append((output, *torch.autograd.grad(output.float().square().sum(), leaves)))
    for first, second in zip(*runs):
        assert torch.equal(first, second)


def planned(name):
    cache, inputs = make_case(name, torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    return leaves, cache, plan.plan_convolution(cache, leaves[1], torch.float32)


@pytest.mark.parametrize("subdivides", [False, True])
def test_operators_are_registered_right(subdivides, request):
    if subdivides:  # one layer with the plans of narrow layers, one with those of wide ones
        request.getfixturevalue("as_wide")
    (feats, weight, bias), _, plans = planned("few")
    assert [len(plan) for plan in plans] == ([3, 4] if subdivides else [1, 1])
    if subdivides:
        torch.library.opcheck(operator._corner_weight.registered, (weight, torch.float16))
        weight, bias = operator._corner_weight(weight.detach(), torch.float32).requires_grad_(), None
    torch.library.opcheck(operator._convolve.registered, (feats, weight, bias, *plans))
    gradient = torch.randn_like(operator._convolve(feats, weight, None, *plans)).detach()
    torch.library.opcheck(operator._feats_gradient.registered, (gradient, weight.detach(), plans[0]))
    torch.library.opcheck(operator._weight_gradient.registered, (feats.detach(), gradient, plans[1], subdivides))


@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (16, 24), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_corners(channels, dtype):
    weight = torch.randn(27, *channels, device=DEVICE).to(dtype).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    corners = operator._corner_weight(weight, dtype)
    expected = reference.corner_weight(exact).permute(2, 0, 1, 3)
    assert corners.dtype == dtype and corners.is_contiguous()
    tolerance = {"atol": 1e-5, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(corners.double(), expected, **tolerance)
    gradient = torch.randn_like(corners)
    (found,), (wanted,) = (
        torch.autograd.grad(output, leaf, gradient.to(output.dtype))
        for output, leaf in ((corners, weight), (expected, exact))
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.usefixtures("as_wide")
@pytest.mark.parametrize("layer", LAYERS)
def test_compiled_once_for_all_coordinates(layer):
    def arguments(name):
        leaves, cache, _ = planned(name)
        return leaves, (cache,)

    check_compiled(getattr(operator, layer), arguments, ["few", "others"])


@needs_gpu
@pytest.mark.parametrize("name", ["medium", "512"])
@pytest.mark.parametrize("layer", LAYERS)
def test_captured_in_a_cuda_graph(layer, name):
    leaves, cache, _ = planned(name)
    check_captured(lambda *leaves: getattr(operator, layer)(*leaves, cache), leaves)


@pytest.mark.usefixtures("as_wide")
@pytest.mark.parametrize("layer", LAYERS)
def test_launches_on_the_device_of_the_inputs(layer, monkeypatch):
    launches = spied_launches(monkeypatch)
    leaves, cache, _ = planned("few")
    getattr(operator, layer)(*leaves, cache).sum().backward()
    # The weights of the corners and their gradient; on a GPU, the neighbour map is made by kernels too.
    expected = 5 + 2 * (layer == "sparse_subdivide_conv3d") + 2 * NATIVE
    assert len(launches) == expected and min(launches) >= 1


@pytest.mark.usefixtures("as_wide")
@pytest.mark.parametrize("layer", LAYERS)
def test_no_gradient_of_the_weights(layer, monkeypatch):
    """Nothing is planned for it where it is not wanted; that of the features does without."""
    cache, inputs = make_case("few", torch.float32)
    feats, weight, bias = (tensor.float().requires_grad_() for tensor in inputs)
    convolve = getattr(operator, layer)
    (expected,) = torch.autograd.grad(convolve(feats, weight, bias, cache).square().sum(), feats)
    monkeypatch.setattr(plan, "_make_gradient_plan", None)
    cache = CoordinateCache(cache.coords, cache.batch_size)
    with torch.no_grad():
        convolve(feats, weight, bias, cache)
    (found,) = torch.autograd.grad(convolve(feats, weight.detach(), bias, cache).square().sum(), feats)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_planned_before(autocast, monkeypatch):
    monkeypatch.setattr(api, "runs_kernels", lambda _: True)
    cache, inputs = make_case("wide", torch.float32)
    feats, weight, bias = (tensor.float().requires_grad_() for tensor in inputs)
    with torch.autocast(DEVICE, torch.float16, enabled=autocast):
        sparse_conv.plan_sparse_conv3d(feats, weight, cache)
        monkeypatch.setattr(plan, "_make_plan", None)
        monkeypatch.setattr(plan, "_make_gradient_plan", None)
        for convolve in (sparse_conv.sparse_conv3d, sparse_conv.sparse_subdivide_conv3d):
            assert convolve(feats, weight, bias, cache).dtype == (torch.float16 if autocast else torch.float32)
            with torch.no_grad():
                convolve(feats, weight, bias, cache)
