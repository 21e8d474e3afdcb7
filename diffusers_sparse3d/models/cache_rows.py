"""Whether a cache is that of the rows that a model is called with, found without waiting for a GPU."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..sparse_tensor import CoordinateCache
from .host_flags import HostCopy


class RowComparison:
    """
    The comparison of two sets of rows, which a GPU makes in its own time.

    Args:
        expected: rows of integers.
        found: the rows to compare with them, of the same shape on the same device.

    Attributes:
        same: whether they are equal, a boolean tensor of shape `[]` on their device.
    """

    def __init__(self, expected: Tensor, found: Tensor):
        self.same = (expected == found).all()
        self._copy = HostCopy(self.same) if self.same.is_cuda else None

    def result(self) -> bool | None:
        """Whether the rows are the same; None while the GPU has not come to it."""
        return bool(self.same) if self._copy is None else self._copy.value()


class LastComparison:
    """The last tensor that the rows of a cache were compared with: further calls with it cost nothing."""

    def __init__(self) -> None:
        self._comparison: RowComparison | None = None
        self._coords: weakref.ref[Tensor] | None = None
        self._version: int | None = None

    def with_rows(self, expected: Tensor, coords: Tensor) -> RowComparison:
        """The comparison of `expected`, which are always those of the cache, with `coords`."""
        version = None if coords.is_inference() else coords._version
        # Tensors of inference mode have no versions: they may have been changed.
        is_known = version is not None and self._coords is not None and self._coords() is coords
        is_known = is_known and self._version == version
        if self._comparison is None or not is_known:
            self._comparison = RowComparison(expected, coords)
            self._coords, self._version = weakref.ref(coords), version
        return self._comparison


def compare_rows(name: str, cache: CoordinateCache | None, coords: Tensor | None) -> Tensor | None:
    """
    Compare the rows of a cache with those of a call, without waiting for a GPU.

    Args:
        name: of the argument that is the cache, which ends in "cache".
        cache: the argument, of as many rows as `coords`.
        coords: `[N, 4]`, the rows of the call.

    Returns:
        None if they are known to be the same, or nothing can be said, as in a call that is traced or captured; else
        whether they are the same, a tensor that the GPU has yet to compute, for `nan_unless`.

    Raises:
        ValueError: naming the argument if the rows are known to differ: at once on a CPU, and on a GPU in the next
            call that finds the comparison done.
    """
    if cache is None or coords is None or torch.compiler.is_compiling() or coords.is_meta:
        return None
    check_not_stale(name, cache)
    if cache.coords is coords or (coords.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    comparison = cache.derived("last comparison", LastComparison).with_rows(cache.coords, coords)
    result = comparison.result()
    if result is False:
        raise_foreign(name)
    return None if result else comparison.same


def nan_unless(values: Tensor, *conditions: Tensor | None) -> Tensor:
    """The values, all NaN where a condition turns out false: no number of a wrong cache looks like a right one.

    Args:
        values: floating point, of any shape.
        conditions: of `compare_rows`.
    """
    for condition in conditions:
        if condition is not None:
            values = torch.where(condition, values, torch.nan)
    return values


def check_not_stale(name: str, cache: CoordinateCache) -> None:
    """Raise a ValueError that names the argument if the coordinates of the cache were changed in place."""
    if cache.is_stale:
        raise ValueError(f"`{name}` must be made anew: its `coords` have been changed in place since it was made")


def raise_foreign(name: str) -> None:
    """Raise the ValueError about a cache of other rows."""
    raise ValueError(f"`{name}` must be that of `{name.replace('cache', 'coords')}`, got one of other rows")
