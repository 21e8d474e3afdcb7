"""The counts of operations, bytes and exponentials, against counts of single pairs."""

import pytest
import torch
from torch import nn

from benchmarks.floors import (
    RATES,
    FloorCounter,
    Rates,
    StepWork,
    Work,
    _attention,
    _sparse_convolution,
    dit_work,
    vae_work,
)
from diffusers_sparse3d import SparseDiT, SparseVAE
from diffusers_sparse3d.models.attention import SparseAttention
from diffusers_sparse3d.models.attention_processors import SparseAttnProcessor, WindowAttnProcessor
from diffusers_sparse3d.models.sparse_layers import SparseConv3d
from diffusers_sparse3d.models.transformer_dense import DenseAttention
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.models.test_attention import sparse_coords


def test_the_slowest_of_three_counts():
    rates = Rates(operations=10, bytes=100, exponentials=1)
    assert Work(20, 100, 1).seconds(rates) == 2
    assert Work(1, 300, 1).seconds(rates) == 3
    assert Work(1, 1, 4).seconds(rates) == 4


@torch.no_grad()
def test_dense_layers():
    model, counter = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)), FloorCounter()
    with counter.counting(model):
        model(torch.ones(7, 3))
    model(torch.ones(7, 3))
    works = [Work(2 * 7 * 15, 4 * (21 + 35 + 15)), Work(2 * 7 * 10, 4 * (35 + 14 + 10))]
    taken = counter.take()
    for gpu, rates in RATES.items():
        assert taken[gpu] == pytest.approx(sum(work.seconds(rates) for work in works))
    assert set(counter.take().values()) == {0.0}
    conv = nn.Conv3d(2, 3, 3, padding=1)
    with counter.counting(conv):
        conv(torch.ones(1, 2, 4, 4, 4))
    work = Work(2 * 64 * 3 * 2 * 27, 4 * (128 + 192 + 162))
    assert counter.take()["A100 80GB"] == pytest.approx(work.seconds(RATES["A100 80GB"]))


@pytest.mark.parametrize("subdivide", [False, True])
@torch.no_grad()
def test_sparse_convolution(subdivide):
    cache, conv = CoordinateCache(sparse_coords(40, 30, resolution=5), 2), SparseConv3d(2, 3)
    feats = torch.ones(len(cache.coords), 2)
    output = conv(feats, cache, subdivide=subdivide)
    fine = cache.subdivide() if subdivide else cache
    coords = fine.coords
    near = (coords[:, None, 1:] - coords[None, :, 1:]).abs().amax(2) <= 1
    pairs = int((near & (coords[:, None, 0] == coords[None, :, 0])).sum())
    assert _sparse_convolution(conv, (feats, cache), {"subdivide": subdivide}, output).operations == 2 * pairs * 6


@pytest.mark.parametrize("kind", ["full", "window", "cross", "dense"])
@torch.no_grad()
def test_attention(kind):
    counter, cache = FloorCounter(), CoordinateCache(sparse_coords(9, 6, resolution=8), 2)
    coords, tokens = cache.coords, torch.ones(15, 8)
    same_sample = coords[:, None, 0] == coords[None, :, 0]
    windows = (coords[:, 1:] + 2) // 4
    in_window = same_sample & (windows[:, None] == windows[None]).all(2)
    if kind == "dense":
        attn, scores = DenseAttention(8, 2, 4), 2 * 5 * 5
        with counter.counting(attn):
            attn(torch.ones(2, 5, 8))
    elif kind == "cross":
        attn, scores = SparseAttention(8, 2, 4, cross_attention_dim=8), 15 * 3
        with counter.counting(attn):
            attn(tokens, encoder_hidden_states=torch.ones(2, 3, 8), cache=cache)
    else:
        processor = SparseAttnProcessor() if kind == "full" else WindowAttnProcessor()
        attn = SparseAttention(8, 2, 4, window_size=4, window_shift=2, processor=processor)
        scores = int((same_sample if kind == "full" else in_window).sum())
        with counter.counting(attn):
            attn(tokens, cache=cache)
    for gpu, seconds in counter.take().items():
        rates = RATES[gpu]
        projections = [part for name, part in attn.named_modules() if isinstance(part, nn.Linear)]
        assert len(projections) == 4
        linear = 0.0
        for projection in projections:
            rows = 6 if kind == "cross" and projection in (attn.to_k, attn.to_v) else 10 if kind == "dense" else 15
            linear += Work(2 * rows * projection.weight.numel(), 4 * (16 * rows + 64)).seconds(rates)
        assert seconds == pytest.approx(linear + _attention(scores, 2, 4).seconds(rates))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_steps_of_a_transformer_are_counted_as_they_run(version):
    cache, counter = CoordinateCache(sparse_coords(40, 30, resolution=12), 2), FloorCounter()
    model = SparseDiT(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_key_value_heads=1,
        cross_attention_dim=24,
        compression_version=version,
        norm_num_groups=4,
        sparse_conditioning=False,
    )
    context = torch.ones(2, 5, 24)
    # With gradients, as fused layers without them are not called.
    with counter.counting(model):
        model(torch.ones(len(cache.coords), 16), cache.coords, torch.ones(2), context, cache=cache)
    work = dit_work(model, cache, 5)
    assert work.forward == counter.operations > 0
    inner = FloorCounter()
    with inner.counting(*model.transformer_blocks):
        model(torch.ones(len(cache.coords), 16), cache.coords, torch.ones(2), context, cache=cache)
    assert work.blocks == inner.operations < work.forward


def test_steps_of_a_vae_are_counted_as_they_run():
    cells, counter = CoordinateCache(sparse_coords(9, 6, resolution=5), 2), FloorCounter()
    fine = cells.subdivide().subdivide().subdivide().coords
    # Of each cell some voxels, the first among them.
    voxels = CoordinateCache(fine[(torch.arange(len(fine)) % 512 == 0) | (torch.rand(len(fine)) < 0.3)], 2)
    settings = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("heads", 1))}
    model = SparseVAE(**settings, encoder_channels=32, decoder_channels=32, norm_num_groups=1)
    with counter.counting(model):
        posterior = model.encode(torch.ones(len(voxels.coords), 1), voxels.coords).latent_dist
        model.decode(posterior.mean, cells.coords)
    work = vae_work(model, cells, voxels)
    assert work.forward == counter.operations > work.blocks > 0.9 * work.forward


def test_a_step_is_three_passes_and_the_blocks_again():
    assert StepWork(10.0, 7.0).step(False) == 30.0
    assert StepWork(10.0, 7.0).step(True) == 37.0
