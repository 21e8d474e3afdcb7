"""Lists of launches: a recorded call does the same with other tensors, and what cannot be recorded is called."""

import ctypes
import gc
import weakref

import pytest
import torch


repeated_calls = pytest.importorskip("diffusers_sparse3d.ops.runtime.recording", reason="needs triton")
from diffusers_sparse3d.ops.runtime import launch as triton_launch  # noqa: E402
from diffusers_sparse3d.ops.runtime.recording import _LaunchList, _NotRepeatableError, _Recorder  # noqa: E402


def _numbers(pointer, count):
    pointer = pointer if isinstance(pointer, int) else pointer.data_ptr()
    return (ctypes.c_float * count).from_address(pointer)


def add(source, other, target, count, factor, stream=None):
    """As a compiled kernel on the CPU: target = source + factor * other."""
    source, other, target = (_numbers(pointer, count) for pointer in (source, other, target))
    target[:] = [first + factor * second for first, second in zip(source, other)]


def add_pair(sources, target, count, factor, stream=None):
    """`add` with an aggregate."""
    name, (source, other) = sources
    assert name == "pair" and type(sources) is not list
    add(source, other, target, count, factor)


def launch(*arguments, kernel=add):
    kernel(*arguments)
    listener = triton_launch._listener.get()
    if listener is not None:
        listener(kernel, arguments)


CONSTANT = torch.arange(6.0)


def function(first, second):
    """With scratch memory, a view as an argument, operations, a constant, and results that are whole or parts."""
    first = first.contiguous()
    scratch, kept = torch.empty_like(first), first.new_empty(2, 6)
    launch(first, second, scratch, 6, 2.0)
    launch(("pair", (scratch, CONSTANT)), kept[1], 6, -1.0, kernel=add_pair)
    counter = first.new_zeros(6)
    values, order = (kept[1] + counter).sort(descending=True)
    launch(values, scratch, kept[0], 6, 0.5)
    launch(("pair", (kept[0], scratch)), kept[0], 6, 0.5, kernel=add_pair)
    launch(("pair", (CONSTANT, CONSTANT)), first.new_empty(6), 6, 0.5, kernel=add_pair)
    return [kept, order, kept[0, 1:5], CONSTANT]


def expected_of(first, second):
    scratch = first + 2 * second
    kept = scratch - CONSTANT
    values, order = kept.sort(descending=True)
    whole = torch.stack([values + scratch, kept])
    return [whole, order, whole[0, 1:5], CONSTANT]


def record(called, *inputs):
    recorder = _Recorder(inputs)
    with recorder, triton_launch.listening(recorder.listen):
        results = called(*inputs)
    return _LaunchList(recorder, results), results


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lists ask a GPU for the stream alone."""
    monkeypatch.setattr(repeated_calls, "current_stream", lambda tensor: 0)


@pytest.mark.parametrize("strided", [False, True])
def test_other_tensors(strided, on_the_cpu):
    def inputs(seed):
        numbers = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(seed))
        return numbers[0, :, 0] if strided else numbers[0, :, 0].contiguous(), numbers[1, :, 1].contiguous()

    repeat, results = record(function, *inputs(0))
    runs = [(results, inputs(0)), *((repeat(inputs(seed)), inputs(seed)) for seed in (1, 2, 1))]
    # Nothing is written to twice.
    for found, given in runs:
        for one, other in zip(found, expected_of(*given), strict=True):
            torch.testing.assert_close(one, other)


def test_inputs_that_are_parts_of_one_tensor(on_the_cpu):
    both = torch.randn(2, 6)
    repeat, _ = record(function, *both)
    others = torch.randn(6), torch.randn(6)
    for one, other in zip(repeat(others), expected_of(*others)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "called",
    [
        lambda first, second: [first * float(second.sum())],
        lambda first, second: [torch.cat([first, second])],
        lambda first, second: [first[1:] + second[1:]],
        lambda first, second: [first.new_empty(6).view(torch.int32).zero_()],
        lambda first, second: [triton_launch._listener.get()(None, ())],
    ],
    ids=["value", "list", "part of an input", "other dtype", "unknown launch"],
)
def test_what_cannot_be_recorded(called):
    with pytest.raises(_NotRepeatableError):
        record(called, torch.randn(2, 6)[0], torch.randn(6))


def test_no_tensor_of_the_call_is_kept():
    inputs = [torch.randn(6), torch.randn(6)]
    repeat, results = record(function, *inputs)
    tensors = [weakref.ref(tensor) for tensor in (*inputs, *results[:3])]
    del inputs, results
    gc.collect()
    assert repeat and not any(tensor() is not None for tensor in tensors)


def test_too_much_memory(monkeypatch):
    monkeypatch.setattr(repeated_calls, "_MOST_SCRATCH", 511)
    with pytest.raises(_NotRepeatableError):
        record(function, torch.randn(6), torch.randn(6))
