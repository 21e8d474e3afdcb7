"""Models whose coordinates are planned beforehand are traced as a whole, by `torch.compile` and `torch.export`."""

import gc
import weakref

import pytest
import torch

from diffusers_sparse3d import DenseDiT, SparseDiT, SparseVAE, sparse_tensor
from diffusers_sparse3d.models.attention import SparseAttention
from diffusers_sparse3d.models.attention_processors import SparseAttnProcessor, WindowAttnProcessor
from diffusers_sparse3d.models.checkpointing import checkpoint_keeping_attention
from diffusers_sparse3d.ops import coordinates
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.golden import relative_error
from tests.models.test_attention import sparse_coords
from tests.models.test_transformer_sparse import tiny_inputs, tiny_model


# Sizes that are equal by chance in the first inputs differ in the next ones.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


class CountingBackend:
    """Runs traced graphs as they are, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled(function, **kwargs):
    """The function, which fails unless it is one graph, and the backend."""
    torch._dynamo.reset()
    backend = CountingBackend()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend, **kwargs), backend


def planned(model, inputs):
    caches = model.plan(inputs["coords"], 2, inputs["encoder_coords"])
    return {**inputs, "cache": caches[0], "encoder_cache": caches[1]}


def tiny_vae(layers=1):
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "norm_num_groups": 2, "window_size": 2}
    channels = {"encoder_channels": 32, "encoder_heads": 2, "decoder_channels": 32, "decoder_heads": 2}
    vae = SparseVAE(**sizes, **channels, encoder_layers=layers, decoder_layers=layers)
    for parameter in vae.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize(
    ("functions", "cases"),
    [((), [(50, 30), (31, 70)]), ((checkpoint_keeping_attention,), [(50, 30)])],
    ids=["all again", "attention kept"],
)
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_whole_transformer_with_gradient_checkpointing(functions, cases):
    """One graph, whatever the coordinates, with the output and the gradients of the model as it is."""
    model = tiny_model(num_layers=1).train()
    model.enable_gradient_checkpointing(*functions)
    compiled_model, backend = compiled(model)
    for voxels in cases:
        inputs, results = tiny_inputs(voxels), []
        for call in (model, compiled_model):
            model.zero_grad()
            output = call(**(inputs if call is model else planned(model, inputs))).sample
            output.square().mean().backward()
            results.append((output, *(parameter.grad for parameter in model.parameters())))
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected)
        assert backend.count == 1


@torch.no_grad()
def test_whole_autoencoder():
    vae = tiny_vae()
    compiled_vae, backend = compiled(vae)
    for counts in [(60, 40), (25, 90)]:
        coords = sparse_coords(*counts, resolution=32)
        feats = torch.rand(len(coords), 1) - 0.5
        found, expected = compiled_vae(feats, coords, cache=vae.plan(coords)), vae(feats, coords)
        assert torch.equal(found.coords, expected.coords)
        torch.testing.assert_close(found.sample, expected.sample)
        assert expected.sample.std() > 0.01 and backend.count == 1


@torch.no_grad()
def test_planned_calls_derive_nothing(monkeypatch):
    vae, dit, inputs = tiny_vae(), tiny_model(), tiny_inputs()
    coords, latent_coords = sparse_coords(60, 40, resolution=32), sparse_coords(20, 10, resolution=8)
    calls = [
        (vae.encode, (torch.rand(100, 1), coords), {"cache": vae.plan_encode(coords)}),
        (vae.decode, (torch.rand(30, 4), latent_coords), {"cache": vae.plan_decode(latent_coords)}),
        (vae, (torch.rand(100, 1), coords), {"cache": vae.plan(coords)}),
        (dit, (), planned(dit, inputs)),
    ]
    for name in ("partition_coords", "downsample_coords", "neighbour_map", "subdivide_neighbour_map", "cumulative"):
        monkeypatch.setattr(sparse_tensor, name, lambda *args, name=name: pytest.fail(name))
    for function, args, kwargs in calls:
        function(*args, **kwargs)


def test_planned_caches_have_no_cycles():
    """Memory of a plan is free as soon as its cache is gone."""
    vae = tiny_vae()
    gc.collect()
    gc.disable()
    try:
        cache = vae.plan_decode(sparse_coords(9, resolution=8))
        child = weakref.ref(cache.subdivide())
        assert child() is cache.subdivide()
        del cache
        assert child() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("model_class", [SparseDiT, SparseVAE])
def test_repeated_blocks_are_not_recompiled(model_class):
    """Blocks with and without shifted windows make one graph each; this limit is what diffusers tests models with."""
    torch._dynamo.reset()
    if model_class is SparseDiT:
        model, inputs = tiny_model(num_layers=4, attention_type="window"), tiny_inputs()
    else:
        model = tiny_vae(layers=2)
        inputs = {"feats": torch.rand(100, 1), "coords": sparse_coords(60, 40, resolution=32)}
    backend = CountingBackend()
    expected = model(**inputs).sample
    with torch._dynamo.config.patch(recompile_limit=1):
        model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=backend)
        # Compiled layers round otherwise than those of oneDNN.
        assert relative_error(model(**inputs).sample, expected) < 5e-6
    assert backend.count == 2


class FixedCoordinates(torch.nn.Module):
    """A transformer at given coordinates: a function of three tensors, as the documents show it."""

    def __init__(self, model, coords, batch_size, encoder_coords):
        super().__init__()
        self.model = model
        self.cache, self.encoder_cache = model.plan(coords, batch_size, encoder_coords)

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        caches = {"cache": self.cache, "encoder_cache": self.encoder_cache}
        rows = (self.cache.coords, timestep, encoder_hidden_states, self.encoder_cache.coords)
        return self.model(hidden_states, *rows, return_dict=False, **caches)[0]


@torch.no_grad()
def test_export(tmp_path):
    model, inputs = tiny_model(num_layers=1).eval(), tiny_inputs()
    fixed = FixedCoordinates(model, inputs["coords"], 2, inputs["encoder_coords"])
    arguments = tuple(inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
    torch.export.save(torch.export.export(fixed, arguments), tmp_path / "transformer.pt2")
    program = torch.export.load(tmp_path / "transformer.pt2").module()
    others = (torch.randn(80, 4), torch.tensor([30.0, 800.0]), torch.randn(10, 12))
    for tensors in (arguments, others):
        torch.testing.assert_close(program(*tensors), fixed(*tensors))

    sizes = {"sample_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    dense = DenseDiT(**sizes, cross_attention_dim=8, pixel_aligned=True)
    for layer in (dense.proj_out, dense.pixel_alignment.proj_out):
        torch.nn.init.normal_(layer.weight)
    arguments = torch.randn(1, 8, 2, 2, 2), torch.tensor([5.0]), torch.randn(1, 3, 8)
    program = torch.export.export(dense, arguments, {"return_dict": False}).module()
    torch.testing.assert_close(program(*arguments, return_dict=False)[0], dense(*arguments).sample)


def test_kept_children_have_the_map_of_their_coordinates():
    cache = CoordinateCache(sparse_coords(30, 12, resolution=8))
    child = cache.subdivide(keep=True)
    assert cache.subdivide() is child
    assert torch.equal(child.neighbour_map(), coordinates.neighbour_map(child.coords))


class WindowsAndSamples(WindowAttnProcessor):
    """The mean of attention in windows and among all tokens of a sample."""

    def self_attention(self, *args):
        return (super().self_attention(*args) + SparseAttnProcessor.self_attention(self, *args)) / 2


@pytest.mark.parametrize("processor", [WindowAttnProcessor(), WindowsAndSamples()])
def test_processors_of_windows_plan_what_they_use(processor):
    attn = SparseAttention(32, 2, 16, window_size=4, processor=processor)
    cache, tokens = CoordinateCache(sparse_coords(2, 20)), torch.randn(22, 32)
    attn.plan(tokens, cache)
    attend, _ = compiled(lambda tokens: attn(tokens, cache=cache))
    torch.testing.assert_close(attend(tokens), attn(tokens, cache=cache))
