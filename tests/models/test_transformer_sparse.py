"""SparseDiT: golden parity, and the behaviour of a diffusers model."""

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from torch._dynamo.backends.debugging import aot_eager

from diffusers_sparse3d import SparseAttnProcessor, SSAAttnProcessor, WindowAttnProcessor, sparse_tensor
from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models import checkpointing
from diffusers_sparse3d.models.cuda_graphs import replaying_cuda_graphs
from diffusers_sparse3d.models.transformer_sparse import SparseDiT
from diffusers_sparse3d.ops.runtime.kept_results import KeptResults
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.golden import load_golden, relative_error
from tests.models.test_attention import sparse_coords
from tests.models.test_cuda_graphs import fake_captures


def tiny_model(seed=0, **config):
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_key_value_heads": 2,
        "cross_attention_dim": 12,
        "topk": 2,
        "norm_num_groups": 4,
    } | config
    model = SparseDiT(**config)
    # The freshly initialised model predicts zero whatever its input.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_inputs(voxels=(50, 30), tokens=(6, 4)):
    generator = torch.Generator().manual_seed(0)
    encoder_coords = sparse_coords(*tokens, resolution=8, seed=1)
    encoder_coords[:, 3] = 0
    for sample in range(len(tokens)):  # class and register tokens have no place of their own
        rows = (encoder_coords[:, 0] == sample).nonzero()[:2, 0]
        encoder_coords[rows, 1:] = torch.tensor([0, 0, 1], dtype=torch.int32)
    return {
        "hidden_states": torch.randn(sum(voxels), 4, generator=generator),
        "coords": sparse_coords(*voxels),
        "timestep": torch.rand(len(voxels), generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(sum(tokens), 12, generator=generator),
        "encoder_coords": encoder_coords,
    }


@torch.no_grad()
def test_golden_parity():
    config, state_dict, tensors = load_golden("sparse_dit")
    model = SparseDiT(
        sample_size=config["resolution"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_layers=config["num_blocks"],
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["model_channels"] // config["num_heads"],
        num_key_value_heads=config["num_kv_heads"],
        cross_attention_dim=config["cond_channels"],
        mlp_ratio=config["mlp_ratio"],
        compression_block_size=config["compression_block_size"],
        selection_block_size=config["selection_block_size"],
        topk=config["topk"],
        compression_version=config["compression_version"],
        window_size=config["window_size"],
        use_window_shift=config["use_shift"],
        qk_norm_cross=config["qk_rms_norm_cross"],
        sparse_conditioning=config["sparse_conditions"],
    )
    # The published model runs in half precision: its weights are rounded, our arithmetic is float32.
    state_dict = {name: tensor.half().float() for name, tensor in state_dict.items()}
    model.load_state_dict(convert_state_dict("SparseDiT", state_dict))
    output = model(
        tensors["input"].float(),
        tensors["coords"],
        tensors["timestep"].float(),
        tensors["cond"].float(),
        tensors["cond_coords"],
    ).sample
    assert relative_error(output, tensors["output"]) < 1e-3


@pytest.mark.parametrize("attention_type", ["ssa", "window", "full"])
@pytest.mark.parametrize("share_mod", [False, True])
@torch.no_grad()
def test_batch_equals_single_runs_in_any_row_order(attention_type, share_mod):
    model = tiny_model(attention_type=attention_type, share_mod=share_mod, qk_norm=True, qk_norm_cross=True).double()
    inputs = tiny_inputs()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    output = model(**inputs).sample
    assert output.abs().mean() > 0.1

    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    encoder_order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    shuffled = model(
        inputs["hidden_states"][order],
        inputs["coords"][order],
        inputs["timestep"],
        inputs["encoder_hidden_states"][encoder_order],
        inputs["encoder_coords"][encoder_order],
    ).sample
    torch.testing.assert_close(shuffled, output[order])

    for sample in range(2):
        rows, encoder_rows = inputs["coords"][:, 0] == sample, inputs["encoder_coords"][:, 0] == sample
        first = torch.tensor([sample, 0, 0, 0], dtype=torch.int32)
        single = model(
            inputs["hidden_states"][rows],
            inputs["coords"][rows] - first,
            inputs["timestep"][sample : sample + 1],
            inputs["encoder_hidden_states"][encoder_rows],
            inputs["encoder_coords"][encoder_rows] - first,
        ).sample
        torch.testing.assert_close(single, output[rows])


@torch.no_grad()
def test_dense_conditioning_and_empty_samples():
    model = tiny_model(sparse_conditioning=False)
    inputs = tiny_inputs(voxels=(50, 30)) | {"encoder_hidden_states": torch.randn(2, 5, 12), "encoder_coords": None}
    output = model(**inputs).sample
    batch_index = torch.tensor([1, 3], dtype=torch.int32)[inputs["coords"][:, 0].long()]
    spread = dict(inputs)
    spread["coords"] = torch.cat([batch_index[:, None], inputs["coords"][:, 1:]], 1)
    spread["timestep"] = torch.zeros(5).index_copy(0, torch.tensor([1, 3]), inputs["timestep"])
    spread["encoder_hidden_states"] = torch.randn(5, 5, 12)
    spread["encoder_hidden_states"][[1, 3]] = inputs["encoder_hidden_states"]
    torch.testing.assert_close(model(**spread).sample, output)


@torch.no_grad()
def test_saved_folder_does_not_depend_on_the_processor(tmp_path):
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    for index, processor in enumerate([SSAAttnProcessor(), WindowAttnProcessor(), SparseAttnProcessor()]):
        model.set_attn_processor(processor)
        assert set(model.attn_processors.values()) == {processor}
        model.save_pretrained(tmp_path / str(index))
        loaded = SparseDiT.from_pretrained(tmp_path / str(index))
        assert loaded.config.topk == 2
        torch.testing.assert_close(loaded(**inputs, return_dict=False)[0], expected)
    assert not torch.allclose(model(**inputs).sample, expected)


def test_gradient_checkpointing(monkeypatch):
    made = []
    monkeypatch.setattr(checkpointing, "KeptResults", lambda: made.append(KeptResults()) or made[-1])
    model, inputs = tiny_model().train(), tiny_inputs()
    gradients = []
    for functions in (None, (), (checkpointing.checkpoint_keeping_attention,)):
        model.zero_grad()
        if functions is not None:
            model.enable_gradient_checkpointing(*functions)
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        for found in gradients[1:]:
            torch.testing.assert_close(found[name], gradient, msg=name)
    # Selected, compressed and window attention without a GPU, and cross-attention.
    assert [len(results) for results in made] == [4] * len(model.transformer_blocks)


# Sizes that are equal by chance in the first inputs differ in the next ones.
@torch.fx.experimental._config.patch(use_duck_shape=False)
def check_compiled_blocks(voxels_of_cases, compression_version, device="cpu"):
    """`fullgraph=True` fails if something cannot be traced; other coordinates need no other graph."""
    config = {"num_layers": 1, "compression_version": compression_version}
    models, num_graphs = [tiny_model(**config).train().to(device) for _ in range(2)], []

    def backend(graph, inputs):
        num_graphs[-1] += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    models[1].compile_repeated_blocks(fullgraph=True, dynamic=True, backend=backend)
    for voxels in voxels_of_cases:
        inputs, results = {name: tensor.to(device) for name, tensor in tiny_inputs(voxels).items()}, []
        num_graphs.append(0)
        for model in models:
            model.zero_grad()
            output = model(**inputs).sample
            output.square().mean().backward()
            results.append((output, *(parameter.grad for parameter in model.parameters())))
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected)
    assert num_graphs[0] and not num_graphs[1]

    models[1].enable_gradient_checkpointing()
    models[1].zero_grad()
    models[1](**inputs).sample.square().mean().backward()
    for expected, parameter in zip(results[0][1:], models[1].parameters()):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("compression_version", ["v1", "v2"])
def test_compiled_blocks(compression_version):
    check_compiled_blocks([(50, 30), (31, 70)], compression_version)


BAD_INPUTS = {
    "hidden_states": [lambda x: x[:, :3], lambda x: x[None], lambda x: x.clone().fill_(float("nan"))],
    "coords": [
        lambda x: x.long(),
        lambda x: x[:-1],
        lambda x: x + 14,
        lambda x: torch.cat([x[:1], x[:-1]]),
        lambda x: x + torch.tensor([1, 0, 0, 0], dtype=torch.int32),
    ],
    "timestep": [lambda x: x[0], lambda x: x[:, None]],
    "encoder_hidden_states": [lambda x: x[:, :5], lambda x: x[None], lambda x: x / 0],
    "encoder_coords": [
        lambda x: None,
        lambda x: x.long(),
        lambda x: x[1:],
        lambda x: x + torch.tensor([1, 0, 0, 0], dtype=torch.int32),
    ],
    "cache": [
        lambda _: CoordinateCache(tiny_inputs()["coords"][1:], 2),
        lambda _: CoordinateCache(tiny_inputs()["coords"], 3),
    ],
    "encoder_cache": [lambda _: CoordinateCache(tiny_inputs()["coords"], 2)],
}


@pytest.mark.parametrize(
    "name, index", [(name, index) for name, bad in BAD_INPUTS.items() for index in range(len(bad))]
)
def test_bad_input_names_the_argument(name, index):
    inputs = tiny_inputs()
    inputs[name] = BAD_INPUTS[name][index](inputs.get(name))
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny_model()(**inputs)


@torch.no_grad()
def test_given_caches_are_planned_once(monkeypatch):
    """The first call with given caches derives all from the coordinates, later ones nothing, as with other caches."""
    derivations = []

    def count(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: (derivations.append(name), function(*args, **kw))[1])

    for name in ("partition_coords", "downsample_coords", "neighbour_map", "cumulative", "invert_permutation"):
        count(sparse_tensor, name)
    model, inputs = tiny_model(compression_version="v2"), tiny_inputs()
    expected = model(**inputs).sample
    of_a_call = sorted(derivations)
    assert set(of_a_call) >= {"partition_coords", "downsample_coords", "neighbour_map"}
    for _ in range(2):
        derivations.clear()
        inputs["cache"] = CoordinateCache(inputs["coords"], 2)
        inputs["encoder_cache"] = CoordinateCache(inputs["encoder_coords"], 2)
        assert torch.equal(model(**inputs).sample, expected)
        assert sorted(derivations) == of_a_call
        derivations.clear()
        assert torch.equal(model(**inputs, check_inputs=False).sample, expected)
        assert derivations == []


@torch.no_grad()
def test_graphs_are_for_calls_without_attention_kwargs(monkeypatch):
    """A graph would leave arguments of the processors out that were not there when it was captured."""
    captured = fake_captures(monkeypatch)
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    caches = {
        "cache": CoordinateCache(inputs["coords"], 2),
        "encoder_cache": CoordinateCache(inputs["encoder_coords"], 2),
    }
    model(**inputs, **caches)
    assert len(captured) == 0  # not enabled
    model.enable_cuda_graphs()
    model(**inputs)
    model(**inputs, cache=caches["cache"])
    model(**inputs, **caches, attention_kwargs={"unknown": 1})
    assert len(captured) == 0
    for _ in range(3):
        assert torch.equal(model(**inputs, **caches).sample, expected)
    assert len(captured) == 1
    model.disable_cuda_graphs()
    other_cache = CoordinateCache(inputs["coords"], 2)
    for _ in range(2):
        model(**inputs, **{**caches, "cache": other_cache})
    assert len(captured) == 1
    with replaying_cuda_graphs(max_tokens=len(inputs["coords"])):
        for _ in range(3):
            assert torch.equal(model(**inputs, **caches).sample, expected)
            model(**inputs)
            model(**inputs, **caches, attention_kwargs={"unknown": 1})
    assert len(captured) == 2
    with replaying_cuda_graphs(max_tokens=len(inputs["coords"]) - 1):
        for _ in range(2):
            model(**inputs, **caches)
    assert len(captured) == 2


@torch.no_grad()
def test_coord_scale_multiplies_the_coordinates():
    """With full attention coordinates matter in the position embedding alone."""
    inputs = tiny_inputs()
    inputs["coords"] = inputs["coords"] // torch.tensor([1, 2, 2, 2], dtype=torch.int32)
    inputs["coords"] = inputs["coords"].unique(dim=0)
    inputs["hidden_states"] = inputs["hidden_states"][: len(inputs["coords"])]
    doubled = {**inputs, "coords": inputs["coords"] * torch.tensor([1, 2, 2, 2], dtype=torch.int32)}
    plain, scaled = (tiny_model(attention_type="full", coord_scale=scale) for scale in (1.0, 2.0))
    torch.testing.assert_close(scaled(**inputs).sample, plain(**doubled).sample)
    assert not torch.allclose(scaled(**inputs).sample, plain(**inputs).sample, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("share_mod", [False, True])
def test_initialisation(share_mod):
    """All gates are closed and the output is zero, so that training starts from the zero velocity; the rest is not."""
    model, inputs = SparseDiT(**{**tiny_model().config, "share_mod": share_mod}), tiny_inputs()
    assert (model(**inputs).sample == 0).all()
    temb = torch.randn(2, 32)
    modulations = [model.modulation] if share_mod else [block.modulation for block in model.transformer_blocks]
    assert all((modulation(temb) == 0).all() for modulation in modulations)
    model.proj_out.weight.fill_(1)
    assert (model(**inputs).sample != 0).any()
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 2}
    zero = {name for name, p in weights.items() if (p == 0).all()}
    assert zero == {name for name in weights if "modulation" in name} and len(weights) > len(zero) > 0
    assert 0.015 < model.time_embedding.linear_1.weight.std() < 0.025


def test_bad_configuration():
    for name, value in {"attention_type": "linear", "compression_version": "v3", "selection_block_size": 6}.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            tiny_model(**{name: value})


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model(), tiny_inputs()
    assert isinstance(model, PeftAdapterMixin)
    before = model(**inputs).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.testing.assert_close(model(**inputs).sample, before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted = model(**inputs).sample
    assert not torch.allclose(adapted, before)
    torch.testing.assert_close(model(**inputs, attention_kwargs={"scale": 0.0}).sample, before)
    adapted.sum().backward()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


@torch.no_grad()
def test_layerwise_casting():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.transformer_blocks[0].norm2.weight.dtype == torch.float32
    assert relative_error(model(**inputs).sample, expected) < 2e-2


def test_autocast_training_step():
    model, inputs = tiny_model().train(), tiny_inputs()
    expected = model(**inputs).sample.detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs).sample
    output.float().square().mean().backward()
    assert relative_error(output.detach(), expected) < 5e-2
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@torch.no_grad()
def test_caches_of_other_rows_are_refused():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    own = {
        "cache": CoordinateCache(inputs["coords"].clone(), 2),
        "encoder_cache": CoordinateCache(inputs["encoder_coords"].clone(), 2),
    }
    assert torch.equal(model(**inputs, **own).sample, expected)
    for name, cache in own.items():
        other = CoordinateCache(cache.coords.flip(0), 2)
        with pytest.raises(ValueError, match=f"`{name}` must be that of"):
            model(**inputs, **{**own, name: other})
