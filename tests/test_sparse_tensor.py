import copy
import gc
import io
import weakref

import pytest
import torch

from diffusers_sparse3d import SparseConv3d
from diffusers_sparse3d.ops.coordinates import neighbour_map
from diffusers_sparse3d.sparse_tensor import CoordinateCache, SparseTensor

from .models.test_attention import sparse_coords


# Sample 1 is empty.
COORDS = torch.tensor([[2, 0, 1, 7], [0, 3, 3, 3], [2, 0, 0, 0], [0, 2, 3, 3], [2, 7, 7, 7]], dtype=torch.int32)


def test_arguments_that_do_not_fit_are_refused():
    coords = torch.tensor([[0, 1, 2, 3], [1, 1, 2, 3]], dtype=torch.int32)
    with pytest.raises(TypeError, match="`cache` must be a CoordinateCache, got Tensor"):
        SparseTensor(torch.ones(2, 1), coords, coords)
    with pytest.raises(ValueError, match="`cache` must be that of the 2 rows of `coords`, got one of 1"):
        SparseTensor(torch.ones(2, 1), coords, CoordinateCache(coords[:1]))
    with pytest.raises(ValueError, match="`coords` must have batch indices of at least 0, got -1"):
        CoordinateCache(coords - 1)
    with pytest.raises(TypeError, match="`batch_size` must be an integer, got"):
        CoordinateCache(coords, 2.0)
    for resolution in (0, "16"):
        with pytest.raises(ValueError, match="`resolution` must be an integer from 1 to 2048"):
            SparseTensor(torch.ones(2, 1), coords).validate(resolution)


def test_cache_of_samples():
    cache = CoordinateCache(COORDS)
    assert cache.batch_size == 3
    assert cache.seqlens.tolist() == [2, 0, 3] and cache.seqlens.dtype == torch.int64
    assert cache.cu_seqlens.tolist() == [0, 2, 2, 5] and cache.cu_seqlens.dtype == torch.int32
    partition = cache.batch_partition()
    assert partition.order.tolist() == [1, 3, 0, 2, 4]
    assert torch.equal(partition.order[partition.inverse], torch.arange(5))
    assert partition.cu_seqlens.tolist() == [0, 2, 2, 5] and partition.max_seqlen == 3
    assert partition.block_index.tolist() == COORDS[:, 0].tolist()
    assert partition.coords.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
    assert partition.batch_cu_blocks.tolist() == [0, 1, 2, 3]
    grouped = CoordinateCache(COORDS[partition.order], batch_size=4)
    assert grouped.batch_partition().order.tolist() == [0, 1, 2, 3, 4]
    assert grouped.seqlens.tolist() == [2, 0, 3, 0]


def test_everything_is_computed_once():
    cache = CoordinateCache(COORDS)
    assert cache.neighbour_map() is cache.neighbour_map()
    assert cache.partition(4, 2) is cache.partition(4, 2)
    assert cache.partition(4) is not cache.partition(4, 2)
    assert cache.batch_partition() is cache.batch_partition()
    assert cache.downsample(2)[0] is cache.downsample(2)[0]
    children = cache.subdivide()
    assert cache.subdivide() is children


