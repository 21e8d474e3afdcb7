"""Recorded calls do the same with other tensors, are told apart, and what cannot be recorded is called as it is."""

import ctypes
import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl

from diffusers_sparse3d.ops.runtime import launch as triton_launch
from diffusers_sparse3d.ops.runtime import recording, runtime_settings
from diffusers_sparse3d.ops.runtime.launch import Kernel
from diffusers_sparse3d.ops.runtime.recording import RepeatedCalls, _NotRepeatableError, _RecordedCall, _Recorder

from .fake_driver import compiled_function, fake_driver, on_gpu  # noqa: F401 - a fixture


def _numbers(pointer, count):
    pointer = pointer if isinstance(pointer, int) else pointer.data_ptr()
    return (ctypes.c_float * count).from_address(pointer)


def add(source, other, target, count, factor, stream=None):
    """Stands in for a compiled kernel: target = source + factor * other, given as float32 tensors or addresses."""
    source, other, target = (_numbers(pointer, count) for pointer in (source, other, target))
    target[:] = [first + factor * second for first, second in zip(source, other)]


def add_pair(sources, target, count, factor, stream=None):
    """Like `add`, with sources in a nested aggregate."""
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
    """Has scratch memory, a view as an argument, operations, a constant, results that are whole buffers or parts."""
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
    return _RecordedCall(recorder, results), results


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Repeated calls ask the driver for nothing but the stream."""
    monkeypatch.setattr(recording, "current_stream", lambda tensor: 0)


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
    monkeypatch.setattr(recording, "_MOST_SCRATCH", 511)
    with pytest.raises(recording._TooLargeError):
        record(function, torch.randn(6), torch.randn(6))


def scale(sources, target, count, FACTOR: tl.constexpr):
    places = tl.program_id(0) * 16 + tl.arange(0, 16)
    mask = places < count
    first, second = sources
    values = (tl.load(first + places, mask=mask) + tl.load(second + places, mask=mask)) * FACTOR
    tl.store(target + places, values, mask=mask)


def emulated_scale(grid, sources, target, count, factor):
    assert grid == (triton.cdiv(count, 16), 1, 1)
    first, second = sources
    target(count).copy_((first(count) + second(count)) * factor)


class Calls:
    """Calls of two kernels in a row through one `RepeatedCalls`, as the operators make them.

    Attributes:
        made: how often the function ran, that is, was not repeated.
    """

    def __init__(self):
        self.calls, self.kernel, self.made = RepeatedCalls(), Kernel(compiled_function(scale)), 0

    def __call__(self, first, second, name="scale", **settings):
        (result,) = self.calls(
            lambda *tensors: self.run(*tensors, **settings), (first, second), function_name=name, **settings
        )
        expected = first + second
        for factor in settings.values():
            expected = (expected + expected) * factor
        assert result.dtype == first.dtype and torch.equal(result, expected)
        return result

    def run(self, first, second, **factors):
        self.made += 1
        first, second = first.contiguous(), second.contiguous()
        grid, count = (triton.cdiv(first.numel(), 16),), first.numel()
        result = torch.empty_like(first)
        self.kernel[grid]((first, second), result, count, FACTOR=1)
        for factor in factors.values():
            scratch, result = result, torch.empty_like(first)
            self.kernel[grid]((scratch, scratch), result, count, FACTOR=factor)
        return [result]


@pytest.fixture
def calls(fake_driver):  # noqa: F811
    fake_driver.bodies = {"scale": emulated_scale}
    return Calls()


def inputs(shape=(4, 6), dtype=torch.float32, device=0, seed=0):
    numbers = torch.randint(-9, 9, (2, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return [on_gpu(tensor.clone(), device) for tensor in numbers]


def transposed(*tensors):
    return [tensor.t().contiguous().t() for tensor in tensors]


def unaligned(*tensors):
    return [on_gpu(torch.cat([torch.zeros(1), tensor.flatten()]))[1:].view(tensor.shape) for tensor in tensors]


def test_the_third_call_is_repeated(calls, fake_driver):  # noqa: F811
    results = [calls(*inputs(seed=seed), factor=3) for seed in range(5)]
    assert calls.made == 2 and len(fake_driver.launched) == 2 * 5
    # A repeated call has memory of its own.
    assert len({result.data_ptr() for result in results}) == 5


def test_calls_are_told_apart(calls, fake_driver):  # noqa: F811
    """Each kind of call is made twice and then repeated; repeated for another kind, it would fail or be wrong."""
    kinds = [
        (inputs(), {"factor": 3}),
        (inputs((4, 12)), {"factor": 3}),
        (inputs((6, 4)), {"factor": 3}),
        (inputs(dtype=torch.float64), {"factor": 3}),
        (transposed(*inputs()), {"factor": 3}),
        (transposed(inputs()[0]) + inputs()[1:], {"factor": 3}),
        (unaligned(*inputs()), {"factor": 3}),
        (inputs(), {"factor": 5}),
        (inputs(), {}),
        (inputs(), {"factor": 3, "other": 2}),
        (inputs(device=1), {"factor": 3}),
    ]
    for tensors, settings in kinds * 3:
        fake_driver.device = tensors[0].get_device()
        calls(*tensors, **settings)
    assert calls.made == 2 * len(kinds)


def test_settings_are_told_apart_by_their_names(calls):
    def run(*tensors, add=0, multiply=1):
        (result,) = calls.run(*tensors, factor=multiply)
        return [result + add]

    tensors = inputs()
    for _ in range(4):
        for settings in ({"add": 7}, {"multiply": 7}):
            (result,) = calls.calls(
                lambda *given, settings=settings: run(*given, **settings), tuple(tensors), **settings
            )
            assert torch.equal(result, 2 * sum(tensors) * settings.get("multiply", 1) + settings.get("add", 0))
    assert calls.made == 4


@pytest.mark.parametrize("setting", ["recording", "direct_launch"])
def test_nothing_is_repeated_where_settings_say_so(setting, calls):
    for _ in range(3):
        calls(*inputs(), factor=3)
    with runtime_settings(**{setting: False}):
        calls(*inputs(), factor=3)
        assert calls.made == 3
    calls(*inputs(), factor=3)
    assert calls.made == 3


def test_nothing_is_repeated_on_another_device_than_the_current_one(calls, fake_driver):  # noqa: F811
    run = calls.run

    def on_the_first_device(*tensors, **settings):
        current, fake_driver.device = fake_driver.device, 0
        try:
            return run(*tensors, **settings)
        finally:
            fake_driver.device = current

    calls.run = on_the_first_device
    for fake_driver.device in (0, 0, 0, 1):
        calls(*inputs(), factor=3)
    assert calls.made == 3


def test_one_tensor_given_twice_is_not_recorded(calls):
    first, second = inputs()
    for _ in range(3):
        calls(first, first, factor=3)
    assert calls.made == 3
    for _ in range(2):
        calls(first, second, factor=3)
    assert calls.made == 4


def test_recordings_that_would_be_too_large_are_not_tried_again(fake_driver, monkeypatch):  # noqa: F811
    """Each plan has calls of its own; what was too large for one is for the next, if its inputs are not smaller."""
    fake_driver.bodies = {"scale": emulated_scale}
    original = recording._RecordedCall

    def recorded_if_small(recorder, results):
        # The emulated kernels are operations of PyTorch, which see scratch memory as tensors.
        if results[0].nbytes > 1024:
            raise recording._TooLargeError
        if results[0].shape == (8, 2):
            raise _NotRepeatableError
        return original(recorder, results)

    monkeypatch.setattr(recording, "_too_large", {})
    monkeypatch.setattr(recording, "_RecordedCall", recorded_if_small)

    def made(shape, **settings) -> int:
        calls = Calls()
        for _ in range(4):
            calls(*inputs(shape), **settings)
        return calls.made

    # A recording in vain is one call more.
    assert [made(shape, factor=3) for shape in ((8, 40), (8, 40), (8, 48))] == [5, 4, 4]
    assert [made(shape, factor=3) for shape in ((8, 33), (8, 33), (8, 8))] == [5, 4, 2]
    assert [made((8, 40), factor=3), made((8, 40), factor=5), made((8, 8))] == [4, 5, 2]
    # What cannot be recorded for another reason says nothing about the size.
    assert [made((8, 2), factor=7), made((8, 4), factor=7)] == [5, 2]


def test_recordings_of_a_kernel_share_what_python_compiles():
    """Numbers that differ between recordings, such as offsets and addresses of constants, are no part of the code."""

    def misses(size: int) -> int:
        before, constant = recording._compiled.cache_info().misses, torch.randn(size)

        def with_an_offset(first, second):
            kept = first.new_empty(2, size)
            launch(first, second, kept[1], size, 2.0 + size)
            launch(constant, second, kept[0], size, 2.0)
            return [kept]

        assert record(with_an_offset, torch.randn(size), torch.randn(size))[0]
        return recording._compiled.cache_info().misses - before

    misses(6)
    assert misses(12) == misses(44) == 0
