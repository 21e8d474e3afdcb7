import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from diffusers_sparse3d import SparseDiT
from diffusers_sparse3d.training.configuration import TrainingConfig
from diffusers_sparse3d.training.muon import MuonAdamW, orthogonalize
from diffusers_sparse3d.training.optimizers import block_matrices, make_optimizer


def config(**options):
    return TrainingConfig(data="", output_dir="", max_train_steps=1, learning_rate=1e-3, **options)


@pytest.fixture
def model():
    return SparseDiT(
        sample_size=4,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_key_value_heads=1,
        cross_attention_dim=32,
        window_size=2,
        norm_num_groups=4,
    )


def test_matrices_of_blocks(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    model.transformer_blocks[0].attn1.to_q.requires_grad_(False)
    found = {names[id(parameter)] for parameter in block_matrices(model)}
    assert {"transformer_blocks.1.attn1.to_q.weight", "transformer_blocks.0.ff.net.2.weight"} <= found
    assert not {"proj_in.weight", "proj_out.weight", "transformer_blocks.0.attn1.to_q.weight"} & found
    assert all(parameter.ndim == 2 for parameter in block_matrices(model))


def test_every_parameter_is_trained_once(model):
    model.proj_in.requires_grad_(False)
    groups = make_optimizer(config(optimizer="muon", muon_learning_rate=5e-3), model, fused=False).param_groups
    taken = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(taken) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert [group["lr"] for group in groups] == [5e-3, 1e-3]
    adamw = make_optimizer(config(), model, fused=False)
    assert len(adamw.param_groups[0]["params"]) == len(taken)


def test_muon_needs_matrices():
    with pytest.raises(ValueError, match="optimizer"):
        make_optimizer(config(optimizer="muon"), nn.Linear(2, 2), fused=False)
    with pytest.raises(ValueError, match="optimizer"):
        config(optimizer="sgd")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_every_weight(model, optimizer):
    """With gradients of zero, all that a step does is to multiply weights by 1 - learning rate * weight decay."""
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(config(optimizer=optimizer, weight_decay=0.2), model, fused=False).step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 1e-3 * 0.2), rtol=1e-6, atol=0, msg=name)


def test_moments_of_8_bits(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="`optimizer` 'adamw_8bit' needs bitsandbytes"):
        make_optimizer(config(optimizer="adamw_8bit"), model, fused=False)
    # bitsandbytes itself needs a GPU.
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    optimizer = make_optimizer(config(optimizer="adamw_8bit", adam_beta1=0.8), model, fused=True)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["lr"], group["fused"]) == ((0.8, 0.999), 1e-3, None)
    assert len(group["params"]) == len(list(model.parameters()))


def test_settings_of_adamw(model):
    adamw = make_optimizer(config(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6), model, fused=False)
    (group,) = adamw.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.01)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_muon_and_adamw_are_those_of_torch():
    """Five steps on wide, tall and square matrices and on a vector, as two optimizers of torch take them."""
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (8, 8), (5,)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    adamw = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-7}
    settings = {"muon_learning_rate": 2e-2, "learning_rate": adamw["lr"], "momentum": 0.9}
    one = MuonAdamW(ours[:4], ours[4:], **settings, **{key: value for key, value in adamw.items() if key != "lr"})
    two = [
        torch.optim.Muon(theirs[:4], lr=2e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[4:], **adamw),
    ]
    for _ in range(5):
        for mine, other, shape in zip(ours, theirs, shapes):
            mine.grad = torch.randn(shape)
            other.grad = mine.grad.clone()
        one.step()
        for optimizer in two:
            optimizer.step()
    # The directions are bfloat16: with sums in another order they differ in their last bit.
    for mine, other, before in zip(ours, theirs, start):
        difference, update = (mine - other).detach(), (other - before).detach()
        assert float(difference.norm()) < 0.02 * float(update.norm())


def test_orthogonalised_matrices_have_singular_values_of_about_one():
    torch.manual_seed(0)
    for shape in ((3, 6, 10), (3, 10, 6)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert float(values.min()) > 0.6 and float(values.max()) < 1.25
