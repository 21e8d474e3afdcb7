"""Spatial Sparse Attention against a float64 oracle with loops over queries and heads."""

import itertools

import pytest
import torch

from diffusers_sparse3d.ops.spatial_sparse_attention import (
    plan_spatial_sparse_attention,
    reference,
    reference_selected_attention,
    select_blocks,
    selected_attention,
    spatial_sparse_attention,
)
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .cases import random_coords, random_inputs


def block_of(coord, block_size, shift=0):
    return (coord[0], *((axis + shift) // block_size for axis in coord[1:]))


def naive_ssa(
    query, key, value, compressed_key, compressed_value, gate, coords, m_cmp, m_slc, topk, window_size, shift, scale
):
    """One query at a time; also the chosen blocks, `{(query, kv head): set of block coordinates}`."""
    coords = [tuple(row) for row in coords.tolist()]
    compressed = sorted({block_of(coord, m_cmp) for coord in coords})
    group_size = query.shape[1] // key.shape[1]
    output, chosen = torch.zeros_like(query), {}
    for row, coord in enumerate(coords):
        mine = [index for index, block in enumerate(compressed) if block[0] == coord[0]]
        window = [
            other
            for other, there in enumerate(coords)
            if block_of(there, window_size, shift) == block_of(coord, window_size, shift)
        ]
        for kv_head in range(key.shape[1]):
            heads = range(kv_head * group_size, (kv_head + 1) * group_size)
            probabilities = {
                head: torch.softmax(compressed_key[mine, kv_head] @ query[row, head] * scale, 0) for head in heads
            }
            scores = {}
            for place, index in enumerate(mine):
                block = block_of(compressed[index], m_slc // m_cmp)
                scores[block] = scores.get(block, 0) + sum(probabilities[head][place] for head in heads)
            best = set(sorted(scores, key=scores.get, reverse=True)[:topk])
            chosen[row, kv_head] = best
            selected = [other for other, there in enumerate(coords) if block_of(there, m_slc) in best]
            for head in heads:
                in_window, in_blocks = (
                    torch.softmax(key[rows, kv_head] @ query[row, head] * scale, 0) @ value[rows, kv_head]
                    for rows in (window, selected)
                )
                output[row, head] = (
                    gate[row, 0] * (probabilities[head] @ compressed_value[mine, kv_head])
                    + gate[row, 1] * in_blocks
                    + gate[row, 2] * in_window
                )
    return output, chosen


CASES = {
    "one sample": {"voxels": [60], "heads": 2, "kv_heads": 2},
    "groups, batch": {"voxels": [45, 30, 7], "heads": 6, "kv_heads": 2},
    "empty samples": {"voxels": [0, 40, 0, 13, 0], "heads": 4, "kv_heads": 1},
    "single voxels": {"voxels": [1, 1, 20, 1], "heads": 2, "kv_heads": 1},
    "fewer blocks than topk": {"voxels": [9, 50], "heads": 2, "kv_heads": 1, "topk": 50},
    "odd sizes": {
        "voxels": [70, 21],
        "heads": 3,
        "kv_heads": 3,
        "m_cmp": 3,
        "m_slc": 6,
        "window_size": 5,
        "shift": 2,
        "dim": 5,
    },
    "one block size": {"voxels": [50], "heads": 2, "kv_heads": 1, "m_cmp": 4, "m_slc": 4},
    "one block size, batch": {"voxels": [11, 60, 0, 40], "heads": 4, "kv_heads": 2, "m_cmp": 4, "m_slc": 4},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("query_chunk_size", [None, 7])
def test_matches_naive(name, query_chunk_size):
    case = {"m_cmp": 2, "m_slc": 4, "topk": 3, "window_size": 4, "shift": 2, "dim": 8, "resolution": 12} | CASES[name]
    coords = random_coords(case["voxels"], case["resolution"])
    cache, *tensors, gate = random_inputs(
        coords, len(case["voxels"]), case["heads"], case["kv_heads"], case["dim"], case["m_cmp"]
    )
    blocks = (case["m_cmp"], case["m_slc"], case["topk"])
    scale = 1.5 * case["dim"] ** -0.5
    expected, expected_choice = naive_ssa(
        *tensors, gate, coords, *blocks, case["window_size"], case["shift"], scale=scale
    )

    choice = select_blocks(tensors[0], tensors[3], cache, *blocks, scale=scale, query_chunk_size=query_chunk_size)
    block_coords = [tuple(row) for row in cache.partition(case["m_slc"]).coords.tolist()]
    for row, kv_head in itertools.product(range(len(coords)), range(case["kv_heads"])):
        found = [block_coords[block] for block in choice[row, kv_head].tolist() if block >= 0]
        assert len(found) == len(set(found))
        assert set(found) == expected_choice[row, kv_head]

    output = spatial_sparse_attention(
        *tensors,
        gate,
        cache,
        *blocks,
        case["window_size"],
        window_shift=case["shift"],
        scale=scale,
        query_chunk_size=query_chunk_size,
    )
    torch.testing.assert_close(output, expected)


def test_row_order_does_not_matter():
    coords = random_coords([40, 25], 12)
    cache, query, key, value, *compressed, gate = random_inputs(coords, 2, 4, 2, 8, 2)
    output = spatial_sparse_attention(query, key, value, *compressed, gate, cache, 2, 4, 3, 4, window_shift=2)
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))
    shuffled = spatial_sparse_attention(
        query[order],
        key[order],
        value[order],
        *compressed,  # pooled coordinates are ascending whatever the order of the rows
        gate[order],
        CoordinateCache(coords[order], 2),
        2,
        4,
        3,
        4,
        window_shift=2,
    )
    torch.testing.assert_close(shuffled, output[order])


def test_half_precision_is_close():
    coords = random_coords([300, 120], 16)
    cache, *tensors = random_inputs(coords, 2, 4, 2, 16, 4, seed=3)
    arguments = (cache, 4, 8, 50, 8)  # all blocks: near-ties cannot change the choice
    expected = spatial_sparse_attention(*tensors, *arguments)
    output = spatial_sparse_attention(*(tensor.bfloat16() for tensor in tensors), *arguments)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() < 1e-2 * expected.norm()


def test_no_tokens():
    coords = torch.zeros(0, 4, dtype=torch.int32)
    cache, *tensors = random_inputs(coords, 2, 4, 2, 8, 2)
    assert spatial_sparse_attention(*tensors, cache, 2, 4, 3, 4).shape == (0, 4, 8)


@pytest.mark.parametrize("query_chunk_size", [None, 4])
def test_gradients(query_chunk_size):
    coords = random_coords([9, 0, 1, 4], 8)
    cache, *tensors = random_inputs(coords, 4, 4, 2, 3, 2)
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def function(*inputs):
        return spatial_sparse_attention(*inputs, cache, 2, 4, 2, 4, query_chunk_size=query_chunk_size)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("topk, complete", [(1, True), (6, False)], ids=["topk blocks", "fewer blocks than topk"])
def test_gradients_of_selected_attention(topk, complete):
    coords = random_coords([11, 3], 8)
    cache, query, key, value, compressed_key, *_ = random_inputs(coords, 2, 4, 2, 3, 2)
    value = torch.randn(len(coords), 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    blocks = select_blocks(query, compressed_key, cache, 2, 4, topk)
    assert bool((blocks >= 0).all()) is complete
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *qkv: selected_attention(*qkv, blocks, cache.partition(4)), inputs)


@pytest.mark.parametrize("topk", [2, 30], ids=["topk blocks", "fewer blocks than topk"])
@pytest.mark.parametrize("largest", [0.01, 59.0, 61.0, 3e3])
def test_selected_attention_of_scores_of_any_size(largest, topk):
    """Queries along or against the longest key, so that their largest score is as large as it can be, or as small."""
    coords = random_coords([300, 13], 12)
    cache, query, key, value, compressed_key, *_ = random_inputs(coords, 2, 4, 2, 3, 2)
    selection = cache.partition(4)
    blocks = select_blocks(query, compressed_key, cache, 2, 4, topk)
    assert bool((blocks < 0).any()) == (topk == 30)
    longest = key.flatten(0, 1)[key.norm(dim=-1).argmax()]
    query[::3], query[1::3] = longest, -longest
    query *= largest / (query.norm(dim=-1).max() * key.norm(dim=-1).max())
    found = selected_attention(query.float(), key.float(), value.float(), blocks, selection, scale=1.0)
    block_of_token = torch.empty(len(coords), dtype=torch.int32)
    block_of_token[selection.order] = torch.repeat_interleave(selection.cu_seqlens.diff())
    # [queries, heads, keys]
    attended = (blocks[..., None] == block_of_token).any(2).repeat_interleave(2, 1)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = torch.einsum("nhd,mhd->nhm", query, key).masked_fill(~attended, float("-inf"))
    expected = torch.einsum("nhm,mhd->nhd", scores.softmax(-1), value)
    # A score of thousands has an error of 1e-4 in float32.
    tolerance = 1e-5 * max(1.0, largest / 30)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_block_sizes_must_fit():
    coords = random_coords([5], 8)
    cache, *tensors = random_inputs(coords, 1, 2, 1, 4, 3)
    with pytest.raises(ValueError, match="selection_block_size"):
        spatial_sparse_attention(*tensors, cache, 3, 8, 2, 8)


def test_operators_are_registered_right():
    coords = random_coords([11, 3], 8)
    cache, query, key, value, compressed_key, *_ = random_inputs(coords, 2, 4, 2, 3, 2)
    compressed, _ = cache.downsample(2)
    samples = cache.batch_partition()
    for size, block_of_compressed in ((2, None), (4, compressed.downsample(2)[1])):
        selection = cache.partition(size)
        rows = (samples.order, block_of_compressed, samples.cu_seqlens, compressed.cu_seqlens)
        sizes = ([11, 3], compressed.batch_partition().max_seqlen, selection.most_blocks, 3, 0.5, 0)
        arguments = (query, compressed_key, *rows, selection.batch_cu_blocks, *sizes)
        torch.library.opcheck(reference._select_blocks.registered, arguments)
    blocks = select_blocks(query, compressed_key, cache, 2, 4, 3)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(
        reference_selected_attention._attend.registered,
        (*leaves, blocks, selection.order, selection.cu_seqlens, 0.5, 5),
    )


def test_compiled_once_for_all_coordinates():
    """`fullgraph=True` fails if something cannot be traced, a second set of coordinates if something was fixed."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(spatial_sparse_attention, fullgraph=True, dynamic=True, backend=backend)
    for voxels in ([40, 25], [31, 60], [90, 3]):
        coords = random_coords(voxels, 12)
        cache, *tensors = random_inputs(coords, 2, 4, 2, 8, 2)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        settings = (cache, 2, 4, 3, 4, 2)
        plan_spatial_sparse_attention(*tensors[:3], cache, 2, 4, 4, 2)
        output, expected = compiled(*tensors, *settings), spatial_sparse_attention(*tensors, *settings)
        torch.testing.assert_close(output, expected)
        weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0))
        for found, gradient in zip(
            torch.autograd.grad(output, tensors, weights), torch.autograd.grad(expected, tensors, weights)
        ):
            torch.testing.assert_close(found, gradient)
    assert len(graphs) == 1
