"""Packed attention against a loop over segments, queries and heads."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_sparse3d.ops.packed_attention import api, packed_attention, partitioned_attention, reference, varlen
from diffusers_sparse3d.ops.runtime.dispatch import HAS_TRITON
from diffusers_sparse3d.sparse_tensor import CoordinateCache


def naive_attention(query, key, value, lengths_q, lengths_k, scale):
    """One segment, one query and one head at a time."""
    output = torch.zeros(query.shape[0], query.shape[1], value.shape[-1], dtype=query.dtype)
    group_size = query.shape[1] // key.shape[1]
    start_q = start_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k):
        for row in range(start_q, start_q + length_q):
            for head in range(query.shape[1]):
                if length_k:
                    keys = key[start_k : start_k + length_k, head // group_size]
                    weights = torch.softmax(keys @ query[row, head] * scale, 0)
                    output[row, head] = weights @ value[start_k : start_k + length_k, head // group_size]
        start_q, start_k = start_q + length_q, start_k + length_k
    return output


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize(
    "lengths_q, lengths_k",
    [
        ([1], [1]),
        ([5, 7, 5, 1], [5, 7, 5, 1]),
        ([3, 0, 17, 2, 0], [4, 6, 0, 33, 0]),
        ([0], [0]),
        ([0, 0, 9], [0, 3, 1]),
    ],
)
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(2, 2, 8, 8), (6, 2, 5, 3), (4, 1, 4, 4)])
def test_matches_naive(lengths_q, lengths_k, heads, kv_heads, dim, value_dim):
    torch.manual_seed(0)
    query = torch.randn(sum(lengths_q), heads, dim, dtype=torch.float64)
    key = torch.randn(sum(lengths_k), kv_heads, dim, dtype=torch.float64)
    value = torch.randn(sum(lengths_k), kv_heads, value_dim, dtype=torch.float64)
    boundaries = cumulative(lengths_q), cumulative(lengths_k)

    expected = naive_attention(query, key, value, lengths_q, lengths_k, dim**-0.5)
    torch.testing.assert_close(packed_attention(query, key, value, *boundaries), expected)
    expected = naive_attention(query, key, value, lengths_q, lengths_k, 0.3)
    torch.testing.assert_close(packed_attention(query, key, value, *boundaries, scale=0.3), expected)
    single = packed_attention(query.float(), key.float(), value.float(), *boundaries, scale=0.3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


# The elements of a chunk: all at once; a few segments; a few queries of one segment.
@pytest.mark.parametrize("elements", [1 << 20, 50, 20])
def test_gradients(elements, monkeypatch):
    monkeypatch.setitem(reference._CHUNK_ELEMENTS, "cpu", elements)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, 3, dtype=torch.float64, requires_grad=True)
        for rows, heads in [(6, 4), (7, 2), (7, 2)]
    )
    boundaries = cumulative([2, 1, 0, 3]), cumulative([3, 0, 2, 2])
    orders = torch.randperm(6), torch.randperm(7)
    torch.library.opcheck(reference._attend.registered, (query, key, value, *boundaries, None, None, 0.3))
    torch.library.opcheck(reference._attend.registered, (query, key, value, *boundaries, *orders, 0.3))
    assert torch.autograd.gradcheck(lambda *inputs: packed_attention(*inputs, *boundaries), (query, key, value))

    def attend_unordered(*inputs):
        return reference.packed_attention(*inputs, *boundaries, None, *orders)

    sorted_inputs = query[orders[0]], key[orders[1]], value[orders[1]]
    torch.testing.assert_close(
        attend_unordered(query, key, value)[orders[0]], packed_attention(*sorted_inputs, *boundaries)
    )
    assert torch.autograd.gradcheck(attend_unordered, (query, key, value))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_half_precision(dtype):
    torch.manual_seed(0)
    lengths_q, lengths_k = [100, 0, 3, 61], [61, 5, 0, 130]
    inputs = [torch.randn(sum(rows), heads, 32) for rows, heads in [(lengths_q, 8), (lengths_k, 2), (lengths_k, 2)]]
    expected = naive_attention(*(tensor.double() for tensor in inputs), lengths_q, lengths_k, 32**-0.5)
    boundaries = cumulative(lengths_q).cuda(), cumulative(lengths_k).cuda()
    output = packed_attention(*(tensor.to("cuda", dtype) for tensor in inputs), *boundaries)
    assert output.dtype == dtype
    assert (output.cpu().double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    "case, runs",
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.bfloat16, "dim": 100}, True),
        ({"heads": 32, "kv_heads": 1, "dim": 128, "value_dim": 128, "scale": 0.1}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float64}, False),
        ({"dim": 129}, False),
        ({"value_dim": 129}, False),
        ({"heads": 66}, False),
        ({"scale": -1.0}, False),
    ],
    ids=str,
)
def test_when_kernels_run(case, runs):
    case = {"heads": 4, "kv_heads": 2, "dim": 16, "value_dim": 16, "scale": None, **case}
    with FakeTensorMode():
        options = {"dtype": case.get("dtype", torch.float32), "device": case.get("device", "cuda")}
        query = torch.empty(5, case["heads"], case["dim"], **options)
        key = torch.empty(5, case["kv_heads"], case["dim"], **options)
        value = torch.empty(5, case["kv_heads"], case["value_dim"], **options)
        attend = api._without_varlen(query, key, value, case["scale"])
    assert attend.__module__.endswith(".operator" if runs else ".reference")


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    "case, runs",
    [
        ({}, True),
        ({"rows": 2047}, False),
        ({"dim": 40}, False),
        ({"capability": (8, 9)}, False),
        ({"scale": -1.0}, False),
        ({"requires_grad": True}, True),
    ],
    ids=str,
)
def test_when_kernels_run_in_place_of_flash_attention(case, runs, monkeypatch):
    case = {"rows": 2048, "dim": 32, "capability": (9, 0), "scale": None, "requires_grad": False, **case}
    monkeypatch.setattr(api, "is_varlen_available", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: case["capability"])
    with FakeTensorMode():
        options = {"dtype": torch.float16, "device": "cuda"}
        query = torch.empty(case["rows"], 4, case["dim"], **options, requires_grad=case["requires_grad"])
        key = torch.empty(5, 4, case["dim"], **options)
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="cuda")
        assert api._runs_varlen(query, key, key, cu_seqlens, case["scale"]) == (not runs)


def test_versions_of_torch_whose_flash_attention_is_used():
    """That of torch 2.10 has no scale."""

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None): ...

    assert not varlen.takes_scale(None) and not varlen.takes_scale(of_2_10) and varlen.takes_scale(of_2_11)
    # What is installed here has it, or is not called.
    assert not varlen._HAS_VARLEN or varlen.takes_scale(varlen.varlen_attn)


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True)])
def test_gpus_that_run_flash_attention(capability, runs, monkeypatch):
    monkeypatch.setattr(varlen, "_HAS_VARLEN", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with FakeTensorMode():
        query = torch.empty(5, 4, 32, dtype=torch.float16, device="cuda")
        assert varlen.is_varlen_available(query, query) == runs


def test_rows_in_order_are_not_moved(monkeypatch):
    """Rows in any order give the same results, and no order is passed on for rows that are grouped by sample."""
    orders, attend = [], reference.packed_attention
    monkeypatch.setattr(reference, "packed_attention", lambda *a: (orders.append(a[6:]), attend(*a))[1])
    coords = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0], [2, 3, 0, 0]], dtype=torch.int32)
    query, permutation = torch.randn(4, 2, 3), torch.tensor([2, 0, 3, 1])
    sorted_rows, mixed_rows = (CoordinateCache(rows, 3).batch_partition() for rows in (coords, coords[permutation]))
    expected = partitioned_attention(query, query, query, sorted_rows, sorted_rows)
    mixed = query[permutation]
    torch.testing.assert_close(
        partitioned_attention(mixed, mixed, mixed, mixed_rows, mixed_rows), expected[permutation]
    )
    assert orders[0] == (None, None) and orders[1][0] is mixed_rows.order
