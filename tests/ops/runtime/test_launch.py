"""Launches of kernels: what is compiled is told apart, and launched without triton, with the arguments it takes."""

import warnings
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

from diffusers_sparse3d.ops.runtime import launch, runtime_settings
from diffusers_sparse3d.ops.runtime.launch import Kernel, listening

from ..kernel_testing import DEVICE, needs_gpu
from .fake_driver import compiled_function, fake_driver, on_gpu  # noqa: F401 - a fixture


class Sources(NamedTuple):
    SIZE: tl.constexpr
    pair: tuple[torch.Tensor, torch.Tensor | None]
    count: int


def add(source, other, target, count, factor, SIZE: tl.constexpr, NEGATIVE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = places < count
    values = tl.load(source + places, mask=mask) * factor
    if other is not None:
        values += tl.load(other + places, mask=mask)
    if NEGATIVE:
        values = -values
    tl.store(target + places, values, mask=mask)


def add_pair(sources, target):
    first, second = sources.pair
    places = tl.program_id(0) * sources.SIZE + tl.arange(0, sources.SIZE)
    mask = places < sources.count
    values = tl.load(first + places, mask=mask)
    if second is not None:
        values += tl.load(second + places, mask=mask)
    tl.store(target + places, values, mask=mask)


def emulated_add(grid, source, other, target, count, factor, size, negative):
    assert grid == (triton.cdiv(count, size), 1, 1)
    values = source(count) * factor + (0 if other is None else other(count))
    target(count).copy_(-values if negative else values)


def emulated_add_pair(grid, sources, target):
    size, (first, second), count = sources
    assert grid == (triton.cdiv(count, size), 1, 1)
    target(count).copy_(first(count) + (0 if second is None else second(count)))


def cases(numbers):
    """Source, other and factor: of two dtypes, not aligned, without other, of one element and of multiples of 16."""
    return [
        (numbers, numbers.flip(0), 2.0),
        (numbers[1:], numbers[:-1], 2.0),
        (numbers[:64], numbers[1:], 2.0),
        (numbers, None, -0.5),
        (numbers.double(), numbers.double(), 3.0),
        (numbers[5:6], numbers[:1], 1.0),
        (numbers[:16], numbers[:16], 4.0),
        (numbers, numbers, 3),
        (numbers, numbers, 1),
    ]


def check_add(kernel, source, other, factor, **constants):
    target = torch.empty_like(source)
    kernel[(triton.cdiv(len(source), 16),)](source, other, target, len(source), factor, SIZE=16, **constants)
    expected = source * factor + (0 if other is None else other)
    assert torch.equal(target, -expected if constants["NEGATIVE"] else expected)


def check_add_pair(kernel, first, second, size):
    target = torch.empty_like(first)
    kernel[(triton.cdiv(len(first), size.value),)](Sources(size, (first, second), len(first)), target)
    assert torch.equal(target, first + (0 if second is None else second))


@pytest.fixture
def gpu(fake_driver):  # noqa: F811
    fake_driver.bodies = {"add": emulated_add, "add_pair": emulated_add_pair}
    return fake_driver


@pytest.fixture
def kernel():
    return Kernel(compiled_function(add))


@pytest.fixture
def runs(monkeypatch):
    """A list of the keyword arguments of each launch that triton's own launcher did."""
    entries, original = [], triton.runtime.JITFunction.run

    def run(*arguments, **settings):
        entries.append(settings)
        return original(*arguments, **settings)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    return entries


NUMBERS = torch.arange(68.0)[:65]


def test_each_kind_of_launch_is_compiled_once(kernel, gpu, runs):
    for _ in range(3):
        for gpu.device in (0, 1):
            for negative in (False, True):
                for case in cases(on_gpu(NUMBERS, gpu.device)):
                    check_add(kernel, *case, NEGATIVE=negative)
    assert len(runs) == len(gpu.compiled) == 2 * 2 * 9
    assert len(gpu.launched) == 3 * 2 * 2 * 9


def test_numbers_that_are_taken_as_they_come_compile_nothing_again(gpu, runs):
    """A kernel for 65 elements is that for 16 and for one, too; the launcher learns each kind of number once."""
    kernel = Kernel(JITFunction(add, do_not_specialize=["count"]))
    for _ in range(3):
        for count in (65, 16, 1, 17):
            numbers = on_gpu(NUMBERS[:count])
            check_add(kernel, numbers, numbers, 2.0, NEGATIVE=True)
    assert gpu.compiled == ["add"] and len(gpu.launched) == 12
    assert len(runs) == 3


def test_each_kind_of_aggregate_is_compiled_once(gpu, runs):
    kernel, numbers = Kernel(compiled_function(add_pair)), on_gpu(NUMBERS)
    for _ in range(3):
        for size in (tl.constexpr(16), tl.constexpr(32)):
            for case in [(numbers, numbers.flip(0)), (numbers[1:], numbers[:-1]), (numbers, None)]:
                check_add_pair(kernel, *case, size)
    check_add_pair(kernel, numbers.double(), numbers.double(), tl.constexpr(16))
    check_add_pair(kernel, numbers[:16], numbers[:16], tl.constexpr(16))
    assert len(runs) == len(gpu.compiled) == 2 * 3 + 2
    assert len(gpu.launched) == 3 * 2 * 3 + 2


def test_constants_are_told_apart_by_their_names(gpu):
    def choose(target, FIRST: tl.constexpr, SECOND: tl.constexpr):
        tl.store(target, FIRST)

    gpu.bodies["choose"] = lambda grid, target, first, second: target(1).fill_(first)
    kernel, target = Kernel(compiled_function(choose)), on_gpu(torch.zeros(1))
    for _ in range(2):
        kernel[(1,)](target, FIRST=1, SECOND=2)
        assert target == 1
        kernel[(1,)](target, SECOND=1, FIRST=2)
        assert target == 2


def test_options_of_the_compiler_are_told_apart(kernel, gpu):
    for _ in range(2):
        for warps in (2, 4):
            check_add(kernel, on_gpu(NUMBERS), None, 2.0, NEGATIVE=False, num_warps=warps)
    assert len(gpu.compiled) == 2


def test_integers_are_told_apart_as_triton_does(gpu):
    gpu.bodies["keep"] = lambda grid, target, number: target(1).fill_(number)

    def keep(target, number):
        tl.store(target, number)

    kernel, target = Kernel(compiled_function(keep)), on_gpu(torch.zeros(2, dtype=torch.int64))
    for _ in range(2):
        for number in (16, 17, 1, 32, 0, -16, -3, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -(2**31), -(2**31) - 1):
            kernel[(1,)](target, number)
            assert target[0] == number
    assert len(gpu.launched) == 2 * 13


@pytest.mark.parametrize("way", ["switched off", "unknown version", "other runner", "unknown type"])
def test_launches_through_triton(way, kernel, gpu, runs, monkeypatch):
    launch._knows_triton.cache_clear()
    factor = 2.0
    if way == "unknown version":
        monkeypatch.setattr(triton, "__version__", "3.99.0")
    elif way == "other runner":
        monkeypatch.setattr(launch, "_runner_fits", lambda: False)
    elif way == "unknown type":
        factor = True
        gpu.bodies["add"] = lambda *_: None
    heard = []
    with warnings.catch_warnings(record=True) as caught, listening(lambda *heard_of: heard.append(heard_of)):
        warnings.simplefilter("always")
        for _ in range(3):
            source = on_gpu(NUMBERS)
            with runtime_settings(direct_launch=way != "switched off"):
                kernel[(5,)](source, None, torch.empty_like(source), 65, factor, SIZE=16, NEGATIVE=False)
    launch._knows_triton.cache_clear()
    assert len(runs) == 3 and [compiled for compiled, _ in heard] == [None] * 3
    warned = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(warned) == (way in ("unknown version", "other runner"))
    assert all(triton.__version__ in message or "3.99.0" in message for message in warned)


def test_the_probe_notices_another_runner(monkeypatch):
    assert launch._runner_fits()
    for runner in (
        lambda *arguments: None,  # takes no stream
        lambda *arguments, stream: None,  # launches otherwise
    ):
        monkeypatch.setattr(launch.CompiledKernel, "__getitem__", lambda self, grid, runner=runner: runner)
        assert not launch._runner_fits()


def test_nothing_is_kept_when_triton_returns_nothing(gpu, monkeypatch):
    """A hook may stop triton before it compiles: the next launch goes through triton again."""
    function = compiled_function(add)
    kernel, source = Kernel(function), on_gpu(NUMBERS)
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", lambda *arguments, **settings: None)
        kernel[(5,)](source, None, torch.empty_like(source), 65, 2.0, SIZE=16, NEGATIVE=False)
    check_add(kernel, source, None, 2.0, NEGATIVE=False)
    assert gpu.compiled == gpu.launched == ["add"]


def test_listeners_hear_of_launches_that_can_be_repeated(kernel, gpu):
    heard, numbers = [], on_gpu(NUMBERS)
    for _ in range(2):
        with listening(lambda *heard_of: heard.append(heard_of)):
            check_add(kernel, numbers, numbers, 2.0, NEGATIVE=True)
    check_add(kernel, numbers, numbers, 2.0, NEGATIVE=True)
    assert len(heard) == 2
    for compiled, arguments in heard:
        arguments[2].zero_()
        compiled(*arguments, stream=100)
        assert torch.equal(arguments[2], -3 * numbers)
        assert arguments[3:] == (65, 2.0, 16, True)


def test_operations_are_fused_whatever_the_default_of_triton_is(kernel, gpu, runs):
    check_add(kernel, on_gpu(NUMBERS), None, 2.0, NEGATIVE=False)
    assert [settings["enable_fp_fusion"] for settings in runs] == [True]


def test_results_where_kernels_run():
    """On a GPU if there is one, in triton's interpreter otherwise."""
    kernels, numbers = [Kernel(triton.jit(function)) for function in (add, add_pair)], NUMBERS.to(DEVICE)
    assert [kernel.__name__ for kernel in kernels] == ["add", "add_pair"]
    for _ in range(2):
        for case in cases(numbers):
            check_add(kernels[0], *case, NEGATIVE=True)
        for case in [(numbers, numbers.flip(0)), (numbers[1:], numbers[:-1]), (numbers, None)]:
            check_add_pair(kernels[1], *case, tl.constexpr(16))


@needs_gpu
def test_launches_on_the_current_stream():
    kernel, source = Kernel(triton.jit(add)), torch.ones(1 << 20, device=DEVICE)
    check_add(kernel, source, None, 2.0, NEGATIVE=False)
    graph, target = torch.cuda.CUDAGraph(), torch.empty_like(source)
    with torch.cuda.graph(graph):
        kernel[(1 << 16,)](source, None, target, len(source), 2.0, SIZE=16, NEGATIVE=False)
    source.fill_(4.0)
    graph.replay()
    assert torch.equal(target, torch.full_like(target, 8.0))
