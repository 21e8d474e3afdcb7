"""Tile shapes of the kernels: any gives the same result, tuned ones are found, kept on disk and used."""

import json
import os
import subprocess
import sys

import pytest
import torch
from triton.runtime.errors import OutOfResources

from diffusers_sparse3d import tune_spatial_sparse_attention
from diffusers_sparse3d.ops.spatial_sparse_attention import api, reference, spatial_sparse_attention
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import segment_attention, tile_shapes, tuning
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tile_shapes import TileShapes
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tuning import TileShape
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from ..kernel_testing import DEVICE, NATIVE
from .cases import assert_same, make_case, random_coords, settings_of
from .test_operator_kernels import plan_of


# Those of the case "groups" in float32.
HEADS = HeadShape(2, 3, 16, 16)
# Different ones for all kernels, the larger and the smaller edge first in turn.
SHAPES = TileShapes(
    TileShape(16, 32, 4, 1),
    TileShape(64, 16, 4, 1),
    TileShape(32, 64, 4, 1),
    TileShape(64, 32, 4, 1),
    TileShape(32, 16, 4, 1),
    TileShape(16, 32, 2, 1),
    TileShape(64, 64, 4, 2),
    TileShape(16, 32, 4, 2),
    TileShape(16, 16, 4, 1),
)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_shapes, "_directory", lambda: tmp_path)
    tile_shapes._tuned.cache_clear()
    yield tmp_path
    tile_shapes._tuned.cache_clear()


def shapes_for(dtype=torch.float32):
    return tile_shapes.shapes_for(HEADS, dtype, torch.device(DEVICE))


# With many voxels, near-ties would change the choice of the blocks: there are few enough that all are chosen.
ALL_BLOCKS = {"topk": 64, "resolution": 16 if NATIVE else 9}


def save(shapes, dtype=torch.float32):
    return tile_shapes.save_shapes(shapes, HEADS, dtype, torch.device(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_with_tuned_shapes(dtype, directory, kernels_run):
    save(SHAPES, dtype)
    case, cache, inputs = make_case("groups", dtype, **ALL_BLOCKS)
    settings = (cache, *settings_of(case))
    assert_same(
        lambda *tensors: spatial_sparse_attention(*tensors, *settings),
        lambda *tensors: reference.spatial_sparse_attention(*tensors, *settings),
        inputs,
        dtype,
    )
    _, sizes = plan_of(case, cache, [tensor.to(dtype) for tensor in inputs])
    assert sizes[-len(SHAPES.numbers) :] == SHAPES.numbers


def test_a_plan_keeps_the_shapes_that_it_was_made_for(directory, kernels_run):
    case, cache, inputs = make_case("groups", torch.float32, **ALL_BLOCKS)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    settings = (cache, *settings_of(case))
    output = spatial_sparse_attention(*leaves, *settings)
    before = plan_of(case, cache, leaves)
    expected = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
    save(SHAPES)
    for found, gradient in zip(torch.autograd.grad(output.square().sum(), leaves), expected):
        assert torch.equal(found, gradient)
    assert plan_of(case, cache, leaves) is before
    _, sizes = plan_of(case, CoordinateCache(cache.coords, 2), leaves)
    assert sizes != before[1] and TileShapes.from_numbers(sizes[-len(SHAPES.numbers) :]) == SHAPES


def test_on_disk(directory, monkeypatch):
    default = tile_shapes.default_shapes(HEADS, torch.float32)
    assert shapes_for() == default
    path = save(SHAPES)
    assert list(directory.iterdir()) == [path]
    tile_shapes._tuned.cache_clear()
    assert shapes_for() == SHAPES
    assert shapes_for(torch.float16) == tile_shapes.default_shapes(HEADS, torch.float16)
    other = HeadShape(2, 4, 16, 16)
    assert tile_shapes.shapes_for(other, torch.float32, torch.device(DEVICE)) == tile_shapes.default_shapes(
        other, torch.float32
    )
    # Other kernels: what was found for those of before is not looked at.
    monkeypatch.setattr(tile_shapes, "_source_hash", lambda: "changed")
    assert shapes_for() == default


@pytest.mark.parametrize("damage", ["cut", "not json", "list", "kernel missing", "too small", "too many numbers"])
def test_what_cannot_be_used_is_ignored(damage, directory):
    path = save(SHAPES)
    text, stored = path.read_text(), json.loads(path.read_text())
    if damage == "kernel missing":
        del stored["shapes"]["compressed_forward"]
    elif damage == "too small":
        stored["shapes"]["compressed_forward"][0] = 8
    elif damage == "too many numbers":
        stored["shapes"]["compressed_forward"].append(8)
    elif damage == "list":
        stored["shapes"] = [1, 2]
    path.write_text({"cut": text[:-30], "not json": "\0"}.get(damage, json.dumps(stored)))
    tile_shapes._tuned.cache_clear()
    assert shapes_for() == tile_shapes.default_shapes(HEADS, torch.float32)


def test_no_directory(monkeypatch):
    def fail():
        raise PermissionError

    monkeypatch.setattr(tile_shapes, "_directory", fail)
    tile_shapes._tuned.cache_clear()
    assert shapes_for() == tile_shapes.default_shapes(HEADS, torch.float32)
    tile_shapes._tuned.cache_clear()


def test_two_processes_write(directory):
    code = """
import pathlib, sys, torch
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels import tile_shapes
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape
tile_shapes._directory = lambda: pathlib.Path(sys.argv[1])
heads = HeadShape(2, 3, 16, 16)
shapes = tile_shapes.default_shapes(heads, torch.float32)
for number in range(300):
    forward = shapes.compressed_forward._replace(num_stages=1 + number % 2)
    changed = shapes._replace(compressed_forward=forward)
    tile_shapes.save_shapes(changed, heads, torch.float32, torch.device(sys.argv[2]))
"""
    path = save(SHAPES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(directory), DEVICE]
    writers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(json.loads(path.read_text())["shapes"]["compressed_forward"][3])
        tile_shapes._tuned.cache_clear()
        assert shapes_for() != tile_shapes.default_shapes(HEADS, torch.float16)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(directory.iterdir()) == [path]
    assert seen == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 16, 32, 32), (1, 1, 128, 128), (2, 4, 64, 64), (1, 32, 16, 16)])
