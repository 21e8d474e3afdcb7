"""The feed-forward network whose activation cuBLAS or oneDNN applies, where it may."""

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


@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_value(shape, dtype):
    layers, hidden_states = GELUFeedForward(24, 40).double(), 3 * torch.randn(*shape, dtype=torch.float64)
    expected = reference(layers, hidden_states)
    found = layers.to(dtype)(hidden_states.to(dtype))
    assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-12) * expected.norm()
    # Channels that are not next to each other in memory.
    strided = hidden_states.to(dtype).mT.contiguous().mT if len(shape) == 3 else hidden_states.to(dtype)
    torch.testing.assert_close(layers(strided), found)


@pytest.mark.skipif(not feed_forward._has_onednn(), reason="PyTorch runs oneDNN on x86 CPUs alone")
def test_products_of_onednn(monkeypatch):
    """Both layers go to oneDNN in float32, as long as nothing else would happen at their calls."""
    layers, hidden_states, calls = GELUFeedForward(24, 40), torch.randn(3, 24), []
    original = feed_forward._onednn_product
    monkeypatch.setattr(feed_forward, "_onednn_product", lambda *a: (calls.append(a[2:]), original(*a))[1])
    layers(hidden_states)
    assert not calls  # gradients
    with torch.no_grad():
        expected = layers(hidden_states)
        assert calls == [("gelu", "tanh"), ()]
        calls.clear()
        with torch.autocast("cpu"):
            layers(hidden_states)
        layers.double()(hidden_states.double())
        layers.bfloat16()(hidden_states.bfloat16())
        assert not calls
        layers.float().net[2].forward = lambda rows: rows
        assert layers(hidden_states).shape == (3, 40)
        assert calls == [("gelu", "tanh")]
        calls.clear()
        layers.net[0].proj.register_forward_hook(lambda *_: None)
        layers(hidden_states)
        assert not calls
    assert expected.shape == (3, 24)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (700, 24), (0, 24)])
def test_fused(dtype, shape, monkeypatch):
    torch.manual_seed(0)
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
    # One rounding of the wide activations in place of two, which shows in the mean over many rows alone.
    error, plain_error = (found - expected).norm(), (plain - expected).norm()
    assert error <= (
        1.01 * plain_error if len(shape) == 2 and shape[0] > 100 else torch.finfo(dtype).eps * expected.norm()
    )


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
