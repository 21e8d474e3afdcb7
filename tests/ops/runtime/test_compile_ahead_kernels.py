"""Kernels compiled ahead: each kind once, as its launch would have it, and nothing is launched or kept."""

import gc
import threading

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from diffusers_sparse3d.ops.runtime import launch, runtime_settings
from diffusers_sparse3d.ops.runtime.collection import current_collector
from diffusers_sparse3d.ops.runtime.compile_ahead import can_compile_ahead, compile_ahead
from diffusers_sparse3d.ops.runtime.launch import Kernel
from diffusers_sparse3d.ops.runtime.recording import RepeatedCalls
from diffusers_sparse3d.ops.runtime.settings import current_settings

from .fake_driver import compiled_function, fake_driver, on_gpu  # noqa: F401 - a fixture
from .test_launch import (
    NUMBERS,
    Sources,
    add,
    add_pair,
    cases,
    check_add,
    check_add_pair,
    emulated_add,
    emulated_add_pair,
)


CPU = torch.device("cpu")


@pytest.fixture
def gpu(fake_driver):  # noqa: F811
    fake_driver.bodies = {"add": emulated_add, "add_pair": emulated_add_pair}
    return fake_driver


def launch_all(kernel, pair_kernel, numbers):
    """One launch of each kind of `cases`, and two with aggregates; without values they cannot be checked."""
    for source, other, factor in cases(numbers):
        target = torch.empty_like(source)
        kernel[(1,)](source, other, target, len(source), factor, SIZE=16, NEGATIVE=True)
    for second in (numbers, None):
        size = triton.language.constexpr(16)
        pair_kernel[(1,)](Sources(size, (numbers, second), len(numbers)), torch.empty_like(numbers))


def test_launches_find_what_was_compiled_ahead(gpu):
    kernel, pair_kernel = Kernel(compiled_function(add)), Kernel(compiled_function(add_pair))
    result = compile_ahead([lambda: lambda: launch_all(kernel, pair_kernel, torch.empty(65))] * 3, CPU)
    assert result.errors == [] and result.num_kernels == len(gpu.compiled) == 11
    assert gpu.launched == []
    numbers = on_gpu(NUMBERS)
    for case in cases(numbers):
        check_add(kernel, *case, NEGATIVE=True)
    for second in (numbers, None):
        check_add_pair(pair_kernel, numbers, second, triton.language.constexpr(16))
    # Each launch checks that the kernel was compiled for its arguments.
    assert len(gpu.compiled) == 11 and len(gpu.launched) == 11


def test_an_example_runs_for_real_and_what_it_returns_does_not(gpu):
    kernel, seen = Kernel(compiled_function(add)), []

    def example():
        numbers = on_gpu(NUMBERS)
        check_add(kernel, numbers, None, 2.0, NEGATIVE=False)
        seen.append((threading.get_ident(), torch.is_grad_enabled(), current_settings().recording))

        def call():
            seen.append((torch.empty(3) + NUMBERS[:3], current_collector()))

        return call

    with runtime_settings(recording=False):
        result = compile_ahead([example], CPU)
    assert result.errors == [] and gpu.launched == ["add"]
    (thread, has_gradients, recording), (values, collector) = seen
    assert thread != threading.get_ident() and not has_gradients and not recording
    assert isinstance(values, FakeTensor) and collector is not None and current_collector() is None


def test_nothing_without_values_outlives_the_compilation(gpu):
    kernel, pair_kernel = Kernel(compiled_function(add)), Kernel(compiled_function(add_pair))
    # Other tests of the process may have left some.
    before = {id(found) for found in gc.get_objects() if type(found) is FakeTensor}
    compile_ahead([lambda: lambda: launch_all(kernel, pair_kernel, torch.empty(65))], CPU)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is FakeTensor and id(found) not in before]


def test_calls_that_are_recorded_are_called(gpu, monkeypatch):
    """Tensors without values have no address, by which a record would know them again."""
    kernel, calls = Kernel(compiled_function(add)), RepeatedCalls()
    monkeypatch.setattr(launch, "_knows_triton", lambda: True)

    def function(source):
        target = torch.empty_like(source)
        kernel[(1,)](source, None, target, len(source), 2.0, SIZE=16, NEGATIVE=True)
        return [target]

    def call():
        for _ in range(3):
            (target,) = calls(function, (torch.empty(65, device="cuda"),), name="add")
            assert isinstance(target, FakeTensor)

    result = compile_ahead([lambda: call], CPU)
    assert result.errors == [] and gpu.compiled == ["add"] and not calls._calls


def test_errors_do_not_stop_the_others(gpu, monkeypatch):
    kernel = Kernel(compiled_function(add))
    broken = Kernel(compiled_function(add_pair))
    monkeypatch.setattr(broken, "compile", lambda *_: 1 / 0)

    def call():
        launch_all(kernel, broken, torch.empty(65))
        raise KeyError("after the launches")

    def example():
        raise LookupError("no plan")

    result = compile_ahead([lambda: call, example, lambda: None], CPU)
    assert sorted(type(error).__name__ for error in result.errors) == [
        "KeyError",
        "LookupError",
        "ZeroDivisionError",
        "ZeroDivisionError",
    ]
    assert gpu.compiled == ["add"] * 9


def test_an_interruption_is_passed_on(gpu):
    class Bar:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *_):
            pass

    with pytest.raises(KeyboardInterrupt):
        compile_ahead([lambda: None], CPU, lambda total: Bar())


def test_progress_counts_kernels(gpu):
    kernel, pair_kernel = Kernel(compiled_function(add)), Kernel(compiled_function(add_pair))
    counts = []

    class Bar:
        def __init__(self, total):
            counts.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            counts.append("end")

        def update(self):
            counts.append(1)

    compile_ahead([lambda: lambda: launch_all(kernel, pair_kernel, torch.empty(65))], CPU, Bar)
    assert counts == [11] + [1] * 11 + ["end"]


def test_where_there_is_nothing_to_gain(monkeypatch):
    monkeypatch.setattr(launch, "_knows_triton", lambda: True)
    gpu = torch.device("cuda", 0)
    module = "diffusers_sparse3d.ops.runtime.compile_ahead.num_threads"
    monkeypatch.setattr(module, lambda: 8)
    assert can_compile_ahead(gpu) and not can_compile_ahead(CPU)
    with runtime_settings(direct_launch=False):
        assert not can_compile_ahead(gpu)
    monkeypatch.setattr(module, lambda: 1)
    assert not can_compile_ahead(gpu)


def count_rows(source, num_rows, other):
    pass


@pytest.mark.parametrize("unspecialized, expected", [((), [48, 49]), (("num_rows",), [48])])
def test_counts_that_16_divides_and_others(unspecialized, expected, gpu, monkeypatch):
    kernel, counts = Kernel(compiled_function(count_rows)), []
    kernel.function.do_not_specialize = list(unspecialized)
    monkeypatch.setattr(kernel, "compile", lambda arguments, constants: counts.append(arguments[1:]))
    compile_ahead([lambda: lambda: kernel[(1,)](torch.empty(65), 48, 32)], CPU)
    assert sorted(counts) == [(count, 32) for count in expected]
    monkeypatch.setattr(kernel, "compile", lambda arguments, constants: counts.append(arguments[1:]))
    counts.clear()
    compile_ahead([lambda: lambda: kernel[(1,)](torch.empty(65), 7, 32)], CPU)
    assert sorted(counts) == [(count, 32) for count in (7, 112)[: len(expected)]]