def test_candidates(heads, dtype):
    heads = HeadShape(*heads)
    for default in tile_shapes.default_shapes(heads, dtype):
        assert tile_shapes.is_possible(default, heads)
        shapes = tuning.candidates(default, heads)
        assert 4 <= len(shapes) <= 10
        assert default not in shapes and len(set(shapes)) == len(shapes)
        assert all(tile_shapes.is_possible(shape, heads) for shape in shapes)


def small_coords():
    return random_coords([7, 3], 9).to(DEVICE)


@pytest.fixture
def kernels_run(monkeypatch):
    if not NATIVE:
        monkeypatch.setattr(api, "runs_kernels", lambda tensor: True)


SIZES = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32} | {
    "compression_block_size": 2,
    "selection_block_size": 4,
    "topk": 3,
    "window_size": 4,
}


def test_the_faster_shape_is_chosen(directory, kernels_run, monkeypatch):
    for module in (tile_shapes, tuning):
        monkeypatch.setattr(module, "default_shapes", lambda heads, dtype: SHAPES)
    candidate = {kernel: shape._replace(num_stages=5) for kernel, shape in SHAPES._asdict().items()}
    too_large = SHAPES.window_forward._replace(num_warps=8)

    def two_candidates(default, heads):
        return [default._replace(num_stages=5), *([too_large] if default == SHAPES.window_forward else [])]

    monkeypatch.setattr(tuning, "candidates", two_candidates)
    # Of the default, the candidate and the default again.
    figures = {kernel: [10.0, 5.0, 10.0] for kernel in TileShapes._fields}
    figures |= {"compressed_forward": [10.0, 9.8, 10.0], "window_key_gradient": [10.0, 9.0, 9.1]}
    pending = [milliseconds for row in figures.values() for milliseconds in row]

    def fake_milliseconds(function, device):
        function()
        return pending.pop(0)

    attend = segment_attention.attend

    def limited_attend(query, key, value, plan, scale):
        if plan.shapes.forward == too_large:
            raise OutOfResources(2, 1, "shared memory")
        return attend(query, key, value, plan, scale)

    monkeypatch.setattr(tuning, "_milliseconds", fake_milliseconds)
    monkeypatch.setattr(segment_attention, "attend", limited_attend)
    report = tune_spatial_sparse_attention(**SIZES, coords=small_coords(), budget=600)
    assert not pending
    assert report.default == SHAPES
    expected = SHAPES._replace(
        **{kernel: shape for kernel, shape in candidate.items() if figures[kernel] == [10.0, 5.0, 10.0]}
    )
    assert report.chosen == expected == shapes_for()
    assert report.milliseconds["window_forward"] == (10, 5)
    assert report.milliseconds["window_key_gradient"] == (9.1, 9.1)
    assert (report.num_timed, report.num_candidates) == (9, 10)
    assert str(candidate["window_forward"][:]) in str(report) and str(report.path) in str(report)


def test_within_the_budget(directory, kernels_run):
    report = tune_spatial_sparse_attention(**SIZES, coords=small_coords(), budget=1e-3)
    assert report.chosen == report.default == shapes_for()
    assert report.num_timed == 0 < report.num_candidates


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 5}, "multiple of `num_kv_heads` 2, got 5"),
        ({"head_dim": 256}, "at most 128"),
        ({"dtype": torch.float64}, "dtype"),
        ({"selection_block_size": 5}, "selection_block_size"),
        ({"topk": 257}, "`topk` must be at most 256"),
        ({"num_heads": 33, "num_kv_heads": 1}, "`num_heads` must be at most 32 times"),
        ({"budget": -1.0}, "budget"),
        ({"coords": torch.zeros(3, 3, dtype=torch.int32)}, "coords"),
        ({"coords": torch.zeros(0, 4, dtype=torch.int32)}, "coords"),
        ({"coords": torch.zeros(1, 4, dtype=torch.int32)}, "needs a GPU"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        tune_spatial_sparse_attention(**(SIZES | changes))
