"""`SparseConv3d` in code of other packages: their weights and sparse tensors, and the numbers that they give."""

import gc
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from diffusers_sparse3d import SparseConv3d, SparseTensor, sparse_tensor
from diffusers_sparse3d.models.kernel_layouts import convert_kernel
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.models.test_attention import sparse_coords


SPCONV = Path(__file__).parents[1] / "fixtures" / "spconv.safetensors"


def dense_convolution(feats, coords, weight, bias, resolution):
    """The output of a dense convolution `[out, in, K, K, K]` over the grid `[B, C, X, Y, Z]`, at the voxels."""
    batch, x, y, z = coords.long().T
    grid = feats.new_zeros(int(batch.max()) + 1, feats.shape[1], *(resolution,) * 3)
    grid[batch, :, x, y, z] = feats
    return F.conv3d(grid, weight, bias, padding=weight.shape[-1] // 2)[batch, :, x, y, z]


# How each library keeps the dense kernel [out, in, x, y, z]. torchsparse lists its offsets with x fastest.
FROM_DENSE = {
    "dense": lambda weight: weight,
    "spconv": lambda weight: weight.permute(0, 2, 3, 4, 1),
    "spconv1": lambda weight: weight.permute(2, 3, 4, 1, 0),
    "torchsparse": lambda weight: torch.stack(
        [weight[:, :, x, y, z].T for z in range(3) for y in range(3) for x in range(3)]
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", FROM_DENSE)
def test_weights_of_other_libraries(layout, bias):
    torch.manual_seed(0)
    dense = nn.Conv3d(4, 6, 3, bias=bias).double()
    coords = sparse_coords(90, 0, 70, resolution=6)[torch.randperm(160)]
    feats = torch.randn(160, 4, dtype=torch.float64)
    state_dict = {"kernel" if layout == "torchsparse" else "weight": FROM_DENSE[layout](dense.weight)}
    if bias:
        state_dict["bias"] = dense.bias
    conv = SparseConv3d(4, 6, bias=bias).double()
    conv.load_state_dict(state_dict)
    expected = dense_convolution(feats, coords, dense.weight, dense.bias, 6)
    torch.testing.assert_close(conv(feats, coords), expected)


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [3, 1])
def test_numbers_of_spconv(kernel_size):
    """What spconv itself gave for random weights; with kernel size 1 it reads its weight as [in, out]."""
    tensors = load_file(SPCONV)
    case = {name: tensors[f"{kernel_size}.{name}"] for name in ("weight", "bias", "coords", "feats", "output")}
    conv = SparseConv3d(4, 5, kernel_size)
    conv.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    torch.testing.assert_close(conv(case["feats"], case["coords"]), case["output"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kernel_size_1_of_torch():
    dense, feats = nn.Conv3d(4, 5, 1), torch.randn(30, 4)
    conv = SparseConv3d(4, 5, kernel_size=1)
    conv.load_state_dict(dense.state_dict())
    torch.testing.assert_close(conv(feats), F.linear(feats, dense.weight.flatten(1), dense.bias))


def test_whole_models_load():
    """By `load_state_dict` of a model, strictly; what is saved has the layout of this package."""
    model = nn.Sequential(SparseConv3d(4, 6), SparseConv3d(6, 4, bias=False))
    state_dict = {"0.weight": torch.randn(6, 3, 3, 3, 4), "0.bias": torch.randn(6), "1.kernel": torch.randn(27, 6, 4)}
    model.load_state_dict(state_dict)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "0.weight": (27, 4, 6),
        "0.bias": (6,),
        "1.weight": (27, 6, 4),
    }
    assert set(state_dict) == {"0.weight", "0.bias", "1.kernel"}  # not changed
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight: `weight` must have shape"):
        model.load_state_dict({**state_dict, "0.weight": torch.randn(6, 3, 3, 3, 5)})


def test_layouts_that_look_alike():
    weight = torch.randn(3, 3, 3, 3, 3)
    conv = SparseConv3d(3, 3, bias=False)
    with pytest.raises(RuntimeError, match="`layout` must be given"):
        conv.load_state_dict({"weight": weight})
    for layout in ("spconv", "dense"):
        conv = SparseConv3d(3, 3, bias=False, checkpoint_layout=layout)
        conv.load_state_dict({"weight": weight})
        assert torch.equal(conv.weight, convert_kernel(weight, 3, 3, 3, layout))
    for kwargs, name in [
        ({"checkpoint_layout": "minkowski"}, "checkpoint_layout"),
        ({"kernel_size": 5}, "kernel_size"),
    ]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            SparseConv3d(3, 3, **kwargs)
    with pytest.raises(ValueError, match="`layout`"):
        convert_kernel(weight, 3, 3, 3, "minkowski")


@dataclass
class ForeignSparseTensor:
    feats: torch.Tensor
    coords: torch.Tensor

    def replace(self, feats):
        return replace(self, feats=feats)


def test_sparse_tensors(monkeypatch):
    """Layers in a row on a foreign tensor find neighbours once, as on this package's; gradients reach all weights."""
    coords, feats = sparse_coords(40, 30, resolution=8), torch.randn(70, 4)
    model = nn.Sequential(SparseConv3d(4, 6), SparseConv3d(6, 4))
    calls = []
    find = sparse_tensor.neighbour_map
    monkeypatch.setattr(sparse_tensor, "neighbour_map", lambda coords: calls.append(1) or find(coords))
    outputs = [model(x) for x in (ForeignSparseTensor(feats, coords), SparseTensor(feats, coords.clone()))]
    assert len(calls) == 2
    assert isinstance(outputs[0], ForeignSparseTensor) and isinstance(outputs[1], SparseTensor)
    assert outputs[0].coords is coords and torch.equal(outputs[0].feats, outputs[1].feats)
    cache = CoordinateCache(coords)
    assert torch.equal(model[1](model[0](feats, cache), cache), outputs[0].feats)
    outputs[0].feats.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_bad_calls():
    conv, feats = SparseConv3d(4, 6), torch.randn(20, 4)
    for coords in (None, sparse_coords(19), sparse_coords(20).long(), sparse_coords(20)[[0] * 20]):
        with pytest.raises(ValueError, match=r"`(cache|coords)`"):
            conv(feats, coords)
    with pytest.raises(ValueError, match="`subdivide`"):
        conv(SparseTensor(feats, sparse_coords(20)), subdivide=True)


def test_kept_caches_do_not_outlive_their_coordinates():
    gc.disable()
    try:
        coords = sparse_coords(20)
        cache = weakref.ref(CoordinateCache.of(coords))
        assert CoordinateCache.of(coords) is cache()
        del coords
        assert cache() is None
    finally:
        gc.enable()
