"""The Triton kernels of packed attention against the reference in float64: in Triton's interpreter, or on a GPU."""

import pytest
import torch
import torch.utils.checkpoint

from diffusers_sparse3d.ops.packed_attention import api, operator, partitioned_attention, reference
from diffusers_sparse3d.ops.packed_attention.kernels.segment_tiles import segment_tiles
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
from .spatial_sparse_attention.cases import assert_same, random_coords
from .test_packed_attention import cumulative


# The lengths of the segments below are multiplied by this on a GPU.
GROWTH = 40 if NATIVE else 1
# Lengths of the segments of queries and of keys; heads, key/value heads, channels, channels of values.
CASES = {
    "windows": ([5, 7, 20, 1], [5, 7, 20, 1], (2, 2, 16, 16)),
    "empty segments": ([0, 3, 0, 17, 2, 0], [0, 4, 6, 0, 33, 0], (6, 2, 5, 3)),
    "wide group": ([9, 2], [3, 8], (32, 1, 24, 40)),
    "several tiles": ([70, 0, 33], [65, 1, 32], (3, 1, 16, 8)),
    "no key": ([4, 3], [0, 0], (4, 2, 16, 16)),
    "few": ([2, 0, 3], [3, 1, 0], (2, 1, 16, 16)),
    "other few": ([4, 1, 0, 2], [1, 2, 2, 1], (2, 1, 16, 16)),
}
if NATIVE:
    CASES |= {
        "head 64": ([12, 1, 13], [12, 1, 13], (8, 8, 64, 64)),
        "head 128": ([7, 12], [12, 7], (16, 2, 128, 128)),
        "odd head": ([7, 12], [12, 7], (6, 2, 100, 71)),
        "many windows": ([1] * 3000, [1] * 3000, (8, 8, 64, 64)),
    }


def make_case(name, dtype):
    """Inputs in float64 with the values that they have in `dtype`, and where segments start."""
    lengths_q, lengths_k, (heads, kv_heads, dim, value_dim) = CASES[name]
    lengths_q, lengths_k = ([length * GROWTH for length in lengths] for lengths in (lengths_q, lengths_k))
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(lengths_q), heads, dim), (sum(lengths_k), kv_heads, dim), (sum(lengths_k), kv_heads, value_dim)
    inputs = [torch.randn(shape, generator=generator).to(dtype).double().to(DEVICE) for shape in shapes]
    return inputs, [cumulative(lengths).to(DEVICE) for lengths in (lengths_q, lengths_k)]


def random_orders(inputs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(len(rows), generator=generator).to(DEVICE) for rows in inputs[:2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_against_reference(name, in_order, dtype):
    inputs, boundaries = make_case(name, dtype)
    arguments = (*boundaries, 0.3, *([] if in_order else random_orders(inputs)))
    assert_same(
        lambda *leaves: operator.packed_attention(*leaves, *arguments),
        lambda *leaves: reference.packed_attention(*leaves, *arguments),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_counterpart_are_zero(dtype):
    """Queries of segments without a key, keys of segments without a query, and rows that are of no segment."""
    inputs, _ = make_case("several tiles", dtype)
    boundaries = cumulative([40, 20, 0, 10]).to(DEVICE), cumulative([30, 0, 10, 5]).to(DEVICE)
    order_q, order_k = random_orders(inputs)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    output = operator.packed_attention(*leaves, *boundaries, None, order_q, order_k)
    grad_query, grad_key, grad_value = torch.autograd.grad(output.sum(), leaves)
    query_rows = torch.cat([order_q[40:60], order_q[70:]])
    key_rows = torch.cat([order_k[30:40], order_k[45:]])
    assert len(query_rows) > 20 and len(key_rows) > 10
    for tensor, rows in ((output, query_rows), (grad_query, query_rows), (grad_key, key_rows), (grad_value, key_rows)):
        assert (tensor[rows] == 0).all()
        others = torch.ones(len(tensor), dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
        assert (tensor[others] != 0).flatten(1).any(1).all()


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 5, 0, 0, 4, 8, 1, 3, 0], [700, 3], [4] * 70])
@pytest.mark.parametrize("num_others", [0, 9])
def test_tiles(lengths, num_others):
    boundaries = cumulative(lengths)
    found = segment_tiles(boundaries.to(DEVICE), sum(lengths) + num_others, 4).tolist()
    expected = []
    for segment, length in enumerate([*lengths, num_others]):
        start = int(boundaries[segment])
        for first in range(start, start + length, 4):
            expected.append([segment, first, min(first + 4, start + length)])
    assert [tile for tile in found if tile[1] < tile[2]] == expected
    assert all(segment == len(lengths) and start == end for segment, start, end in found if start >= end)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths_k", [[3, 0], [0, 0], []])
def test_no_queries(lengths_k, dtype):
    num_keys, boundaries = sum(lengths_k), [cumulative([0] * len(lengths_k)), cumulative(lengths_k)]
    leaves = [torch.ones(rows, 2, 16, dtype=dtype, device=DEVICE).requires_grad_() for rows in (0, num_keys, num_keys)]
    output = operator.packed_attention(*leaves, *(tensor.to(DEVICE) for tensor in boundaries))
    assert output.shape == (0, 2, 16) and output.dtype == dtype
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum(), leaves)):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("kind", ["windows", "samples"])
def test_partitions(kind, monkeypatch):
    """The public function takes the kernels, for windows of unsorted rows and keys of more samples than queries."""
    if not NATIVE:
        monkeypatch.setattr(api, "runs_kernels", lambda tensor: tensor.dtype != torch.float64)
    launches = spied_launches(monkeypatch)
    resolution, voxels = (32 if NATIVE else 9), [count * GROWTH for count in (13, 0, 5)]
    cache = CoordinateCache(random_coords(voxels, resolution).to(DEVICE), 3)
    if kind == "windows":
        partition = key_partition = cache.partition(4, 2)
    else:
        key_cache = CoordinateCache(random_coords([*voxels, 8], resolution).to(DEVICE), 4)
        partition, key_partition = cache.batch_partition(), key_cache.batch_partition()
    assert (partition.order.diff() < 0).any()
    shapes = (len(partition.order), 6, 16), *[(len(key_partition.order), 2, 16)] * 2
    generator = torch.Generator().manual_seed(0)

    def attend(*leaves):
        return partitioned_attention(*leaves, partition, key_partition)

    inputs = [torch.randn(shape, generator=generator).double().to(DEVICE) for shape in shapes]
    assert_same(attend, attend, inputs, torch.float32)
    # Three kernels forward and five backward, none of them in float64; all on the device of their inputs.
    assert len(launches) == 8 and min(launches) >= 1


