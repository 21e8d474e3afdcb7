"""Which calls of a model are captured as CUDA graphs, and when; what a graph computes is tested on GPUs."""

import copy
import weakref

import pytest
import torch
from torch import nn

from diffusers_sparse3d.models import cuda_graphs
from diffusers_sparse3d.models.cuda_graphs import ReplayedCalls, active_calls, capture_key, replaying_cuda_graphs
from tests.models.test_transformer_dense import tiny_model


class TensorOnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def fake_captures(monkeypatch):
    """A list of the inputs of all captures, which take place without a GPU and run the function at each call."""
    captured = []

    class FakeCapture:
        def __init__(self, function, inputs):
            self.function = function
            captured.append(inputs)

        def __call__(self, *inputs):
            return self.function(*inputs)

    def key(model, inputs):
        return tuple((tensor.shape, tensor.dtype) for tensor in inputs)

    monkeypatch.setattr(cuda_graphs, "CapturedCall", FakeCapture)
    monkeypatch.setattr(cuda_graphs, "capture_key", key)
    return captured


@pytest.fixture
def no_gpu_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def on_gpu(*shape):
    return torch.ones(*shape).as_subclass(TensorOnGPU)


def test_second_call_of_a_kind_is_captured(monkeypatch):
    captured, ran = fake_captures(monkeypatch), []

    def function(tensor):
        ran.append(len(captured))
        return 2 * tensor

    calls, model, first, other = ReplayedCalls(max_tokens=5), nn.Linear(2, 2), object(), object()
    for value, shape, keep, num_captures in [
        (1.0, 2, (first,), 0),
        (2.0, 2, (first,), 1),
        (3.0, 2, (first,), 1),
        (4.0, 2, (other,), 1),
        (5.0, 3, (first,), 1),
        (6.0, 3, (first,), 2),
        (7.0, 2, (other,), 3),
    ]:
        tensor = torch.full((shape,), value)
        assert torch.equal(calls(model, function, (tensor,), 5, keep), 2 * tensor)
        assert len(captured) == num_captures
    ran.clear()
    for _ in range(3):
        calls(model, function, (torch.ones(4),), 6)
    assert ran == [3] * 3 and len(captured) == 3


def test_what_a_call_depends_on_stays_in_memory(monkeypatch):
    """Otherwise another object might get its identity, and with it a call of another kind."""
    fake_captures(monkeypatch)
    calls, kept = ReplayedCalls(), nn.Module()
    seen = weakref.ref(kept)
    calls(nn.Linear(2, 2), torch.neg, (torch.ones(2),), 2, (kept,))
    del kept
    assert seen() is not None
    del calls
    assert seen() is None


def test_block_is_left_by_errors():
    assert active_calls() is None
    with pytest.raises(KeyError), replaying_cuda_graphs(None):
        assert isinstance(active_calls(), ReplayedCalls)
        raise KeyError
    assert active_calls() is None


@pytest.mark.usefixtures("no_gpu_asked")
def test_key_names_weights_processors_and_shapes():
    model, inputs = tiny_model(), (on_gpu(2, 3), on_gpu(4))
    with torch.no_grad():
        key = capture_key(model, inputs)
        assert key is not None and key == capture_key(model, (2 * inputs[0], inputs[1]))
        others = [
            capture_key(copy.deepcopy(model), inputs),
            capture_key(model, (on_gpu(2, 4), inputs[1])),
            capture_key(model, (inputs[0].double(), inputs[1])),
        ]
        model.proj_out = nn.Linear(model.proj_out.in_features, model.proj_out.out_features)
        others.append(capture_key(model, inputs))
        attn = model.transformer_blocks[0].attn1
        attn.set_processor(type(attn.processor)())
        others.append(capture_key(model, inputs))
    assert None not in others and len({key, *others}) == 6


class ForeignProcessor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None):
        return hidden_states


def use_another_backend(model):
    model.transformer_blocks[0].attn1.processor._attention_backend = "flash"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.proj_in.register_forward_hook(lambda *_: None),
        lambda model: model.proj_in.register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.proj_in, "forward", lambda x: x),
        lambda model: setattr(model.proj_in, "_hf_hook", object()),
        lambda model: model.transformer_blocks[0].compile(backend="eager"),
        lambda model: model.enable_layerwise_casting(torch.float16, torch.float32),
        lambda model: setattr(model, "peft_config", {"default": object()}),
        lambda model: setattr(model, "hf_quantizer", object()),
        lambda model: model.transformer_blocks[0].attn1.set_processor(ForeignProcessor()),
        use_another_backend,
    ],
)
@pytest.mark.usefixtures("no_gpu_asked")
@torch.no_grad()
def test_models_that_are_not_captured(change):
    model = tiny_model()
    assert capture_key(model, (on_gpu(2),)) is not None
    change(model)
    assert capture_key(model, (on_gpu(2),)) is None


@pytest.mark.usefixtures("no_gpu_asked")
def test_calls_that_are_not_captured(monkeypatch):
    model, inputs = tiny_model(), (on_gpu(2),)
    assert capture_key(model, inputs) is None  # gradients
    with torch.no_grad():
        assert capture_key(model, (torch.ones(2),)) is None
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            assert capture_key(model, inputs) is None
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            assert capture_key(model, inputs) is None
        assert capture_key(model, inputs) is not None