def test_derived_caches_keep_the_batch_size():
    cache = CoordinateCache(COORDS, batch_size=7)
    pooled, parents = cache.downsample(4)
    assert pooled.batch_size == 7 and cache.subdivide().batch_size == 7
    assert torch.equal(pooled.coords[parents][:, 1:], COORDS[:, 1:] // 4)


def test_subdivided_neighbours_come_from_the_parents():
    grandchildren = CoordinateCache(COORDS).subdivide().subdivide()
    assert torch.equal(grandchildren.neighbour_map(), neighbour_map(grandchildren.coords))


def test_caches_are_freed_without_the_garbage_collector():
    gc.disable()
    try:
        cache = CoordinateCache(COORDS)
        children = cache.subdivide()
        children.neighbour_map(), cache.downsample(2)[0].neighbour_map()
        dead = weakref.ref(cache), weakref.ref(children)
        del cache, children
        assert all(reference() is None for reference in dead)
    finally:
        gc.enable()


def test_empty():
    tensor = SparseTensor(torch.zeros(0, 3), torch.zeros(0, 4, dtype=torch.int32)).validate()
    assert tensor.batch_size == 0 and tensor.cu_seqlens.tolist() == [0]
    assert tensor.cache.batch_partition().max_seqlen == 0
    assert tensor.cache.subdivide().neighbour_map().shape == (27, 0)
    assert tensor.cache.downsample(2)[0].coords.shape == (0, 4)


def test_sparse_tensor_shares_the_cache():
    tensor = SparseTensor(torch.randn(5, 2), COORDS)
    other = tensor.replace(torch.randn(5, 8))
    assert other.cache is tensor.cache and other.coords is tensor.coords
    half = tensor.to(torch.float16)
    assert half.feats.dtype == torch.float16 and half.coords.dtype == torch.int32 and half.cache is tensor.cache
    moved = SparseTensor(torch.randn(5, 2), COORDS, CoordinateCache(COORDS, 9)).to("meta")
    assert moved.feats.device.type == moved.coords.device.type == moved.cache.coords.device.type == "meta"
    assert moved.batch_size == 9
    assert tensor.batch_size == 3 and tensor.seqlens.tolist() == [2, 0, 3]


def test_bad_input():
    with pytest.raises(ValueError, match=r"`feats`"):
        SparseTensor(torch.randn(4, 2), COORDS)
    with pytest.raises(ValueError, match=r"`coords`"):
        SparseTensor(torch.randn(5, 2), COORDS[:, 1:])
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"`feats`.*finite"):
            SparseTensor(torch.tensor([[0.0]] * 4 + [[value]]), COORDS).validate()
    with pytest.raises(ValueError, match=r"`coords`.*resolution 7"):
        SparseTensor(torch.randn(5, 2), COORDS).validate(resolution=7)
    with pytest.raises(ValueError, match=r"`coords`.*duplicate"):
        SparseTensor(torch.randn(10, 2), COORDS.repeat(2, 1)).validate()


def test_derived_results_are_kept_by_key():
    cache = CoordinateCache(COORDS)
    calls = []

    def make() -> int:
        calls.append(None)
        return len(calls)

    assert [cache.derived(("plan", size), make) for size in (4, 8, 4, 8)] == [1, 2, 1, 2]
    assert cache.derived("plan", make) == 3
    # Another cache of the same voxels, and the cache of the coarse voxels, have results of their own.
    assert CoordinateCache(COORDS).derived("plan", make) == 4
    assert cache.downsample(2)[0].derived("plan", make) == 5


