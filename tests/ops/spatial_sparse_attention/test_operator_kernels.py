"""The operator of the whole attention against the reference in float64: gradients, tracing, capture, devices."""

import pytest
import torch
import torch.utils.checkpoint

from diffusers_sparse3d.models.checkpointing import checkpoint_keeping_attention
from diffusers_sparse3d.ops.spatial_sparse_attention import (
    api,
    operator,
    plan_spatial_sparse_attention,
    reference,
    spatial_sparse_attention,
)
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tile_shapes import shapes_for
from diffusers_sparse3d.ops.spatial_sparse_attention.plan import Plan, flat_plan
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from ..kernel_testing import (
    DEVICE,
    DTYPES,
    HAS_TRITON,
    NATIVE,
    check_captured,
    check_compiled,
    needs_gpu,
    spied_launches,
)
from .cases import BLOCKS_OF_AXIS, CASES, DEFAULTS, assert_same, make_case, random_inputs, settings_of


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """Has the public function run the kernels in the interpreter too, as it does on a GPU."""
    if not NATIVE:
        monkeypatch.setattr(api, "runs_kernels", lambda tensor: True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_spatial_sparse_attention(name, dtype):
    overrides = {}
    if NATIVE:
        # With many blocks, near-ties would change the choice: there are few enough that all are chosen.
        resolution = BLOCKS_OF_AXIS * CASES[name].get("m_slc", DEFAULTS["m_slc"])
        overrides = {"topk": BLOCKS_OF_AXIS**3, "resolution": resolution}
    case, cache, inputs = make_case(name, dtype, **overrides)
    assert not NATIVE or cache.partition(case["m_slc"]).most_blocks <= case["topk"]
    settings = (cache, case["m_cmp"], case["m_slc"], case["topk"], case["window_size"], case["shift"])
    assert_same(
        lambda *tensors: spatial_sparse_attention(*tensors, *settings),
        lambda *tensors: reference.spatial_sparse_attention(*tensors, *settings),
        inputs,
        dtype,
    )


def test_tiles_with_too_many_slots_have_fewer_keys():
    """Where hardly two compressed keys share a selection block, the sums of a tile would not fit in the registers."""
    case, _, _ = make_case("empty samples", torch.float16, voxels=[1], topk=40)
    coords = torch.zeros(40, 4, dtype=torch.int32)
    coords[:, 1] = torch.arange(40) * case["m_slc"]
    cache, *tensors = random_inputs(coords, 1, case["heads"], case["kv_heads"], case["dim"], case["m_cmp"])
    cache, inputs = CoordinateCache(coords.to(DEVICE), 1), [tensor.half().double().to(DEVICE) for tensor in tensors]
    plan = Plan.of(*plan_of(case, cache, [tensor.half() for tensor in inputs]))
    assert shapes_for(HeadShape(1, 4, 32, 32), torch.float16, cache.coords.device).compressed_forward.keys == 64
    assert plan.compression.shape.keys == plan.members.shape[1] == 32
    assert_same(
        lambda *tensors: spatial_sparse_attention(*tensors, cache, *settings_of(case)),
        lambda *tensors: reference.spatial_sparse_attention(*tensors, cache, *settings_of(case)),
        inputs,
        torch.float16,
    )


@pytest.mark.parametrize(
    "heads, settings",
    [((64, 1), {}), ((33, 1), {}), ((4, 2), {"scale": -0.25}), ((4, 2), {"scale": 0.0}), ((4, 2), {"topk": 257})],
    ids=str,
)
def test_what_kernels_cannot_do_the_reference_does(heads, settings):
    case, cache, inputs = make_case("groups", torch.float32, voxels=[20], heads=heads[0], kv_heads=heads[1])
    inputs = [tensor.float() for tensor in inputs]
    sizes = (case["m_cmp"], case["m_slc"])
    topk, scale = settings.get("topk", case["topk"]), settings.get("scale")
    planned = CoordinateCache(cache.coords, 1)
    arguments = (planned, *sizes, case["window_size"], case["shift"], topk, scale)
    plan_spatial_sparse_attention(*inputs[:3], *arguments)
    # Nothing is left to derive from the coordinates.
    derived = len(planned._derived), len(planned._partitions)
    sizes = (*sizes, topk, case["window_size"], case["shift"])
    found = spatial_sparse_attention(*inputs, planned, *sizes, scale=scale)
    assert (len(planned._derived), len(planned._partitions)) == derived
    scale = case["dim"] ** -0.5 if scale is None else scale
    expected = reference.spatial_sparse_attention(*inputs, cache, *sizes, scale=scale)
    assert torch.equal(found, expected) and found.isfinite().all()


def plan_of(case, cache, leaves):
    settings = (case["m_cmp"], case["m_slc"], case["window_size"], case["shift"])
    return flat_plan(cache, settings, HeadShape.of(*leaves[:3]), leaves[0].dtype)


@pytest.mark.parametrize("name", ["groups", "fewer blocks than topk"])
def test_operator_is_registered_right(name):
    case, cache, inputs = make_case(name, torch.float32, voxels=[2, 3])
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    plan, sizes = plan_of(case, cache, leaves)
    arguments = (*leaves, plan, sizes, case["topk"], 0.3, 0, True)
    torch.library.opcheck(operator.attend_with_plan.registered, arguments)
    output, saved = operator.attend_with_plan(*(leaf.detach() for leaf in leaves), *arguments[6:])
    inputs = [leaves[number].detach() for number in (0, 1, 2, 5)]
    backward = (torch.randn_like(output), *inputs, saved, plan, sizes, 0.3)
    torch.library.opcheck(operator.attend_backward_with_plan.registered, backward)


def test_compiled_once_for_all_coordinates():
    shape = {"heads": 6, "kv_heads": 2, "m_cmp": 2, "m_slc": 4, "dim": 16}

    def arguments(first_row):
        case, cache, inputs = make_case("groups", torch.float32, **shape)
        rows = torch.arange(first_row, len(cache.coords), device=DEVICE)
        cache = CoordinateCache(cache.coords[rows], 2)
        num_compressed = len(cache.downsample(2)[0].coords)
        inputs = [tensor[rows] if len(tensor) == len(inputs[0]) else tensor[:num_compressed] for tensor in inputs]
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        plan_of(case, cache, leaves)
        return leaves, (cache, *settings_of(case))

    check_compiled(spatial_sparse_attention, arguments, [0, 2])


def test_with_activation_checkpointing():
    case, cache, inputs = make_case("groups", torch.float32)
    gradients = []
    for function in (
        spatial_sparse_attention,
        lambda *arguments: torch.utils.checkpoint.checkpoint(
            spatial_sparse_attention, *arguments, use_reentrant=False
        ),
        lambda *arguments: checkpoint_keeping_attention(spatial_sparse_attention, *arguments),
    ):
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        output = function(*leaves, cache, *settings_of(case))
        gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    for expected, *others in zip(*gradients):
        assert all(torch.equal(found, expected) for found in others)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_repeated_with_other_tensors(gradients, dtype, monkeypatch):
    case, cache, inputs = make_case("groups", dtype)
    launches, runs, counts = spied_launches(monkeypatch), [], []

    def run(leaves, cache):
        with torch.set_grad_enabled(gradients):
            output = spatial_sparse_attention(*leaves, cache, *settings_of(case))
        return [output, *(torch.autograd.grad(output, leaves, output.detach().flip(0)) if gradients else [])]

    for number in range(5):
        query, key, value, *others = [tensor.roll(number, 0).to(dtype) for tensor in inputs]
        # Of one tensor, as a projection to both makes them.
        key, value = torch.stack([key, value], 1).unbind(1)
        leaves = [tensor.requires_grad_() for tensor in (query, key, value, *others)]
        expected = run(leaves, CoordinateCache(cache.coords, cache.batch_size))
        launches.clear()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if number > 2 else torch.cuda.current_stream()):
            runs.append((run(leaves, cache), expected))
        torch.cuda.synchronize()
        counts.append(len(launches))
    assert counts[0] == counts[1] > 7 and counts[2:] == [0, 0, 0]
    for found, expected in runs:
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@needs_gpu
def test_captured_in_a_cuda_graph_without_transfers():
    case, cache, inputs = make_case("groups", torch.float16)
    leaves = [tensor.half().requires_grad_() for tensor in inputs]
    check_captured(lambda *leaves: spatial_sparse_attention(*leaves, cache, *settings_of(case)), leaves)


