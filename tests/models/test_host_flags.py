"""Flags that a GPU writes to are allocated ahead, and taken again only when nothing writes to them any more."""

import gc
import threading

import pytest
import torch

from diffusers_sparse3d.models import host_flags
from diffusers_sparse3d.models.host_flags import HostCopy, HostFlags


class Event:
    """An event of a GPU that comes to it when `passed` is set."""

    def __init__(self):
        self.passed, self.stream = False, None

    def record(self, stream):
        self.stream = stream

    def query(self):
        return self.passed


@pytest.fixture
def blocks(monkeypatch):
    """Allocations of page-locked memory, each the number of its flags, on a machine that has none; three at a time."""
    allocate, sizes = torch.empty, []

    def empty(size, *, pin_memory, **options):
        assert pin_memory
        sizes.append(size)
        return allocate(size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(host_flags, "FLAGS_PER_BLOCK", 3)
    host_flags.host_flags.cache_clear()
    yield sizes
    host_flags.host_flags.cache_clear()


@pytest.fixture
def events(monkeypatch):
    """The events that copies are marked with."""
    made = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: made.append(Event()) or made[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return made


def address(flag):
    return flag.data_ptr()


def test_only_the_first_flag_of_a_block_allocates(blocks):
    flags = HostFlags()
    taken = [flags.take() for _ in range(3)]
    assert blocks == [3] and len(set(map(address, taken))) == 3
    assert all(flag.shape == () and flag.dtype == torch.bool for flag in taken)
    flags.take()
    assert blocks == [3, 3]


def test_flags_are_taken_again_when_their_event_has_passed(blocks):
    flags, events = HostFlags(), [Event(), Event(), Event()]
    taken = [flags.take() for _ in range(3)]
    for flag, event in zip(taken, events, strict=True):
        flags.give_back(flag, event)
    events[1].passed = True  # that of another stream than those before and after it
    assert address(flags.take()) == address(taken[1])
    assert address(flags.take()) not in map(address, taken)
    assert blocks == [3, 3]
    flags.take(), flags.take()
    events[0].passed = events[2].passed = True
    assert {address(flags.take()) for _ in range(2)} == {address(taken[0]), address(taken[2])}
    assert blocks == [3, 3]


def test_a_copy_is_unknown_until_its_event_passes(blocks, events):
    for answer in (True, False):
        copy = HostCopy(torch.tensor(answer))
        assert copy.value() is None
        events[-1].passed = True
        assert copy.value() is answer
        assert events[-1].stream == "stream of cpu"  # of the flag's device, whichever is the current one


def test_a_copy_keeps_its_flag_while_it_lives_and_returns_it_with_its_event(blocks, events):
    first = HostCopy(torch.tensor(True))
    place = address(first._flag)
    events[0].passed = True
    assert first.value() is True
    others = [HostCopy(torch.tensor(False)) for _ in range(5)]
    assert first.value() is True and place not in {address(other._flag) for other in others}
    assert blocks == [3, 3]
    events[0].passed = False
    del first
    gc.collect()
    others.append(HostCopy(torch.tensor(False)))
    assert address(others[-1]._flag) != place and blocks == [3, 3, 3]
    others += [HostCopy(torch.tensor(False)) for _ in range(2)]
    events[0].passed = True
    assert address(HostCopy(torch.tensor(False))._flag) == place and blocks == [3, 3, 3]


@pytest.mark.parametrize("inference", [True, False])
def test_flags_of_inference_mode_serve_other_calls(blocks, events, inference):
    with torch.inference_mode(inference):
        HostCopy(torch.tensor(True))
    with torch.inference_mode(not inference):
        copy = HostCopy(torch.tensor(True))
    events[-1].passed = True
    assert copy.value() is True and blocks == [3]


def test_threads_never_share_a_flag(blocks, events):
    wrong = []

    def compare(answer):
        for _ in range(500):
            copy = HostCopy(torch.tensor(answer))
            copy._event.passed = True
            if copy.value() is not answer:
                wrong.append(answer)

    threads = [threading.Thread(target=compare, args=(bool(number % 2),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(blocks) < 10