def test_partitions_differ_by_block_size_and_shift():
    cache = CoordinateCache(COORDS)
    for block_size in (4, 8):
        for shift in (0, 2):
            partition = cache.partition(block_size, shift)
            blocks = torch.cat([COORDS[:, :1], (COORDS[:, 1:] + shift) // block_size], dim=1)
            assert torch.equal(partition.coords[partition.block_index.long()], blocks.to(partition.coords.dtype))


def test_subdivision_orders_children_by_parent():
    children = CoordinateCache(COORDS, batch_size=4).subdivide()
    assert torch.equal(children.coords.view(5, 8, 4)[:, :, 1:] // 2, COORDS[:, None, 1:].expand(5, 8, 3))
    assert torch.equal(children.coords.view(5, 8, 4)[:, :, 0], COORDS[:, None, 0].expand(5, 8))
    assert len(children.coords.unique(dim=0)) == 40 and children.seqlens.tolist() == [16, 0, 24, 0]


@pytest.mark.parametrize(
    "coords", [[[0, 1, 2, 3]], None, torch.zeros(3, 4), torch.zeros(3, 3).int(), torch.zeros(4).int()]
)
def test_rows_that_are_no_voxels_are_named(coords):
    with pytest.raises((TypeError, ValueError), match="`coords`"):
        CoordinateCache(coords)
    with pytest.raises((TypeError, ValueError), match="`coords`"):
        SparseTensor(torch.zeros(3, 1), coords)


def test_bounds_of_caches():
    coords = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch indices below 65536, got 268435456"):
        CoordinateCache(coords + torch.tensor([1 << 28, 0, 0, 0], dtype=torch.int32))
    cache = CoordinateCache(coords)
    for name, call in (
        ("block_size", lambda: cache.partition(0)),
        ("shift", lambda: cache.partition(2, -1)),
        ("factor", lambda: cache.downsample(0)),
        ("factor", lambda: cache.downsample(2.5)),
    ):
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            call()
    with pytest.raises(TypeError, match="`feats`"):
        SparseTensor([1.0], coords)


def test_a_tensor_keeps_its_cache_until_it_is_changed():
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], dtype=torch.int32)
    cache = CoordinateCache.of(coords)
    assert CoordinateCache.of(coords) is cache and not cache.is_stale
    coords[1, 3] = 9
    changed = CoordinateCache.of(coords)
    assert changed is not cache and changed.coords.tolist() == coords.tolist() and cache.is_stale
    assert CoordinateCache.of(coords) is changed and not changed.is_stale


def test_coordinates_are_saved_without_their_cache():
    """With it, they would be many times as large, and loading them would need more than weights."""
    coords, before, after = sparse_coords(20), io.BytesIO(), io.BytesIO()
    torch.save(coords, before)
    cache = CoordinateCache.of(coords)
    assert len(cache.neighbour_map()) == 27 and len(cache.subdivide().coords) == 160
    torch.save(coords, after)
    assert len(after.getvalue()) == len(before.getvalue())
    after.seek(0)
    assert torch.equal(torch.load(after, weights_only=True), coords)
    assert CoordinateCache.of(copy.deepcopy(coords)) is not cache and CoordinateCache.of(coords) is cache


def test_coordinates_of_inference_mode_are_compared_by_their_rows():
    """They have no versions that would tell."""
    with torch.inference_mode():
        coords = sparse_coords(20).clone()
        cache = CoordinateCache.of(coords)
        assert CoordinateCache.of(coords) is cache
        coords[:, 1] *= 2
        changed = CoordinateCache.of(coords)
        assert changed is not cache and torch.equal(changed.coords, coords)
        expected = CoordinateCache(coords, 1).neighbour_map()
        assert torch.equal(changed.neighbour_map(), expected)


@pytest.mark.parametrize("made_there", [False, True])
def test_tables_of_inference_mode_serve_trainings(made_there):
    coords = sparse_coords(20)
    with torch.inference_mode():
        cache = CoordinateCache(coords.clone() if made_there else coords, 1)
        assert not torch.is_grad_enabled() and cache.derived("grad", torch.is_grad_enabled) is False
        children, coarse = cache.subdivide(keep=True), cache.downsample(2)[0]
        caches = (cache, children, coarse)
        made = [(each.neighbour_map(), each.partition(2, 1), each.batch_partition()) for each in caches]
    for each, (table, *_) in zip(caches, made):
        assert each.neighbour_map() is table
        partition, samples = each.partition(2, 1), each.batch_partition()
        tensors = [each.coords, each.neighbour_map(), each.seqlens, each.cu_seqlens]
        tensors += [partition.order, partition.cu_seqlens, samples.order, samples.coords]
        assert not any(tensor.is_inference() for tensor in tensors)
    conv = SparseConv3d(2, 3)
    conv(torch.randn(20, 2), cache).sum().backward()
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("batch", "in_order"), [([0, 0, 2], True), ([0, 2, 0], False), ([1, 1, 0], False)])
def test_rows_are_in_order_if_their_samples_are(batch, in_order):
    coords = torch.zeros(3, 4, dtype=torch.int32)
    coords[:, 0], coords[:, 1] = torch.tensor(batch), torch.arange(3)
    partition = CoordinateCache(coords, 3).batch_partition()
    assert partition.in_order == in_order
    assert coords[partition.order, 0].tolist() == sorted(batch)