@pytest.mark.skipif(not NATIVE or torch.cuda.device_count() < 2 or not HAS_TRITON, reason="needs two GPUs")
def test_on_a_device_that_is_not_current():
    case, cache, inputs = make_case("groups", torch.float16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [tensor.half().to(device).requires_grad_() for tensor in inputs]
        elsewhere = CoordinateCache(cache.coords.to(device), cache.batch_size)
        with torch.cuda.device(0):
            output = spatial_sparse_attention(*leaves, elsewhere, *settings_of(case))
            results.append((output, *torch.autograd.grad(output, leaves, torch.ones_like(output))))
    for first, second in zip(*results):
        assert second.device.index == 1
        assert torch.equal(first.cpu(), second.cpu())


def test_launches_on_the_device_of_the_inputs(monkeypatch):
    launches = spied_launches(monkeypatch)
    case, cache, inputs = make_case("groups", torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    spatial_sparse_attention(*leaves, cache, *settings_of(case)).sum().backward()
    assert len(launches) >= 12 and min(launches) >= 1


@pytest.mark.skipif(not NATIVE or not HAS_TRITON, reason="programs run one after the other in the interpreter")
def test_results_are_reproducible():
    case, cache, inputs = make_case("groups", torch.float16)
    leaves = [tensor.half().requires_grad_() for tensor in inputs]
    runs = []
    for _ in range(2):
        output = spatial_sparse_attention(*leaves, cache, *settings_of(case))
        runs.append((output, *torch.autograd.grad(output.float().square().sum(), leaves)))
    for first, second in zip(*runs):
        assert torch.equal(first, second)


def test_no_tokens():
    cache = CoordinateCache(torch.zeros(0, 4, dtype=torch.int32, device=DEVICE), 2)
    query, key, gate = (torch.zeros(0, *shape, device=DEVICE) for shape in ((4, 16), (2, 16), (3,)))
    output = spatial_sparse_attention(query, key, key, key, key, gate, cache, 2, 4, 3, 4)
    assert output.shape == (0, 4, 16)
