"""Switches of the runtime: who they hold for, what the environment variable takes, what operators make of them."""

import threading

import pytest
import torch

from diffusers_sparse3d.ops.runtime import RuntimeSettings, dispatch, runtime_settings, settings
from diffusers_sparse3d.ops.runtime.operators import operator


@pytest.fixture
def environment(monkeypatch):
    """A function that sets the environment variable as a new process would find it."""

    def set_to(value):
        monkeypatch.setenv("DIFFUSERS_SPARSE3D_RUNTIME", value)
        settings._environment_settings.cache_clear()

    yield set_to
    monkeypatch.undo()
    settings._environment_settings.cache_clear()


@pytest.mark.parametrize(
    "value, expected",
    [
        ("", RuntimeSettings()),
        ("no-kernels", RuntimeSettings(kernels=False)),
        ("no-direct-launch", RuntimeSettings(direct_launch=False)),
        ("no-compile-ahead", RuntimeSettings(compile_ahead=False)),
        (" no-recording, no-kernels,", RuntimeSettings(recording=False, kernels=False)),
    ],
)
def test_the_environment_variable(value, expected, environment):
    environment(value)
    assert settings.current_settings() == expected


@pytest.mark.parametrize("value", ["kernels", "no-kernel", "no_kernels", "no-kernels no-recording", "1"])
def test_values_of_the_environment_variable_that_are_not_known(value, environment):
    environment(value)
    with pytest.raises(ValueError, match=r"`DIFFUSERS_SPARSE3D_RUNTIME` must be .*no-direct-launch.*got '" + value):
        settings.current_settings()


def test_blocks_are_nested_and_end(environment):
    environment("no-recording")
    with runtime_settings(kernels=False) as outer:
        assert outer == settings.current_settings() == RuntimeSettings(False, True, False)
        with pytest.raises(KeyError), runtime_settings(recording=True, direct_launch=False):
            assert settings.current_settings() == RuntimeSettings(False, False, True)
            raise KeyError
        assert settings.current_settings() == outer
    assert settings.current_settings() == RuntimeSettings(recording=False)


def test_threads_have_settings_of_their_own():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(settings.current_settings()))
    with runtime_settings(kernels=False):
        thread.start()
        thread.join()
    assert seen == [RuntimeSettings()]


@operator("diffusers_sparse3d_tests::settings_doubled", mutates_args=())
def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return 2 * tensor


SEEN_BACKWARD = []


def backward(ctx, gradient):
    SEEN_BACKWARD.append(settings.current_settings())
    return 2 * gradient


doubled.register_autograd(backward, lambda ctx, inputs, output: None)


def test_the_backward_pass_has_the_settings_of_the_forward_pass():
    leaf = torch.ones(3, requires_grad=True)
    with runtime_settings(recording=False):
        output = doubled(leaf)
    # In a thread of autograd's, as on a GPU.
    thread = threading.Thread(target=lambda: output.sum().backward())
    thread.start()
    thread.join()
    assert SEEN_BACKWARD.pop() == RuntimeSettings(recording=False) and not SEEN_BACKWARD
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))


class GPUTensor(torch.Tensor):
    is_cuda = True


def test_operators_run_no_kernels_where_they_are_off(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    tensor = torch.zeros(2).as_subclass(GPUTensor)
    assert dispatch.runs_kernels(tensor) and not dispatch.runs_kernels(torch.zeros(2))
    with runtime_settings(kernels=False):
        assert not dispatch.runs_kernels(tensor)


def test_compiled_graphs_keep_the_setting_they_were_traced_with():
    def function(tensor):
        return tensor + 1 if settings.kernels_are_on() else tensor - 1

    torch._dynamo.reset()
    with runtime_settings(kernels=False):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), -1.0))
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), -1.0))
    assert torch.equal(
        torch.compile(lambda tensor: function(tensor), fullgraph=True, backend="eager")(torch.zeros(2)), torch.ones(2)
    )
