"""Launches of kernels: the first of a kind by triton, the others without it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diffusers_sparse3d.ops.runtime.launch import Kernel, _add_kinds

from ..kernel_testing import DEVICE, needs_gpu


@triton.jit
def _add_kernel(source, other, target, count, factor, SIZE: tl.constexpr, NEGATIVE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = places < count
    values = tl.load(source + places, mask=mask) * factor
    if other is not None:
        values += tl.load(other + places, mask=mask)
    if NEGATIVE:
        values = -values
    tl.store(target + places, values, mask=mask)


class Sources(NamedTuple):
    SIZE: tl.constexpr
    pair: tuple[torch.Tensor, torch.Tensor | None]


@triton.jit
def _add_pair_kernel(sources, target, count):
    first, second = sources.pair
    places = tl.program_id(0) * sources.SIZE + tl.arange(0, sources.SIZE)
    mask = places < count
    values = tl.load(first + places, mask=mask)
    if second is not None:
        values += tl.load(second + places, mask=mask)
    tl.store(target + places, values, mask=mask)


def cases():
    """Source, other and factor: of two dtypes, not aligned, without other, of one element."""
    numbers = torch.arange(65.0, device=DEVICE)
    return [
        (numbers, numbers.flip(0), 2.0),
        (numbers[1:], numbers[:-1], 2.0),
        (numbers[:64], numbers[1:], 2.0),
        (numbers, None, -0.5),
        (numbers.half(), numbers.half(), 3.0),
        (numbers[5:6], numbers[:1], 1.0),
        (numbers[:16], numbers[:16], 4.0),
        (numbers, numbers, 3),
    ]


def check(kernel, source, other, factor, **constants):
    target = torch.empty_like(source)
    kernel[(triton.cdiv(len(source), 16),)](source, other, target, len(source), factor, SIZE=16, **constants)
    expected = source * factor + (0 if other is None else other)
    assert torch.equal(target, -expected if constants["NEGATIVE"] else expected)


def test_kinds_of_arguments_are_told_apart():
    kernel = Kernel(_add_kernel)
    assert kernel.__name__ == "_add_kernel"
    for _ in range(3):
        for negative in (False, True):
            for case in cases():
                check(kernel, *case, NEGATIVE=negative)


@needs_gpu
def test_further_launches_go_past_triton(monkeypatch):
    kernel, launches = Kernel(_add_kernel), []
    original = triton.runtime.JITFunction.run
    monkeypatch.setattr(
        triton.runtime.JITFunction,
        "run",
        lambda *arguments, **settings: (launches.append(1), original(*arguments, **settings))[1],
    )
    for _ in range(3):
        for case in cases():
            check(kernel, *case, NEGATIVE=True)
    assert len(launches) == len(cases())


def test_what_is_not_known_goes_through_triton():
    assert not _add_kinds((1, (True,)), [])
    kinds = []
    assert _add_kinds((torch.zeros(2), 1, 16, 17, 2**31, 2**31 + 1, None, 0.5), kinds)
    assert kinds == [torch.float32, 1, 3, 2, 5, 4, None, float]


def test_aggregates():
    kernel = Kernel(_add_pair_kernel)
    numbers = torch.arange(65.0, device=DEVICE)
    for _ in range(3):
        for size in (tl.constexpr(16), tl.constexpr(32)):
            for first, second in [(numbers, numbers.flip(0)), (numbers[1:], numbers[:-1]), (numbers, None)]:
                target = torch.empty_like(first)
                sources = Sources(size, (first, second))
                kernel[(triton.cdiv(len(first), size.value),)](sources, target, len(first))
                assert torch.equal(target, first + (0 if second is None else second))


@needs_gpu
def test_launches_on_the_current_stream():
    kernel, source = Kernel(_add_kernel), torch.ones(1 << 20, device=DEVICE)
    check(kernel, source, None, 2.0, NEGATIVE=False)
    graph, target = torch.cuda.CUDAGraph(), torch.empty_like(source)
    with torch.cuda.graph(graph):
        kernel[(1 << 16,)](source, None, target, len(source), 2.0, SIZE=16, NEGATIVE=False)
    source.fill_(4.0)
    graph.replay()
    assert torch.equal(target, torch.full_like(target, 8.0))