@pytest.mark.parametrize("in_order", [True, False])
def test_operators_are_registered_right(in_order):
    inputs, boundaries = make_case("few", torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    segments = (*boundaries, *([None, None] if in_order else random_orders(inputs)))
    torch.library.opcheck(operator._attend.registered, (*leaves, *segments, 0.3))
    query, key, value = (leaf.detach() for leaf in leaves)
    output, (log_sum, *grouped) = operator._attend(query, key, value, *segments, 0.3)
    saved = (query, *(grouped or (key, value)), output, log_sum, *segments)
    torch.library.opcheck(operator._attend_backward.registered, (torch.randn_like(output), *saved, 0.3))


def test_compiled_once_for_all_segments():
    def arguments(name):
        lengths_q, lengths_k, _ = CASES[name]
        inputs = [
            torch.randn(sum(rows) + 2, heads, 16, device=DEVICE)
            for rows, heads in [(lengths_q, 2), (lengths_k, 1), (lengths_k, 1)]
        ]
        boundaries = [cumulative([*lengths, 2]).to(DEVICE) for lengths in (lengths_q, lengths_k)]
        return [tensor.requires_grad_() for tensor in inputs], (*boundaries, None, *random_orders(inputs))

    check_compiled(operator.packed_attention, arguments, ["few", "other few"])


def test_with_activation_checkpointing():
    inputs, boundaries = make_case("windows", torch.float32)
    arguments, gradients = (*boundaries, 0.3, *random_orders(inputs)), []
    for function in (
        operator.packed_attention,
        lambda *arguments: torch.utils.checkpoint.checkpoint(
            operator.packed_attention, *arguments, use_reentrant=False
        ),
    ):
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        gradients.append(torch.autograd.grad(function(*leaves, *arguments).square().sum(), leaves))
    for expected, found in zip(*gradients):
        assert torch.equal(found, expected)


@needs_gpu
@pytest.mark.parametrize("in_order", [True, False])
def test_captured_in_a_cuda_graph_without_transfers(in_order):
    inputs, boundaries = make_case("empty segments", torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    arguments = (*boundaries, 0.3, *([] if in_order else random_orders(inputs)))
    check_captured(lambda *leaves: operator.packed_attention(*leaves, *arguments), leaves)


@needs_gpu
def test_results_are_reproducible():
    inputs, boundaries = make_case("several tiles", torch.float32)
    runs = []
    for _ in range(2):
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        output = operator.packed_attention(*leaves, *boundaries, None, *random_orders(inputs))
        runs.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for first, second in zip(*runs):
        assert torch.equal(first, second)
