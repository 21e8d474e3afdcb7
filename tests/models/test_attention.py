"""The attention module and its processors: golden parity, and swapping them in a model of another package."""

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from diffusers_sparse3d import (
    DenseDiT,
    SparseAttnProcessor,
    SparseDiT,
    SparseTensor,
    SparseVAE,
    SSAAttnProcessor,
    WindowAttnProcessor,
    enable_spatial_sparse_attention,
)
from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models.attention import GateLinear, SparseAttention
from diffusers_sparse3d.models.attention_kwargs import expected_by, warn_of_unused
from diffusers_sparse3d.models.transformer_dense import DenseAttention, DenseAttnProcessor
from diffusers_sparse3d.ops.spatial_sparse_attention import select_blocks
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.golden import load_golden, relative_error


def sparse_coords(*voxels_per_sample, resolution=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for sample, count in enumerate(voxels_per_sample):
        cells = torch.randperm(resolution**3, generator=generator)[:count]
        columns = [torch.full((count,), sample), cells // resolution**2, cells // resolution % resolution]
        samples.append(torch.stack([*columns, cells % resolution], 1))
    return torch.cat(samples).int()


@pytest.mark.parametrize("case", ["ssa_v1", "ssa_v2"])
def test_golden_parity(case):
    config, state_dict, tensors = load_golden(case)
    attn = SparseAttention(
        config["hidden_size"],
        config["num_q_heads"],
        config["head_dim"],
        kv_heads=config["num_kv_heads"],
        bias=False,
        window_size=config["window_size"],
        window_shift=config["shift_window"],
        ssa={
            name: config[name]
            for name in ("compression_block_size", "selection_block_size", "topk", "compression_version")
        },
    )
    # The case is the self-attention module of a SparseDiT block.
    converted = convert_state_dict("SparseDiT", {f"blocks.0.self_attn.{name}": v for name, v in state_dict.items()})
    prefix = "transformer_blocks.0.attn1."
    attn.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in converted.items()})

    rows, cache = tensors["rows"].long(), CoordinateCache(tensors["coords"].int())
    hidden_states = tensors["input"].float().requires_grad_()
    output = attn(hidden_states, cache=cache)
    output.backward(tensors["grad_output"].float())

    with torch.no_grad():
        query = attn.to_q(hidden_states).unflatten(1, (config["num_q_heads"], -1))
        key = attn.to_k(hidden_states).unflatten(1, (config["num_kv_heads"], -1))
        compressed_key, _, _ = attn.ssa(hidden_states, key, key, cache)
        blocks = select_blocks(query, compressed_key, cache, attn.ssa.compression_block_size, 8, attn.ssa.topk)
        blocks = blocks - cache.partition(8).batch_cu_blocks[cache.coords[:, 0].long(), None, None]
    expected_blocks = tensors["block_topk"].transpose(0, 1).long()
    same = (blocks.sort(-1).values == expected_blocks.sort(-1).values).flatten(1).all(1)
    # The published numbers are half precision: near-ties make other choices in fewer than 1 % of the rows.
    assert same.float().mean() >= 0.99
    assert relative_error(output[rows][same[rows]].detach(), tensors["output"][same[rows]]) < 1e-3
    assert relative_error(output[rows].detach(), tensors["output"]) < 3e-2
    assert relative_error(hidden_states.grad[rows], tensors["grad_input"]) < 3e-2
    assert relative_error(attn.to_k.weight.grad, tensors["grad_proj_k"]) < 3e-2
    assert relative_error(attn.ssa.gate.weight.grad, tensors["grad_gate"]) < 3e-2


