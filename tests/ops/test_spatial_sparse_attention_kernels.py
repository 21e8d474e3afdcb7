"""The Triton kernels against the reference in float64: small cases in Triton's interpreter, larger ones on a GPU."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from diffusers_sparse3d.ops.packed_attention import partitioned_attention
from diffusers_sparse3d.ops.spatial_sparse_attention import api, operator, reference, spatial_sparse_attention
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import (
    choice_lists,
    compressed_attention,
    compression_plan,
    selection_attention,
    selection_backward_key,
    selection_plan,
    tile_shapes,
)
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape, TileShape
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.score_bounds import score_bounds
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.selection_plan import SelectionPlan
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tile_shapes import default_shapes
from diffusers_sparse3d.ops.spatial_sparse_attention.plan import flat_plan
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import (
    DEVICE,
    DTYPES,
    HAS_TRITON,
    NATIVE,
    check_captured,
    check_compiled,
    needs_gpu,
    needs_kernels,
    spied_launches,
)
from .spatial_sparse_attention import branches
from .test_spatial_sparse_attention import random_coords, random_inputs


# What the interpreter is given, times so much.
GROWTH = 60 if NATIVE else 1
RESOLUTION = 32 if NATIVE else 9
# Where all blocks are chosen: blocks along an axis at most.
BLOCKS_OF_AXIS = 4


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """Has the public function run the kernels in the interpreter too, as it does on a GPU."""
    if not NATIVE:
        monkeypatch.setattr(api, "runs_kernels", lambda tensor: True)


DEFAULTS = {"m_cmp": 2, "m_slc": 4, "topk": 3, "window_size": 4, "shift": 2, "dim": 16}
CASES = {
    "groups": {"voxels": [13, 5], "heads": 6, "kv_heads": 2},
    "empty samples": {"voxels": [0, 14, 0, 3, 0], "heads": 4, "kv_heads": 1, "dim": 32},
    "single voxels": {"voxels": [1, 1, 9, 1], "heads": 2, "kv_heads": 2, "shift": 0},
    "wide group": {"voxels": [13], "heads": 32, "kv_heads": 1},
    "odd sizes": {"voxels": [15, 4], "heads": 5, "kv_heads": 1, "m_cmp": 3, "m_slc": 6, "window_size": 5, "dim": 24},
    "wide head": {"voxels": [12], "heads": 16, "kv_heads": 1, "dim": 48, "m_cmp": 4, "m_slc": 4},
    "fewer blocks than topk": {"voxels": [4, 12], "heads": 2, "kv_heads": 1, "topk": 64},
}
NATIVE_CASES = {
    "published": {"voxels": [40, 30], "heads": 32, "kv_heads": 2, "dim": 32, "m_cmp": 4, "m_slc": 8, "topk": 8},
    "head 128": {"voxels": [20, 15], "heads": 16, "kv_heads": 2, "dim": 128, "m_cmp": 4, "m_slc": 8, "topk": 8},
    "head 64": {"voxels": [40], "heads": 16, "kv_heads": 1, "dim": 64, "m_slc": 8, "window_size": 8, "shift": 4},
}
if NATIVE:
    CASES |= NATIVE_CASES


def make_case(name, dtype, **overrides):
    """The case's settings, its cache, and inputs in float64 with the values that they have in `dtype`."""
    case = DEFAULTS | CASES[name] | overrides
    voxels = [count if count == 1 else count * GROWTH for count in case["voxels"]]
    coords = random_coords(voxels, case.get("resolution", RESOLUTION)).to(DEVICE)
    _, *tensors = random_inputs(
        coords.cpu(), len(voxels), case["heads"], case["kv_heads"], case["dim"], case["m_cmp"], dtype=dtype, seed=1
    )
    return case, CoordinateCache(coords, len(voxels)), [tensor.to(DEVICE).double() for tensor in tensors]


