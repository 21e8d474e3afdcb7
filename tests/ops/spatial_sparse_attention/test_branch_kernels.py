"""The kernels of each branch against the reference in float64: small cases in the interpreter, large ones on a GPU."""

import pytest
import torch

from diffusers_sparse3d.ops.packed_attention import partitioned_attention
from diffusers_sparse3d.ops.spatial_sparse_attention import reference
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
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from ..kernel_testing import DEVICE, DTYPES
from . import branches
from .cases import CASES, GROWTH, assert_same, check_blocks, make_case, random_coords, random_inputs, some_blocks


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


def test_more_lists_than_two_bytes_tell_apart():
    num_blocks, generator = 1 << 16, torch.Generator().manual_seed(0)
    blocks = torch.randint(num_blocks, (9 * GROWTH, 1, 2), generator=generator)
    blocks[::4, :, 1] = -1
    found = choice_lists.sort_choices(blocks.to(DEVICE), num_blocks, len(blocks))
    segments = blocks.flatten().where(blocks.flatten() >= 0, num_blocks)
    assert found.choices.tolist() == segments.argsort(stable=True).tolist()
    assert torch.equal(found.starts.cpu(), torch.searchsorted(segments.sort()[0], torch.arange(num_blocks + 1)).int())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_select_blocks(name, dtype):
    check_select_blocks(name, dtype)


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
        # In base 2, see `score_bounds.has_work`: with and without bounds, each is the case of one of the factors.
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("voxels", [[16], [32], [41, 17], [15, 48]])
def test_full_tiles_of_chosen_keys_with_bounds(voxels, dtype, monkeypatch):
    """With a bound in place of the running maximum, full and masked tiles have loops of their own, too."""
    monkeypatch.setattr(tile_shapes, "choice_shape", lambda *_: TileShape(16, 16, 4, 1))
    coords = random_coords(voxels, 9)
    cache, query, key, value, *_ = random_inputs(coords, len(voxels), 6, 2, 16, 2, dtype=dtype)
    cache = CoordinateCache(cache.coords.to(DEVICE), len(voxels))
    # Small, so that the bounds are used, and weights are no less than float16 resolves.
    query, key, value = (tensor.to(DEVICE) for tensor in (query / 4, key, value))
    selection = cache.partition(16)
    assert selection.cu_seqlens.diff().tolist() == voxels
    blocks = cache.coords[:, :1, None].repeat(1, 2, 1).contiguous()
    plan = SelectionPlan.of(selection, default_shapes(HeadShape.of(query, key, value), dtype).of("selection"))
    assert plan.shapes.forward.keys == 16
    _, bounds = score_bounds(query, key, key)
    grouped = [tensor[selection.order] for tensor in (key, value)]
    found, log_sum, *_ = selection_attention.attend(query, *grouped, blocks, plan, 0.3, bounds)
    expected = reference.selected_attention(
        *(tensor.double() for tensor in (query, key, value)), blocks.long(), selection, scale=0.3
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (found.double() - expected).norm() < tolerance * expected.norm() and log_sum.isfinite().all()
