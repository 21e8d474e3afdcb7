"""The feed-forward network whose activation cuBLAS applies, where it may."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_sparse3d.models import feed_forward
from diffusers_sparse3d.models.feed_forward import GELUFeedForward, is_plain_linear
from tests.ops.kernel_testing import DEVICE, needs_gpu


def reference(layers, hidden_states):
    proj_in, proj_out = layers.net[0].proj, layers.net[2]
    hidden = F.gelu(proj_in(hidden_states), approximate="tanh")
    return proj_out(hidden)


@pytest.mark.parametrize("can_fuse", [False, True])
@torch.no_grad()
def test_value(can_fuse, monkeypatch):
    """Fused on a CPU, the GELU is the exact one, so the approximation is what differs."""
    layers, hidden_states = GELUFeedForward(24, 40).double(), torch.randn(3, 5, 24, dtype=torch.float64)
    monkeypatch.setattr(feed_forward, "_can_fuse", lambda *_: can_fuse)
    tolerance = 1e-3 if can_fuse else 1e-12
    torch.testing.assert_close(layers(hidden_states), reference(layers, hidden_states), atol=tolerance, rtol=0)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (0, 24)])
def test_fused(dtype, shape, monkeypatch):
    layers = GELUFeedForward(24, 40).to(DEVICE, dtype)
    hidden_states, fused = torch.randn(*shape, device=DEVICE, dtype=dtype), []
    original = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, **k: (fused.append(1), original(*a, **k))[1])
    expected = reference(GELUFeedForward.to(layers, torch.float64), hidden_states.double())
    layers.to(dtype)
    plain = layers(hidden_states)
    assert not fused  # gradients
    with torch.no_grad():
        found = layers(hidden_states)
        assert bool(fused) == (hidden_states.numel() > 0)
        fused.clear()
        with torch.autocast("cuda", dtype):
            layers(hidden_states)
        layers.float()(hidden_states.float())
        assert not fused
    # One rounding of the wide activations in place of two.
    assert (found - expected).norm() <= 1.01 * (plain - expected).norm() + 1e-12


def test_plain_linear():
    linear = nn.Linear(2, 2)
    assert is_plain_linear(linear)
    assert not is_plain_linear(nn.Sequential())
    assert not is_plain_linear(type("Quantised", (nn.Linear,), {})(2, 2))
    for change in (
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: setattr(module, "forward", lambda x: x),
        lambda module: setattr(module, "weight", nn.Parameter(torch.ones(2, 2).as_subclass(QuantisedTensor))),
    ):
        changed = nn.Linear(2, 2)
        change(changed)
        assert not is_plain_linear(changed)


class QuantisedTensor(torch.Tensor):
    pass