def assert_same(function, expected_function, inputs, dtype):
    """Outputs and the gradients of all inputs, by the relative error that the design allows."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    results = []
    for attend, number_type in ((function, dtype), (expected_function, torch.float64)):
        leaves = [tensor.to(number_type).requires_grad_() for tensor in inputs]
        output = attend(*leaves)
        assert output.dtype == number_type
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(output.shape, generator=generator).to(dtype).to(output)
        results.append((output, *torch.autograd.grad(output, leaves, weights)))
    # Gradients of scores are zero where there is one key; what rounding leaves of them is measured otherwise.
    smallest = 0.1 * weights.double().norm()
    for number, (found, expected) in enumerate(zip(*results)):
        assert found.shape == expected.shape
        assert found.dtype == dtype
        error = (found.double() - expected).norm() / torch.maximum(expected.norm(), smallest)
        assert error < tolerance, f"{'output' if number == 0 else f'gradient {number - 1}'}: {error:.2e}"


def some_blocks(case, cache, query, compressed_key):
    return reference.select_blocks(query, compressed_key, cache, case["m_cmp"], case["m_slc"], case["topk"])


def block_scores(query, compressed_key, cache, m_cmp, m_slc, scale):
    """`[N, H_kv, blocks]` float64, -1 for blocks of other samples."""
    compressed, _ = cache.downsample(m_cmp)
    blocks, block_of_compressed = compressed.downsample(m_slc // m_cmp)
    scores = torch.einsum("nhgd,mhd->nhgm", query.unflatten(1, (compressed_key.shape[1], -1)), compressed_key) * scale
    other = cache.coords[:, :1] != compressed.coords[:, 0]
    probabilities = scores.masked_fill_(other[:, None, None], float("-inf")).softmax(-1).sum(2)
    result = probabilities.new_zeros(*probabilities.shape[:2], len(blocks.coords))
    result.index_add_(2, block_of_compressed, probabilities)
    return result.masked_fill_((cache.coords[:, :1] != blocks.coords[:, 0])[:, None], -1)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_selected_attention(name, dtype):
    case, cache, (query, key, value, compressed_key, *_) = make_case(name, dtype)
    blocks = some_blocks(case, cache, query, compressed_key)
    value = torch.cat([value, value], 2)[..., : case["dim"] + 3]
    assert_same(
        lambda *inputs: branches.selected_attention(*inputs, blocks, cache.partition(case["m_slc"]), scale=0.3),
        lambda *inputs: reference.selected_attention(*inputs, blocks, cache.partition(case["m_slc"]), scale=0.3),
        (query, key, value),
        dtype,
    )


@needs_kernels
@pytest.mark.parametrize("buffer_bytes", [1, 20_000 * GROWTH])
@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_of_choices(rows, buffer_bytes, monkeypatch):
    monkeypatch.setattr(tile_shapes, "choice_shape", lambda *_: TileShape(rows, 16, 4, 1))
    monkeypatch.setattr(selection_plan, "_BUFFER_BYTES", buffer_bytes)
    case, cache, (query, key, value, compressed_key, *_) = make_case("groups", torch.float32, voxels=[2, 9])
    blocks, selection = some_blocks(case, cache, query, compressed_key), cache.partition(4)
    assert_same(
        lambda *inputs: branches.selected_attention(*inputs, blocks, selection),
        lambda *inputs: reference.selected_attention(*inputs, blocks, selection),
        (query, key, value),
        torch.float32,
    )


@needs_kernels
def test_long_lists_are_cut_into_pieces(monkeypatch):
    for name in ("_SMALLEST_PIECE", "_LARGEST_PIECE"):
        monkeypatch.setattr(selection_backward_key, name, 5 * GROWTH)
    case, cache, (query, key, value, compressed_key, *_) = make_case("groups", torch.float32)
    blocks, selection = some_blocks(case, cache, query, compressed_key), cache.partition(4)
    # Every query of the first sample chooses block 0.
    first = (cache.coords[:, 0] == 0)[:, None] & ~(blocks == 0).any(-1)
    blocks[..., 0] = torch.where(first, 0, blocks[..., 0])
    choices = choice_lists.sort_choices(blocks, len(selection.coords), len(blocks))
    pieces = choice_lists.cut_lists(choices.starts, blocks.numel(), 5 * GROWTH)
    assert int(pieces[pieces[:, 0] < choices.num_lists, 3].max()) >= 2
    assert_same(
        lambda *inputs: branches.selected_attention(*inputs, blocks, selection),
        lambda *inputs: reference.selected_attention(*inputs, blocks, selection),
        (query, key, value),
        torch.float32,
    )


@needs_kernels
@pytest.mark.parametrize(
    "piece_size, chunk_size, choices, pieces",
    [
        # Lists are (head 0, block 0), ..., of all queries; choices are numbered as in `blocks.flatten()`, those
        # of no block come last; pieces are (list, first choice, choice after the last, number).
        (
            *(2, 3),
            [5, 1, 4, 0, 8, 2, 6, 10, 7, 11, 3, 9],
            [
                *((0, 0, 1, 0), (1, 1, 3, 0), (2, 3, 3, 0), (3, 3, 5, 0)),
                *((4, 5, 6, 0), (5, 6, 7, 0), (6, 7, 8, 0), (7, 8, 10, 0)),
            ],
        ),
        # Queries 0 and 1 before query 2.
        (
            *(1, 2),
            [5, 1, 4, 0, 2, 6, 7, 8, 10, 11, 3, 9],
            [
                *((0, 0, 1, 0), (1, 1, 2, 0), (1, 2, 3, 1), (2, 3, 3, 0), (3, 3, 4, 0)),
                *((4, 4, 5, 0), (5, 5, 6, 0), (6, 6, 6, 0), (7, 6, 7, 0)),
                *((8, 7, 7, 0), (9, 7, 7, 0), (10, 7, 7, 0), (11, 7, 8, 0)),
                *((12, 8, 8, 0), (13, 8, 8, 0), (14, 8, 9, 0), (15, 9, 10, 0)),
            ],
        ),
    ],
    ids=["one chunk", "two chunks"],
)
def test_lists_of_choices(piece_size, chunk_size, choices, pieces):
    blocks = torch.tensor([[[3, 1], [0, -1]], [[1, 0], [1, 3]], [[3, -1], [2, 3]]])
    found = choice_lists.sort_choices(blocks.to(DEVICE), 4, chunk_size)
    assert found.choices.tolist() == choices
    found_pieces = choice_lists.cut_lists(found.starts, blocks.numel(), piece_size)
    assert [tuple(piece) for piece in found_pieces.tolist() if piece[0] < found.num_lists] == pieces
    first_pieces = found_pieces[found.starts[:-1] // piece_size + torch.arange(found.num_lists, device=DEVICE)]
    assert first_pieces[:, [0, 3]].tolist() == [[segment, 0] for segment in range(found.num_lists)]


@needs_kernels
def test_more_lists_than_two_bytes_tell_apart():
    num_blocks, generator = 1 << 16, torch.Generator().manual_seed(0)
    blocks = torch.randint(num_blocks, (9 * GROWTH, 1, 2), generator=generator)
    blocks[::4, :, 1] = -1
    found = choice_lists.sort_choices(blocks.to(DEVICE), num_blocks, len(blocks))
    segments = blocks.flatten().where(blocks.flatten() >= 0, num_blocks)
    assert found.choices.tolist() == segments.argsort(stable=True).tolist()
    assert torch.equal(found.starts.cpu(), torch.searchsorted(segments.sort()[0], torch.arange(num_blocks + 1)).int())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_select_blocks(name, dtype):
    check_select_blocks(name, dtype)


@needs_kernels
@pytest.mark.parametrize("name", ["groups", "fewer blocks than topk"])
def test_select_blocks_in_parts(name, monkeypatch):
    monkeypatch.setattr(compressed_attention, "_MOST_SCORES", 64)
    monkeypatch.setattr(compressed_attention, "_SLOTS", 16)
    check_select_blocks(name, torch.float32, query_chunk_size=5 * GROWTH)


def check_select_blocks(name, dtype, query_chunk_size=None):
    case, cache, (query, _, _, compressed_key, *_) = make_case(name, dtype)
    sizes = (case["m_cmp"], case["m_slc"])
    blocks = branches.select_blocks(
        query.to(dtype), compressed_key.to(dtype), cache, *sizes, case["topk"], query_chunk_size=query_chunk_size
    )
    check_blocks(blocks, case, cache, query, compressed_key, case["dim"] ** -0.5, dtype)


def check_blocks(blocks, case, cache, query, compressed_key, scale, dtype, factor=1):
    scores = block_scores(query, compressed_key, cache, case["m_cmp"], case["m_slc"], scale)
    best = scores.topk(min(case["topk"], max(cache.partition(case["m_slc"]).blocks_per_sample)), -1).values
    assert blocks.shape == best.shape
    assert ((blocks >= 0) == (best >= 0)).all()
    # Ties, or what rounding makes of them, may be decided differently: the scores of the chosen blocks are the best.
    found = F.pad(scores, (0, 1), value=-1.0).gather(2, torch.where(blocks >= 0, blocks, scores.shape[2]))
    # In half precision, weights and their sums are rounded, for each of the two scores.
    tolerance = {torch.float32: 1e-5 * factor, torch.float16: 4 * 2**-12, torch.bfloat16: 4 * 2**-9}[dtype]
    torch.testing.assert_close(found, best, rtol=tolerance, atol=tolerance * 1e-2)
    ordered = blocks.sort(-1).values
    assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_window_attention(name, dtype):
    case, cache, (query, key, value, *_) = make_case(name, dtype)
    windows = cache.partition(case["window_size"], case["shift"])
    assert_same(
        lambda *inputs: branches.window_attention(*inputs, cache, case["window_size"], case["shift"], scale=0.3),
        lambda *inputs: partitioned_attention(*inputs, windows, windows, scale=0.3),
        (query, key, value),
        dtype,
    )


@needs_kernels
@pytest.mark.parametrize("factor", [1, 60])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16], ids=str)
def test_bounds_of_scores(dtype, factor):
    case, cache, (query, key, value, compressed_key, _, _) = make_case("groups", dtype)
    query = (factor * query).to(dtype).double()
    compressed, selection = cache.downsample(case["m_cmp"])[0], cache.partition(case["m_slc"])
    ratio = case["m_slc"] // case["m_cmp"]
    in_blocks = compressed.partition(ratio)
    chosen = some_blocks(case, cache, query, compressed_key).contiguous()
    samples = [grid.batch_partition() for grid in (cache, compressed)]
    # Any values for the compressed keys.
    compressed_value = compressed_key.flip(2)
    inputs = query, key, value, compressed_key, compressed_value
    rounded = [tensor.to(dtype) for tensor in inputs]
    heads = HeadShape.of(query, key, value)
    shapes, tolerance = default_shapes(heads, dtype), 1e-5 if dtype == torch.float32 else 1e-2

    plan = compression_plan.CompressionPlan.make(selection, compressed, ratio, heads, shapes.compressed_forward, dtype)
    bounds, selected_bounds = score_bounds(rounded[0], rounded[1], rounded[3])
    largest_queries = rounded[0].float().norm(dim=2).view(len(query), heads.num_kv_heads, -1).amax((0, 2))
    for found, keys in ((bounds, rounded[3]), (selected_bounds, rounded[1])):
        largest_keys = keys.float().norm(dim=2).amax(0)
        torch.testing.assert_close(found.largest_query, largest_queries)
        torch.testing.assert_close(found.largest_key, largest_keys)
        # In base 2, see `score_bounds.takes_part`: with and without bounds, each is the case of one of the factors.
        assert bool((largest_queries * largest_keys).amax() * 0.3 * 1.4427 < 50) == (factor == 1)
    grouped = [tensor[in_blocks.order] for tensor in rounded[3:]]
    found, _, blocks = compressed_attention.attend_and_select(rounded[0], *grouped, plan, case["topk"], 0.3, bounds)
    expected = partitioned_attention(query, *inputs[3:], *samples, scale=0.3)
    assert (found.double() - expected).norm() < tolerance * expected.norm()
    # Large exponents have fewer digits behind the point.
    check_blocks(blocks.long(), case, cache, query, compressed_key, 0.3, dtype, factor=1 if factor == 1 else 8)

    grouped = [tensor[selection.order] for tensor in rounded[1:3]]
    selection_plan = SelectionPlan.of(selection, shapes.of("selection"))
    found = selection_attention.attend(rounded[0], *grouped, chosen, selection_plan, 0.3, selected_bounds)[0]
    expected = reference.selected_attention(*inputs[:3], chosen, selection, scale=0.3)
    assert (found.double() - expected).norm() < tolerance * expected.norm()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("voxels", [[16], [32], [41, 17], [15, 48]])
def test_full_tiles_of_keys_and_the_rest(voxels, dtype, monkeypatch):
    for name in ("forward_shape", "query_shape", "key_shape"):
        monkeypatch.setattr(tile_shapes, name, lambda *_: TileShape(16, 16, 4, 1))
    coords = random_coords(voxels, 9)
    cache, *inputs = random_inputs(coords, len(voxels), 6, 2, 16, 2, dtype=dtype)
    cache = CoordinateCache(cache.coords.to(DEVICE), len(voxels))
    windows = cache.partition(16)
    assert windows.cu_seqlens.diff().tolist() == voxels
    assert_same(
        lambda *inputs: branches.window_attention(*inputs, cache, 16),
        lambda *inputs: partitioned_attention(*inputs, windows, windows),
        [tensor.to(DEVICE).double() for tensor in inputs[:3]],
        dtype,
    )


@needs_kernels
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


def settings_of(case):
    return case["m_cmp"], case["m_slc"], case["topk"], case["window_size"], case["shift"]


def plan_of(case, cache, leaves):
    settings = (case["m_cmp"], case["m_slc"], case["window_size"], case["shift"])
    return flat_plan(cache, settings, HeadShape.of(*leaves[:3]), leaves[0].dtype)


@needs_kernels
@pytest.mark.parametrize("name", ["groups", "fewer blocks than topk"])
def test_operator_is_registered_right(name):
    case, cache, inputs = make_case(name, torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    plan, sizes = plan_of(case, cache, leaves)
    arguments = (*leaves, plan, sizes, case["topk"], 0.3, 0, True)
    torch.library.opcheck(operator.attend_with_plan.registered, arguments)
    output, saved = operator.attend_with_plan(*(leaf.detach() for leaf in leaves), *arguments[6:])
    inputs = [leaves[number].detach() for number in (0, 1, 2, 5)]
    backward = (torch.randn_like(output), *inputs, saved, plan, sizes, 0.3)
    torch.library.opcheck(operator.attend_backward_with_plan.registered, backward)


@needs_kernels
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


@needs_kernels
def test_with_activation_checkpointing():
    case, cache, inputs = make_case("groups", torch.float32)
    gradients = []
    for function in (
        spatial_sparse_attention,
        lambda *arguments: torch.utils.checkpoint.checkpoint(
            spatial_sparse_attention, *arguments, use_reentrant=False
        ),
    ):
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        output = function(*leaves, cache, *settings_of(case))
        gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    for expected, found in zip(*gradients):
        assert torch.equal(found, expected)


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


@needs_kernels
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


@needs_kernels
def test_no_tokens():
    cache = CoordinateCache(torch.zeros(0, 4, dtype=torch.int32, device=DEVICE), 2)
    query, key, gate = (torch.zeros(0, *shape, device=DEVICE) for shape in ((4, 16), (2, 16), (3,)))
    output = spatial_sparse_attention(query, key, key, key, key, gate, cache, 2, 4, 3, 4)
    assert output.shape == (0, 4, 16)
