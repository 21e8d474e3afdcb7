"""Sparse attention in transformers of other packages: diffusers' own modules, and two layouts met elsewhere."""

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, BasicTransformerBlock
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import nn

from diffusers_sparse3d import (
    SparseAttnProcessor,
    SparseDiT,
    SSAAttnProcessor,
    WindowAttnProcessor,
    enable_spatial_sparse_attention,
    enable_window_attention,
    load_spatial_sparse_attention,
    sparse_tensor,
)
from tests.models.test_attention import sparse_coords


SSA = {"window_size": 4, "topk": 2, "norm_num_groups": 4}


class DiffusersTransformer(ModelMixin, ConfigMixin, AttentionMixin):
    """Blocks of diffusers, as they are, over packed rows with a leading axis of length 1."""

    @register_to_config
    def __init__(self, dim: int = 16, layers: int = 2, qk_norm: str | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(BasicTransformerBlock(dim, 2, dim // 2) for _ in range(layers))
        if qk_norm is not None:
            for block in self.blocks:
                block.attn1 = Attention(dim, heads=2, dim_head=dim // 2, qk_norm=qk_norm)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask, cross_attention_kwargs=kwargs)
        return hidden_states


def one_sample(count=60, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, count, 16, generator=generator, dtype=dtype), sparse_coords(count)


def randomize(model):
    """Values for parameters that start as zeros or ones."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@torch.no_grad()
def test_blocks_of_diffusers():
    model, (hidden_states, coords) = randomize(DiffusersTransformer().double()), one_sample(dtype=torch.float64)
    before = model(hidden_states)
    enable_spatial_sparse_attention(model, **SSA)
    assert not torch.allclose(model(hidden_states, coords=coords), before)
    # All tokens of the only sample, by diffusers and by this package.
    for block in model.blocks:
        block.attn1.set_processor(SparseAttnProcessor())
    torch.testing.assert_close(model(hidden_states, coords=coords), before)

    # Two samples in one row axis do not see each other.
    second = sparse_coords(40, seed=3) + torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    both = torch.cat([hidden_states, torch.randn(1, 40, 16, dtype=torch.float64)], dim=1)
    model.set_attn_processor(SSAAttnProcessor())
    together = model(both, coords=torch.cat([coords, second]))
    torch.testing.assert_close(together[:, :60], model(hidden_states, coords=coords))
    # As many rows in every sample, with a batch axis.
    pair = torch.cat([hidden_states, hidden_states.flip(1)])
    coords_of_pair = torch.cat([coords, coords.flip(0) + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    first, flipped = model(pair, coords=coords_of_pair)
    torch.testing.assert_close(first, flipped.flip(0))
    torch.testing.assert_close(first[None], model(hidden_states, coords=coords))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", ["rms_norm", "layer_norm", "rms_norm_across_heads"])
def test_norms_of_diffusers(qk_norm):
    attn = randomize(Attention(16, heads=2, kv_heads=2, dim_head=8, qk_norm=qk_norm).double())
    hidden_states, coords = one_sample(dtype=torch.float64)
    if qk_norm == "rms_norm_across_heads":  # diffusers' plain processor normalises after the split into heads
        projected = [layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = (
            (norm(x) if norm else x).unflatten(-1, (2, 8)).transpose(1, 2)
            for norm, x in zip((attn.norm_q, attn.norm_k, None), projected)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        expected = attn.to_out[0](attended.transpose(1, 2).flatten(2))
    else:
        expected = attn(hidden_states)
    attn.set_processor(SparseAttnProcessor())
    torch.testing.assert_close(attn(hidden_states, coords=coords), expected)


@torch.no_grad()
def test_fused_projections_of_diffusers():
    hidden_states, coords = one_sample(dtype=torch.float64)
    outputs = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = randomize(DiffusersTransformer().double())
        for block in model.blocks if fuse else []:
            block.attn1.fuse_projections()
            block.attn1.set_processor(FusedAttnProcessor2_0())
            # The fused layer counts. The single ones, which diffusers keeps, may be out of date.
            block.attn1.to_q.weight.zero_()
        torch.manual_seed(0)
        enable_spatial_sparse_attention(model, **SSA)
        outputs.append(model(hidden_states, coords=coords))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({}, "`coords`"),
        ({"coords": sparse_coords(59)}, "`coords`"),
        ({"coords": sparse_coords(60).long()}, "`coords`"),
        ({"coords": sparse_coords(60)[[0] * 60]}, "`coords`.*duplicate"),
        ({"coords": sparse_coords(60) - 1}, "`coords`"),
        ({"coords": sparse_coords(60), "attention_mask": torch.zeros(1, 60)}, "`attention_mask`"),
        ({"coords": sparse_coords(60), "image_rotary_emb": torch.zeros(60, 8)}, "`image_rotary_emb`"),
    ],
)
def test_calls_that_are_refused(kwargs, argument):
    model = enable_spatial_sparse_attention(DiffusersTransformer(layers=1), **SSA)
    with pytest.raises(ValueError, match=argument):
        model(one_sample()[0], **kwargs)


def test_coordinates_are_checked_once_for_all_layers(monkeypatch):
    model, calls = enable_window_attention(DiffusersTransformer(layers=3), 4), []
    check = sparse_tensor.check_coords
    monkeypatch.setattr(sparse_tensor, "check_coords", lambda coords: calls.append(1) or check(coords))
    hidden_states, coords = one_sample()
    for _ in range(2):
        expected = model(hidden_states, coords=coords)
        assert len(calls) == 1
    # Changed in place, they are others.
    coords[:, 1:] *= 3
    assert not torch.allclose(model(hidden_states, coords=coords), expected)
    assert len(calls) == 2


def test_trained_weights_are_not_overwritten():
    for model in (DiffusersTransformer(), SparseDiT(num_layers=1, num_attention_heads=2, attention_head_dim=16)):
        if isinstance(model, DiffusersTransformer):
            enable_spatial_sparse_attention(model, **SSA)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="weights would be lost"):
            enable_spatial_sparse_attention(model, **SSA)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"residual_connection": True}, {"norm_num_groups": 4}, {"scale_qk": False}])
def test_attention_of_other_kinds_is_refused(options):
    model = nn.ModuleList([randomize(Attention(16, heads=2, dim_head=8, **options))])
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="gives other numbers"):
        enable_spatial_sparse_attention(model, **SSA)
    assert set(model.state_dict()) == before and not hasattr(model[0], "window_size")


def test_arguments_that_do_not_fit_change_nothing():
    model = DiffusersTransformer()
    processors = set(map(id, model.attn_processors.values()))
    for config, name in [({"window_size": 0}, "window_size"), ({**SSA, "norm_num_groups": 3}, "num_groups")]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            enable_spatial_sparse_attention(model, **config)
        assert set(map(id, model.attn_processors.values())) == processors
    model.blocks[0].attn1.use_rope = True
    with pytest.raises(ValueError, match="`use_rope`"):
        enable_window_attention(model)


@torch.no_grad()
def test_saving_and_loading(tmp_path):
    model = enable_spatial_sparse_attention(randomize(DiffusersTransformer()), **SSA, use_window_shift=False)
    randomize(model)
    hidden_states, coords = one_sample()
    expected = model(hidden_states, coords=coords)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="4KB")
    for folder, variant in ((tmp_path, None), (tmp_path / "shards", "fp16")):
        loaded = DiffusersTransformer.from_pretrained(folder, variant=variant)
        assert not any(".ssa." in name for name in loaded.state_dict())
        assert load_spatial_sparse_attention(loaded, folder, variant) is loaded
        assert torch.equal(loaded(hidden_states, coords=coords), expected)
        assert loaded.config.spatial_sparse_attention == model.config.spatial_sparse_attention

    with pytest.raises(ValueError, match="`directory` must hold all weights"):
        load_spatial_sparse_attention(DiffusersTransformer(), tmp_path, "fp32")
    with pytest.raises(ValueError, match="`directory` must hold weights of `ssa` that fit"):
        load_spatial_sparse_attention(DiffusersTransformer(dim=32), tmp_path)
    DiffusersTransformer().save_pretrained(tmp_path / "plain")
    for folder in ("plain", "nowhere"):
        with pytest.raises(ValueError, match="`directory` must hold a model saved with"):
            load_spatial_sparse_attention(DiffusersTransformer(), tmp_path / folder)


@torch.no_grad()
def test_sparse_dit_that_is_equipped_is_one_with_ssa(tmp_path):
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "cross_attention_dim": 8}
    model = SparseDiT(**config, attention_type="full", num_key_value_heads=1, topk=5)
    enable_spatial_sparse_attention(model, topk=2, norm_num_groups=4)
    randomize(model).save_pretrained(tmp_path)
    loaded = SparseDiT.from_pretrained(tmp_path)
    assert loaded.config.attention_type == "ssa" and loaded.config.topk == 2
    coords = sparse_coords(60)
    inputs = torch.randn(60, 16), coords, torch.tensor([500.0]), torch.randn(1, 8), torch.zeros(1, 4).int()
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


# A sparse transformer that has its own sparse tensors, one layer for query, key and value, and no processors.


@dataclass
class ForeignSparseTensor:
    feats: torch.Tensor
    coords: torch.Tensor

    def replace(self, feats):
        return replace(self, feats=feats)


class ForeignRMSNorm(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.gamma * self.gamma.shape[-1] ** 0.5


class ForeignSparseAttention(nn.Module):
    def __init__(self, channels, num_heads, context_channels=None):
        super().__init__()
        self.num_heads = num_heads
        self.is_self = context_channels is None
        if self.is_self:
            self.to_qkv = nn.Linear(channels, 3 * channels)
            self.q_rms_norm = ForeignRMSNorm(channels // num_heads, num_heads)
            self.k_rms_norm = ForeignRMSNorm(channels // num_heads, num_heads)
        else:
            self.to_q = nn.Linear(channels, channels)
            self.to_kv = nn.Linear(context_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x, context=None):
        output = torch.empty_like(x.feats)
        for sample in x.coords[:, 0].unique():
            rows = x.coords[:, 0] == sample
            if self.is_self:
                query, key, value = self.to_qkv(x.feats[rows]).reshape(-1, 3, self.num_heads, 8).unbind(1)
                query, key = self.q_rms_norm(query), self.k_rms_norm(key)
            else:
                query = self.to_q(x.feats[rows]).unflatten(-1, (self.num_heads, 8))
                key, value = self.to_kv(context[int(sample)]).reshape(-1, 2, self.num_heads, 8).unbind(1)
            heads = (part.transpose(0, 1) for part in (query, key, value))
            output[rows] = F.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1)
        return x.replace(self.to_out(output))


class ForeignSparseTransformer(nn.Module):
    def __init__(self, channels=16, num_heads=2, context_channels=12, layers=2):
        super().__init__()
        self.self_attn = nn.ModuleList(ForeignSparseAttention(channels, num_heads) for _ in range(layers))
        self.cross_attn = nn.ModuleList(
            ForeignSparseAttention(channels, num_heads, context_channels) for _ in range(layers)
        )

    def forward(self, x, context):
        for self_attn, cross_attn in zip(self.self_attn, self.cross_attn):
            x = x.replace(x.feats + self_attn(x).feats)
            x = x.replace(x.feats + cross_attn(x, context).feats)
        return x


def test_sparse_tensors_and_fused_projections():
    torch.manual_seed(0)
    model = randomize(ForeignSparseTransformer().double())
    coords = sparse_coords(50, 70)
    x = ForeignSparseTensor(torch.randn(120, 16, dtype=torch.float64), coords)
    context = torch.randn(2, 5, 12, dtype=torch.float64)
    before, names = model(x, context), set(model.state_dict())

    enable_window_attention(model, window_size=16, use_window_shift=False)  # one window holds a whole sample
    torch.testing.assert_close(model(x, context).feats, before.feats)
    enable_window_attention(model, window_size=4)
    windowed = model(x, context)
    assert isinstance(windowed, ForeignSparseTensor) and not torch.allclose(windowed.feats, before.feats)
    assert set(model.state_dict()) == names

    enable_spatial_sparse_attention(model, **SSA)
    assert {name.split(".ssa.")[0] for name in set(model.state_dict()) - names} == {"self_attn.0", "self_attn.1"}
    assert isinstance(model.self_attn[0].get_processor(), SSAAttnProcessor)
    model(x, context).feats.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    for attn in model.self_attn:
        attn.set_processor("full")
    torch.testing.assert_close(model(x, context).feats, before.feats)
    with pytest.raises(ValueError, match="`coords`"):
        model(replace(x, coords=coords.long()), context)

    model.self_attn[0].set_processor("ssa")
    expected = model(x, context).feats
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x, context).feats, expected)
        assert isinstance(other.self_attn[0], ForeignSparseAttention)
    plain = model.self_attn[0](x.feats, coords=coords)
    torch.testing.assert_close(plain, model.self_attn[0](x).feats)


# A transformer of diffusers' `Attention`, whose projections hold query, key and value head by head.


class HeadByHeadProcessor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        qkv = torch.cat([layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)], dim=-1)
        heads = qkv.view(*hidden_states.shape[:2], attn.heads, -1)
        query, key, value = (part.transpose(1, 2) for part in heads.split(heads.shape[-1] // 3, dim=-1))
        attended = F.scaled_dot_product_attention(attn.norm_q(query), attn.norm_k(key), value)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


class HeadByHeadBlock(nn.Module):
    """Self-attention with RMS norm, and cross-attention to an image; the second half of a model adds a long skip."""

    def __init__(self, dim=16, heads=2, skip=False):
        super().__init__()
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm = nn.LayerNorm(dim)
        self.attn1 = Attention(
            dim, heads=heads, dim_head=dim // heads, qk_norm="rms_norm", processor=HeadByHeadProcessor()
        )
        self.attn2 = Attention(dim, cross_attention_dim=12, heads=heads, dim_head=dim // heads)

    def forward(self, hidden_states, context, skip=None, attention_kwargs=None):
        if self.skip is not None:
            hidden_states = self.skip(torch.cat([skip, hidden_states], dim=-1))
        attended = self.attn1(self.norm(hidden_states), image_rotary_emb=None, **(attention_kwargs or {}))
        hidden_states = hidden_states + attended
        return hidden_states + self.attn2(hidden_states, context)


@torch.no_grad()
def test_projections_head_by_head():
    torch.manual_seed(0)
    model = nn.ModuleList([HeadByHeadBlock(), HeadByHeadBlock(skip=True)])
    randomize(model.double())
    (hidden_states, coords), context = one_sample(dtype=torch.float64), torch.randn(1, 5, 12, dtype=torch.float64)

    def run(**attention_kwargs):
        first = model[0](hidden_states, context, attention_kwargs=attention_kwargs)
        return model[1](first, context, hidden_states, attention_kwargs=attention_kwargs)

    before = run()
    with pytest.raises(ValueError, match=r"HeadByHeadProcessor in '0\.attn1' gives other numbers: try `heads_first"):
        enable_spatial_sparse_attention(model, **SSA)
    enable_spatial_sparse_attention(model, **SSA, heads_first=True)
    assert [block.attn1.window_shift for block in model] == [0, 2]
    assert not torch.allclose(run(coords=coords), before)
    for block in model:
        block.attn1.set_processor(WindowAttnProcessor(window_size=16, shift=0))
    torch.testing.assert_close(run(coords=coords), before)
