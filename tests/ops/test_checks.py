"""Arguments of operators that do not fit are refused before any work, by their names."""

import pytest
import torch

from diffusers_sparse3d.ops.adaptive_filter import adaptive_filter
from diffusers_sparse3d.ops.checks import check_at_least, check_floating, check_shape
from diffusers_sparse3d.ops.coordinates import (
    check_coords,
    downsample_coords,
    neighbour_map,
    partition_coords,
    unique_coords,
)
from diffusers_sparse3d.ops.group_norm import dense_group_norm, sparse_group_norm
from diffusers_sparse3d.ops.modulation import SampleRows, affine_layer_norm, gated_sum, modulated_layer_norm
from diffusers_sparse3d.ops.packed_attention import packed_attention, partitioned_attention
from diffusers_sparse3d.ops.pooling import sparse_mean_pool
from diffusers_sparse3d.ops.sparse_conv import sparse_conv3d, sparse_subdivide_conv3d
from diffusers_sparse3d.ops.spatial_sparse_attention import (
    plan_spatial_sparse_attention,
    spatial_sparse_attention,
)
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.models.test_attention import sparse_coords


CACHE = CoordinateCache(sparse_coords(12, 8, resolution=16), 2)
COMPRESSED = len(CACHE.downsample(4)[0].coords)
ROWS = 20


def ones(*shape, **options):
    return torch.ones(*shape, **options)


def norm(**changes):
    return sparse_group_norm(
        **{"feats": ones(ROWS, 4), "cache": CACHE, "num_groups": 2, "weight": ones(4), "bias": ones(4)} | changes
    )


def dense_norm(**changes):
    arguments = {"hidden_states": ones(1, 4, 3, 3, 3), "num_groups": 2, "weight": ones(4), "bias": ones(4)}
    return dense_group_norm(**arguments | changes)


def pool(**changes):
    return sparse_mean_pool(**{"feats": ones(ROWS, 4), "cache": CACHE, "factor": 2} | changes)


def conv(**changes):
    return sparse_conv3d(
        **{"feats": ones(ROWS, 4), "weight": ones(27, 4, 3), "bias": ones(3), "cache": CACHE} | changes
    )


def subdivide_conv(**changes):
    return sparse_subdivide_conv3d(
        **{"feats": ones(ROWS, 4), "weight": ones(27, 4, 3), "bias": ones(3), "cache": CACHE} | changes
    )


def packed(**changes):
    boundaries = torch.tensor([0, 3, 7], dtype=torch.int32)
    arguments = {"query": ones(7, 4, 8), "key": ones(7, 2, 8), "value": ones(7, 2, 5)}
    return packed_attention(**arguments | {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries} | changes)


def partitioned(**changes):
    samples = CACHE.batch_partition()
    arguments = {"query": ones(ROWS, 4, 8), "key": ones(ROWS, 2, 8), "value": ones(ROWS, 2, 5)}
    return partitioned_attention(**arguments | {"partition": samples, "key_partition": samples} | changes)


def ssa(**changes):
    arguments = {
        "query": ones(ROWS, 4, 8),
        "key": ones(ROWS, 2, 8),
        "value": ones(ROWS, 2, 5),
        "compressed_key": ones(COMPRESSED, 2, 8),
        "compressed_value": ones(COMPRESSED, 2, 5),
        "gate": ones(ROWS, 3),
        "cache": CACHE,
        "compression_block_size": 4,
        "selection_block_size": 8,
        "topk": 2,
        "window_size": 4,
    }
    return spatial_sparse_attention(**arguments | changes)


def plan_ssa(**changes):
    heads = [ones(0, 4, 8), ones(0, 2, 8), ones(0, 2, 8)]
    sizes = {"compression_block_size": 4, "selection_block_size": 8, "window_size": 4} | changes
    return plan_spatial_sparse_attention(*heads, CACHE, **sizes)


def adaptive(**changes):
    return adaptive_filter(**{"hidden_states": ones(1, 2, 3, 3, 3), "taps": ones(1, 27, 3, 3, 3)} | changes)


def modulated(**changes):
    arguments = {"hidden_states": ones(ROWS, 4), "shift": ones(2, 4), "scale": ones(2, 4)}
    return modulated_layer_norm(**arguments | {"samples": SampleRows.of(CACHE)} | changes)


def affine(**changes):
    return affine_layer_norm(**{"hidden_states": ones(ROWS, 4), "weight": ones(4), "bias": ones(4)} | changes)


def gated(**changes):
    arguments = {"residual": ones(ROWS, 4), "values": ones(ROWS, 4), "gate": ones(2, 4)}
    return gated_sum(**arguments | {"samples": SampleRows(2)} | changes)