def dense_attention(attn, hidden_states, source, mask):
    """Masked softmax attention in float64, from the module's weights alone."""
    query = attn.to_q(hidden_states).unflatten(1, (attn.heads, -1))
    key = attn.to_k(source).unflatten(1, (attn.kv_heads, -1)).repeat_interleave(attn.heads // attn.kv_heads, 1)
    value = attn.to_v(source).unflatten(1, (attn.kv_heads, -1)).repeat_interleave(attn.heads // attn.kv_heads, 1)
    scores = torch.einsum("nhd,mhd->hnm", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return attn.to_out[0](torch.einsum("hnm,mhd->nhd", weights, value).flatten(1))


def test_full_and_window_self_attention():
    coords = sparse_coords(60, 0, 35)[torch.randperm(95, generator=torch.Generator().manual_seed(0))]
    attn = SparseAttention(24, 4, 6, kv_heads=2, window_size=5, window_shift=2).double()
    assert isinstance(attn.get_processor(), WindowAttnProcessor)
    hidden_states = torch.randn(95, 24, dtype=torch.float64)
    same_sample = coords[:, None, 0] == coords[None, :, 0]
    for shift, processor in [(2, WindowAttnProcessor()), (1, WindowAttnProcessor(shift=1))]:
        windows = (coords[:, 1:] + shift) // 5
        same_window = same_sample & (windows[:, None] == windows[None]).all(-1)
        attn.set_processor(processor)
        expected = dense_attention(attn, hidden_states, hidden_states, same_window)
        torch.testing.assert_close(attn(hidden_states, coords), expected)
    attn.set_processor(SparseAttnProcessor())
    expected = dense_attention(attn, hidden_states, hidden_states, same_sample)
    torch.testing.assert_close(attn(hidden_states, coords), expected)


@pytest.mark.parametrize("processor", [SSAAttnProcessor(), WindowAttnProcessor(), SparseAttnProcessor()])
def test_cross_attention(processor):
    coords = sparse_coords(20, 1, 30)
    attn = SparseAttention(24, 4, 6, cross_attention_dim=10, processor=processor).double()
    hidden_states = torch.randn(51, 24, dtype=torch.float64)

    padded = torch.randn(3, 7, 10, dtype=torch.float64)
    mask = coords[:, :1] == torch.arange(3).repeat_interleave(7)
    expected = dense_attention(attn, hidden_states, padded.flatten(0, 1), mask)
    torch.testing.assert_close(attn(hidden_states, coords, padded), expected)

    encoder_coords = torch.tensor([[2, 0, 0, 1], [0, 0, 0, 1], [2, 0, 0, 1], [1, 3, 4, 0], [0, 5, 5, 0]]).int()
    packed = torch.randn(5, 10, dtype=torch.float64)
    mask = coords[:, :1] == encoder_coords[:, 0]
    expected = dense_attention(attn, hidden_states, packed, mask)
    torch.testing.assert_close(attn(hidden_states, coords, packed, encoder_coords), expected)


def test_errors_name_the_argument():
    coords, hidden_states = sparse_coords(5, 4), torch.randn(9, 24)
    attn = SparseAttention(24, 4, 6, cross_attention_dim=10)
    with pytest.raises(ValueError, match="`coords`"):
        attn(hidden_states, encoder_hidden_states=torch.randn(2, 3, 10))
    with pytest.raises(ValueError, match="`encoder_coords`"):
        attn(hidden_states, coords, torch.randn(6, 10))
    with pytest.raises(ValueError, match="`encoder_hidden_states`"):
        attn(hidden_states, coords, torch.randn(1, 6, 10))
    attn = SparseAttention(24, 4, 6)
    attn.set_processor(SSAAttnProcessor())
    with pytest.raises(ValueError, match="enable_spatial_sparse_attention"):
        attn(hidden_states, coords)
    attn.set_processor(WindowAttnProcessor())
    with pytest.raises(ValueError, match="`window_size`"):
        attn(hidden_states, coords)
    with pytest.raises(ValueError, match="`kv_heads`"):
        SparseAttention(24, 4, 6, kv_heads=3)
    with pytest.raises(ValueError, match="`model`"):
        enable_spatial_sparse_attention(nn.Linear(3, 3))


def tiny_models():
    """A `SparseDiT` and a `SparseVAE`."""
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "norm_num_groups": 4}
    channels = {"encoder_channels": 32, "encoder_layers": 1, "encoder_heads": 2, "norm_num_groups": 2}
    return SparseDiT(**sizes), SparseVAE(**channels, decoder_channels=32, decoder_layers=1, decoder_heads=2)


@pytest.mark.parametrize("index", [0, 1])
def test_attention_backends_of_diffusers(index, monkeypatch):
    """ "native" is what runs; another one is refused before diffusers looks for it, and nothing is changed."""
    model = tiny_models()[index]
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: pytest.fail())
    active = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    attn = next(module for module in model.modules() if isinstance(module, SparseAttention))
    for backend in ("flash_hub", "_native_cudnn", "flex", "no_backend"):
        for owner in (model, attn):
            with pytest.raises(ValueError, match="`backend"):
                owner.set_attention_backend(backend)
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == active
    monkeypatch.undo()
    model.set_attention_backend("native")
    attn.set_attention_backend("native")
    model.reset_attention_backend()


def test_processors_by_name():
    dit, vae = tiny_models()
    classes = {"full": SparseAttnProcessor, "window": WindowAttnProcessor, "ssa": SSAAttnProcessor}
    for name, processor_class in classes.items():
        dit.set_attn_processor(name)
        assert {type(processor) for processor in dit.attn_processors.values()} == {processor_class}
    names = dict.fromkeys(vae.attn_processors, "full")
    vae.set_attn_processor(names)
    assert {type(processor) for processor in vae.attn_processors.values()} == {SparseAttnProcessor}
    dense = DenseDiT(sample_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=12)
    dense.set_attn_processor("full")
    assert {type(processor) for processor in dense.attn_processors.values()} == {DenseAttnProcessor}

    for model, processor, error, match in [
        (vae, "ssa", ValueError, "enable_spatial_sparse_attention"),
        (dit, "SSA", ValueError, "'full', 'ssa', 'window'.*got 'SSA'"),
        (dense, "ssa", ValueError, "'full'.*got 'ssa'"),
        (dit, SSAAttnProcessor, TypeError, "class SSAAttnProcessor: add parentheses"),
        (dense, DenseAttnProcessor, TypeError, "add parentheses"),
        (dit, None, TypeError, "got None"),
        (vae, SparseTensor(torch.zeros(1, 1), torch.zeros(1, 4).int()), TypeError, "or a processor"),
    ]:
        before = model.attn_processors
        with pytest.raises(error, match=match):
            model.set_attn_processor(processor)
        assert model.attn_processors == before


def test_arguments_that_nobody_takes_are_told_once(caplog):
    """A generation calls each processor some hundred times."""
    warn_of_unused.cache_clear()
    for _ in range(3):
        assert expected_by(SparseAttnProcessor(), {"strange": 1, "shard": None}) == {"shard": None}
    assert [record.message for record in caplog.records if "['strange']" in record.message] == [
        "attention_kwargs ['strange'] are not expected by SparseAttnProcessor and are ignored."
    ]


def test_processors_for_padded_tokens_warn(caplog):
    """They can be set, as any processor of diffusers can, and a word says that they are of no use."""

    class WithCache:
        def __call__(self, attn, hidden_states, cache=None, **kwargs):
            return hidden_states

    dit, _ = tiny_models()
    for processor, warned in ((WithCache(), False), (AttnProcessor(), True)):
        caplog.clear()
        dit.set_attn_processor(processor)
        assert set(dit.attn_processors.values()) == {processor}
        assert any("takes neither `coords` nor `cache`" in record.message for record in caplog.records) == warned


class ForeignAttention(nn.Module, AttentionModuleMixin):
    """Attention of a package that knows nothing of this one, but follows diffusers' conventions."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        self.heads = heads
        self.is_cross_attention = context_dim is not None
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim or dim, dim)
        self.to_v = nn.Linear(context_dim or dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.set_processor(SparseAttnProcessor())

    def forward(self, hidden_states, coords, context=None):
        return self.processor(self, hidden_states, coords=coords, encoder_hidden_states=context)


class ForeignTransformer(nn.Module, AttentionMixin):
    def __init__(self, dim=16, heads=2, context_dim=16, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"self": ForeignAttention(dim, heads), "cross": ForeignAttention(dim, heads, context_dim)})
            for _ in range(layers)
        )

    def forward(self, hidden_states, coords, context):
        for block in self.blocks:
            hidden_states = hidden_states + block["self"](hidden_states, coords)
            hidden_states = hidden_states + block["cross"](hidden_states, coords, context)
        return hidden_states


def test_foreign_model():
    torch.manual_seed(0)
    model = ForeignTransformer().double()
    coords = sparse_coords(80, 50)
    inputs = torch.randn(130, 16, dtype=torch.float64), coords, torch.randn(2, 5, 16, dtype=torch.float64)
    before = model(*inputs)
    original_names = set(model.state_dict())

    assert enable_spatial_sparse_attention(model, window_size=4, topk=2, norm_num_groups=4) is model
    names = set(model.state_dict())
    assert original_names < names
    assert all(".self.ssa." in name for name in names - original_names)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert [model.blocks[index]["self"].window_shift for index in (0, 1)] == [0, 2]

    outputs = {}
    for processor in (SSAAttnProcessor(), WindowAttnProcessor(), SparseAttnProcessor()):
        model.set_attn_processor(processor)
        assert set(model.state_dict()) == names
        outputs[type(processor)] = model(*inputs)
    torch.testing.assert_close(outputs[SparseAttnProcessor], before)
    assert not torch.allclose(outputs[SSAAttnProcessor], before)
    assert not torch.allclose(outputs[WindowAttnProcessor], before)
    assert not torch.allclose(outputs[WindowAttnProcessor], outputs[SSAAttnProcessor])

    model.set_attn_processor(SSAAttnProcessor())
    model(*inputs).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("attention_class", [SparseAttention, DenseAttention])
def test_query_and_key_are_normalised(attention_class):
    """Queries and keys of every head are divided by their L2 norm and multiplied by sqrt(dim_head) and gamma."""
    torch.manual_seed(0)
    attn = attention_class(12, 2, 6, qk_norm=True).double()
    for norm in (attn.norm_q, attn.norm_k):
        torch.nn.init.normal_(norm.gamma)
    hidden_states, coords = torch.randn(20, 12, dtype=torch.float64), sparse_coords(20)

    def normalise(projected, gamma):
        heads = projected.unflatten(-1, (2, 6))
        return heads / heads.norm(dim=-1, keepdim=True) * gamma * 6**0.5

    query = normalise(attn.to_q(hidden_states), attn.norm_q.gamma)
    key = normalise(attn.to_k(hidden_states), attn.norm_k.gamma)
    value = attn.to_v(hidden_states).unflatten(-1, (2, 6))
    weights = (torch.einsum("nhd,mhd->hnm", query, key) * 6**-0.5).softmax(-1)
    expected = attn.to_out[0](torch.einsum("hnm,mhd->nhd", weights, value).flatten(1))
    actual = attn(hidden_states, coords) if attention_class is SparseAttention else attn(hidden_states[None])[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_block_sizes_share_a_cache():
    """Modules with other compression blocks, one after the other on one cache, give what each gives alone."""
    torch.manual_seed(0)
    coords = sparse_coords(70, 40)
    hidden_states, shared = torch.randn(110, 16), CoordinateCache(coords)
    for size in (2, 4, 8):
        ssa = {"compression_block_size": size, "selection_block_size": 8, "topk": 2, "norm_num_groups": 4}
        attn = SparseAttention(16, 2, 8, window_size=8, ssa=ssa)
        torch.nn.init.normal_(attn.ssa.intra_block_pos_embed)
        assert torch.equal(attn(hidden_states, cache=shared), attn(hidden_states, cache=CoordinateCache(coords)))


@pytest.mark.parametrize("attention", [DenseAttention(12, 2, 6), SparseAttention(12, 2, 6)])
def test_projections_are_not_fused(attention):
    """The processors read `to_q`, `to_k` and `to_v`: fused projections would be parameters that nothing uses."""
    names = set(attention.state_dict())
    attention.fuse_projections()
    assert set(attention.state_dict()) == names and not attention.fused_projections


def test_gate_on_a_gpu_is_that_of_a_linear_layer():
    """There, columns are added for the matrix unit, and cut off: results and gradients are the same."""
    torch.manual_seed(0)
    gate, results = GateLinear(6, 3, bias=False), []
    hidden_states = torch.randn(5, 6)
    on_gpu = type("GPUTensor", (torch.Tensor,), {"is_cuda": True})
    for tensor in (hidden_states, hidden_states.as_subclass(on_gpu)):
        gate.zero_grad()
        output = gate(tensor)
        output.sin().sum().backward()
        results.append((output.as_subclass(torch.Tensor).detach(), gate.weight.grad.as_subclass(torch.Tensor)))
    for expected, found in zip(*results):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)
