"""Caches of other rows are recognised without `check_inputs`, and without waiting for a GPU."""

import pytest
import torch

from diffusers_sparse3d import SparseDiT, SparseVAE
from diffusers_sparse3d.models.cache_rows import RowComparison
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.models.test_input_checks import COORDS, SMALL, arguments_of


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return SparseDiT(**SMALL[SparseDiT]).eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return SparseVAE(**SMALL[SparseVAE]).eval()


@pytest.fixture
def slow_gpu(monkeypatch):
    """A GPU whose comparisons are done when the list is emptied; the number of comparisons that were begun."""
    busy, begun = [True], []
    start, result = RowComparison.__init__, RowComparison.result
    monkeypatch.setattr(RowComparison, "__init__", lambda self, *rows: begun.append(1) or start(self, *rows))
    monkeypatch.setattr(RowComparison, "result", lambda self: None if busy else result(self))
    return busy, begun


def caches(arguments, **others):
    rows = {"cache": arguments["coords"].clone(), "encoder_cache": arguments["encoder_coords"].clone(), **others}
    return {name: CoordinateCache(coords, 1) for name, coords in rows.items()}


@pytest.mark.parametrize("name", ["cache", "encoder_cache"])
def test_other_rows_are_refused_at_once_on_a_cpu(transformer, name):
    arguments = arguments_of(SparseDiT)
    transformer(**arguments, **caches(arguments), check_inputs=False)
    coords = arguments[name.replace("cache", "coords")]
    with pytest.raises(ValueError, match=f"`{name}` .* other rows"):
        transformer(**arguments, **caches(arguments, **{name: coords.flip(0)}), check_inputs=False)


@pytest.mark.parametrize("name", ["cache", "encoder_cache"])
def test_a_gpu_gives_nan_until_it_knows(transformer, slow_gpu, name):
    busy, _ = slow_gpu
    arguments = arguments_of(SparseDiT)
    expected = transformer(**arguments).sample
    right = caches(arguments)
    wrong = caches(arguments, **{name: arguments[name.replace("cache", "coords")].flip(0)})
    assert torch.equal(transformer(**arguments, **right, check_inputs=False).sample, expected)
    assert transformer(**arguments, **wrong, check_inputs=False).sample.isnan().all()
    busy.clear()
    assert torch.equal(transformer(**arguments, **right, check_inputs=False).sample, expected)
    with pytest.raises(ValueError, match=f"`{name}` .* other rows"):
        transformer(**arguments, **wrong, check_inputs=False)


def test_rows_are_compared_once(transformer, slow_gpu):
    busy, begun = slow_gpu
    busy.clear()
    arguments = arguments_of(SparseDiT)
    given = caches(arguments, encoder_cache=arguments["encoder_coords"])
    given["encoder_cache"] = CoordinateCache(arguments["encoder_coords"], 1)  # the tensor itself: no comparison
    for _ in range(3):
        transformer(**arguments, **given, check_inputs=False)
    assert len(begun) == 1
    # Other rows in the same tensor, and the same rows in another one, are looked at again.
    arguments["coords"] = arguments["coords"].clone()
    transformer(**arguments, **given, check_inputs=False)
    assert len(begun) == 2
    arguments["coords"][[0, 1]] = arguments["coords"][[1, 0]]
    with pytest.raises(ValueError, match="`cache`"):
        transformer(**arguments, **given, check_inputs=False)


@pytest.mark.parametrize("check_inputs", [True, False])
def test_coordinates_that_were_changed_in_place(transformer, check_inputs):
    arguments = arguments_of(SparseDiT)
    coords = arguments["coords"] = arguments["coords"].clone()
    cache = CoordinateCache(coords, 1)
    transformer(**arguments, cache=cache, check_inputs=check_inputs)
    coords[:, 1:] += 1
    with pytest.raises(ValueError, match="`cache` must be made anew"):
        transformer(**arguments, cache=cache, check_inputs=check_inputs)


def test_coordinates_of_inference_mode_have_no_versions(transformer):
    with torch.inference_mode():
        arguments = arguments_of(SparseDiT)
        arguments["coords"] = arguments["coords"].clone()
        cache = CoordinateCache(arguments["coords"], 1)
        expected = transformer(**arguments).sample
        assert torch.equal(transformer(**arguments, cache=cache, check_inputs=False).sample, expected)
        # What was compared before says nothing.
        arguments["coords"][:, 1:] += 1
        with pytest.raises(ValueError, match="`cache`"):
            transformer(**arguments, cache=cache, check_inputs=False)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_vae(vae, slow_gpu, method):
    busy, _ = slow_gpu
    width = 1 if method == "encode" else 4
    feats = torch.linspace(-0.9, 0.9, len(COORDS) * width).reshape(-1, width)

    def run(coords):
        cache = CoordinateCache(coords, 1)
        output = getattr(vae, method)(feats, COORDS, return_dict=False, check_inputs=False, cache=cache)[0]
        return (output.mode() if method == "encode" else output), cache

    assert run(COORDS.clone())[0].isfinite().all()
    output, cache = run(COORDS.flip(0))
    assert output.isnan().all()
    busy.clear()
    with pytest.raises(ValueError, match=r"`cache` .* other rows"):
        getattr(vae, method)(feats, COORDS, check_inputs=False, cache=cache)
