"""Booleans in memory of the host that a GPU writes to by itself, allocated ahead of their use."""

from __future__ import annotations

import functools
import weakref
from collections import deque

import torch
from torch import Tensor


# Flags of one allocation, each a byte.
FLAGS_PER_BLOCK = 4096


class HostFlags:
    """
    A stock of flags in page-locked memory, which any number of threads may take from.

    CUDA may allocate such memory only when all work on the GPU is done, so it is allocated by the block: the first
    flag of a block may be waited for, the others are not.

    A flag that was returned may still be written to: its owner may go before the GPU has come to its copy. Another
    stream may even run that copy after the next owner's, which would then read the answer to a question that is not
    its own. A flag is therefore taken again only when the event behind its last copy has passed.

    Deques append and pop without a lock, so a flag may also be returned by the garbage collector, in the midst of
    `take` of the same thread. Two threads that find the stock empty allocate a block each, which does no harm.
    """

    def __init__(self) -> None:
        self._free = deque[Tensor]()
        self._returned = deque[tuple[Tensor, torch.cuda.Event]]()

    def take(self) -> Tensor:
        """A flag that nothing writes to, a boolean tensor of shape `[]`."""
        while True:
            try:
                return self._free.popleft()
            except IndexError:
                if not self._collect():
                    self._free.extend(self._allocate())

    def give_back(self, flag: Tensor, event: torch.cuda.Event) -> None:
        """Return a flag, with an event that passes when nothing writes to it any more."""
        self._returned.append((flag, event))

    def _collect(self) -> bool:
        """Whether a flag that was returned has become free."""
        for _ in range(len(self._returned)):
            try:
                flag, event = self._returned.popleft()
            except IndexError:  # another thread has taken it
                break
            if event.query():
                self._free.append(flag)
                return True
            self._returned.append((flag, event))
        return False

    def _allocate(self) -> tuple[Tensor, ...]:
        # Tensors of inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty(FLAGS_PER_BLOCK, dtype=torch.bool, pin_memory=True).unbind()


@functools.cache
def host_flags() -> HostFlags:
    """The stock of this process, for all GPUs: page-locked memory can be written to by each of them."""
    return HostFlags()


class HostCopy:
    """
    A copy of a flag on a GPU, which the GPU makes in its own time.

    Args:
        flag: a boolean tensor of shape `[]` on a GPU, computed on the current stream of that GPU.
    """

    def __init__(self, flag: Tensor):
        stock, self._event = host_flags(), torch.cuda.Event()
        self._flag = stock.take()
        self._flag.copy_(flag, non_blocking=True)
        self._event.record(torch.cuda.current_stream(flag.device))
        # At the end of this copy, not when it is first read: threads may read it together.
        weakref.finalize(self, stock.give_back, self._flag, self._event).atexit = False

    def value(self) -> bool | None:
        """The value of the flag; None while the GPU has not come to the copy."""
        return bool(self._flag) if self._event.query() else None