FEW_ROWS = {"feats": ones(ROWS - 1, 4)}
BAD = [
    (norm, FEW_ROWS, ValueError),
    (norm, {"feats": ones(ROWS, 4, 1)}, ValueError),
    (norm, {"feats": ones(ROWS, 4).long()}, ValueError),
    (norm, {"feats": ones(ROWS, 4, dtype=torch.complex64)}, ValueError),
    (norm, {"feats": [[1.0]]}, TypeError),
    (norm, {"num_groups": 3}, ValueError),
    (norm, {"num_groups": 0}, ValueError),
    (norm, {"num_groups": 2.0}, TypeError),
    (norm, {"weight": ones(5)}, ValueError),
    (norm, {"bias": ones(1, 4)}, ValueError),
    (dense_norm, {"hidden_states": ones(1, 4)}, ValueError),
    (dense_norm, {"num_groups": 3}, ValueError),
    (dense_norm, {"weight": ones(3)}, ValueError),
    (pool, FEW_ROWS, ValueError),
    (pool, {"factor": 0}, ValueError),
    (pool, {"factor": -2}, ValueError),
    (pool, {"factor": True}, TypeError),
    (conv, {"cache": CoordinateCache(CACHE.coords[:-1], 2)}, ValueError),
    (conv, {"cache": None}, ValueError),
    (conv, {"weight": ones(26, 4, 3)}, ValueError),
    (conv, {"weight": ones(27, 5, 3)}, ValueError),
    (conv, {"weight": ones(5, 3)}, ValueError),
    (conv, {"bias": ones(4)}, ValueError),
    (conv, {"feats": ones(ROWS)}, ValueError),
    (subdivide_conv, {"weight": ones(4, 3)}, ValueError),
    (packed, {"query": ones(7, 3, 8)}, ValueError),
    (packed, {"key": ones(7, 2, 7)}, ValueError),
    (packed, {"key": ones(7, 0, 8)}, ValueError),
    (packed, {"value": ones(6, 2, 5)}, ValueError),
    (packed, {"cu_seqlens_q": torch.tensor([1, 3, 7])}, ValueError),
    (packed, {"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError),
    (packed, {"cu_seqlens_k": torch.tensor([0, 8, 7])}, ValueError),
    (packed, {"cu_seqlens_k": torch.tensor([0, 7])}, ValueError),
    (packed, {"cu_seqlens_k": torch.tensor([0.0, 3.0, 7.0])}, ValueError),
    (packed, {"cu_seqlens_k": torch.tensor([], dtype=torch.int32)}, ValueError),
    (partitioned, {"query": ones(ROWS + 1, 4, 8)}, ValueError),
    (partitioned, {"key_partition": CoordinateCache(CACHE.coords[:9], 2).batch_partition()}, ValueError),
    (ssa, {"query": ones(ROWS - 1, 4, 8)}, ValueError),
    (ssa, {"key": ones(ROWS, 3, 8)}, ValueError),
    (ssa, {"value": ones(ROWS, 1, 5)}, ValueError),
    (ssa, {"compressed_key": ones(COMPRESSED + 1, 2, 8)}, ValueError),
    (ssa, {"compressed_value": ones(COMPRESSED - 1, 2, 5)}, ValueError),
    (ssa, {"gate": ones(ROWS, 2)}, ValueError),
    (ssa, {"topk": 0}, ValueError),
    (ssa, {"window_size": 0}, ValueError),
    (ssa, {"window_shift": -1}, ValueError),
    (ssa, {"compression_block_size": 0}, ValueError),
    (ssa, {"selection_block_size": 6}, ValueError),
    (ssa, {"query": ones(ROWS, 4, 8).int()}, ValueError),
    (plan_ssa, {"window_size": -4}, ValueError),
    (plan_ssa, {"selection_block_size": 0}, ValueError),
    (adaptive, {"hidden_states": ones(2, 3, 3, 3)}, ValueError),
    (adaptive, {"hidden_states": ones(1, 2, 3, 3, 3).int()}, ValueError),
    (adaptive, {"hidden_states": None}, TypeError),
    (adaptive, {"taps": ones(1, 26, 3, 3, 3)}, ValueError),
    (adaptive, {"taps": ones(1, 27, 3, 3, 3).half()}, ValueError),
    (adaptive, {"taps": [1.0]}, TypeError),
    (modulated, {"hidden_states": ones(ROWS - 1, 4)}, ValueError),
    (modulated, {"hidden_states": ones(4)}, ValueError),
    (modulated, {"hidden_states": [1.0]}, TypeError),
    (modulated, {"shift": ones(1, 4)}, ValueError),
    (modulated, {"scale": ones(2, 5)}, ValueError),
    (modulated, {"scale": ones(2, 4).long()}, ValueError),
    (modulated, {"samples": 2}, TypeError),
    (affine, {"hidden_states": ones(ROWS, 4).cfloat()}, ValueError),
    (affine, {"weight": ones(5)}, ValueError),
    (affine, {"bias": 0.0}, TypeError),
    (gated, {"residual": ones(ROWS - 1, 4)}, ValueError),
    (gated, {"values": ones(ROWS, 1)}, ValueError),
    (gated, {"values": None}, TypeError),
    (gated, {"gate": ones(4)}, ValueError),
    (gated, {"samples": CACHE}, TypeError),
    (norm, {"weight": None}, TypeError),
    (norm, {"cache": CACHE.coords}, TypeError),
    (norm, {"cache": None}, TypeError),
    (norm, {"eps": -1.0}, ValueError),
    (dense_norm, {"bias": None}, TypeError),
    (dense_norm, {"eps": float("nan")}, ValueError),
    (dense_norm, {"eps": "1"}, TypeError),
    (pool, {"feats": None}, TypeError),
    (pool, {"feats": ones(ROWS, 4).to_sparse()}, ValueError),
    (pool, {"cache": SampleRows(2)}, TypeError),
    (pool, {"factor": 1 << 40}, ValueError),
    (conv, {"weight": None}, TypeError),
    (conv, {"weight": ones(27, 4, 3).double()}, ValueError),
    (conv, {"cache": CACHE.coords}, TypeError),
    (packed, {"key": None}, TypeError),
    (packed, {"query": ones(7, 4, 0), "key": ones(7, 2, 0)}, ValueError),
    (packed, {"scale": float("nan")}, ValueError),
    (packed, {"scale": "1"}, TypeError),
    (packed, {"cu_seqlens_q": [0, 7]}, TypeError),
    (packed, {"cu_seqlens_k": torch.tensor([False, True])}, ValueError),
    (partitioned, {"partition": CACHE}, TypeError),
    (ssa, {"scale": float("inf")}, ValueError),
    (ssa, {"gate": None}, TypeError),
    (modulated, {"eps": float("inf")}, ValueError),
    (affine, {"weight": ones(())}, ValueError),
    (affine, {"eps": -1e-6}, ValueError),
]


@pytest.mark.parametrize("function, change, error", BAD, ids=lambda value: getattr(value, "__name__", None))
def test_the_argument_is_named(function, change, error):
    name = next(iter(change))
    # Of two arguments that do not fit together, the other one may be named.
    names = {
        "compressed_key": "compressed_(key|value)",
        "query": "query|key|partition",
        "hidden_states": "hidden_states|taps",
    }.get(name, name)
    with pytest.raises(error, match=f"`({names})` must"):
        function(**change)


@pytest.mark.parametrize(
    "function",
    [norm, dense_norm, pool, conv, subdivide_conv, packed, partitioned, ssa, plan_ssa]
    + [adaptive, modulated, affine, gated],
)
def test_what_fits_is_taken(function):
    function()


def test_batch_indices_are_bounded():
    coords = torch.tensor([[1 << 16, 0, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="`coords` must have batch indices below 65536"):
        check_coords(coords)
    check_coords(coords - torch.tensor([1, 0, 0, 0], dtype=torch.int32))


@pytest.mark.parametrize(
    "index, error",
    [("a", TypeError), (torch.zeros(3), ValueError), (torch.zeros(3, 1, dtype=torch.int32), ValueError)],
)
def test_samples_of_rows(index, error):
    with pytest.raises(error, match="`index` must be"):
        SampleRows(2, index)
    with pytest.raises((TypeError, ValueError), match="`batch_size` must be"):
        SampleRows(-1 if error is ValueError else "2")


def test_voxels():
    coords = CACHE.coords
    for function in (unique_coords, neighbour_map, lambda rows: downsample_coords(rows, 2)):
        with pytest.raises(ValueError, match=r"`coords` must be integers of shape \[N, 4\]"):
            function(coords[:, 1:])
        with pytest.raises(TypeError, match="`coords` must be a tensor, got list"):
            function(coords.tolist())
    for factor in (0, 4096):
        with pytest.raises(ValueError, match="`factor` must be at"):
            downsample_coords(coords, factor)
    with pytest.raises(ValueError, match="`block_size` must be at least 1"):
        partition_coords(coords, 0)
    with pytest.raises(ValueError, match="`shift` must be at least 0"):
        partition_coords(coords, 4, -1)


def test_messages():
    with pytest.raises(ValueError, match=r"`x` must have shape \[2, C\], got \[2, 3, 4\]"):
        check_shape("x", ones(2, 3, 4), 2, "C")
    with pytest.raises(TypeError, match="`x` must be an integer, got '3'"):
        check_at_least(1, x="3")
    with pytest.raises(TypeError, match="`x` must be a tensor, got list"):
        check_floating(x=[1.0])
