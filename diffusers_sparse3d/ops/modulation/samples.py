"""Which sample of a batch each token belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_at_least


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


@dataclass(frozen=True)
class SampleRows:
    """The sample of each row of `[N, C]` tokens.

    Attributes:
        batch_size: B.
        index: `[N]` integer, the sample of each row, of any stride; None if the rows are B equal parts, one after the
            other.
        cu_rows: `[B + 1]` int32, where each sample starts in `order`; None where `index` is.
        order: `[N]` int32, the rows grouped by sample; None if they are grouped already.

    Raises:
        TypeError, ValueError: if `batch_size` is no integer of at least 0, or `index` is none of
            integers `[N]`.
    """

    batch_size: int
    index: Tensor | None = None
    cu_rows: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        check_at_least(0, batch_size=self.batch_size)
        if self.index is None:
            return
        if not isinstance(self.index, Tensor):
            raise TypeError(f"`index` must be a tensor, got {type(self.index).__name__}")
        if self.index.ndim != 1 or self.index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`index` must be integers of shape [N], got {self.index.dtype} {list(self.index.shape)}")

    @classmethod
    def of(cls, cache: CoordinateCache) -> SampleRows:
        """The samples of packed tokens, derived from their coordinates once; `cache` keeps them."""
        return cache.derived("sample_rows", lambda: _sample_rows(cache))


# Tracing would end at the sort. Nothing of this runs where it is derived before.
@torch.compiler.disable
def _sample_rows(cache: CoordinateCache) -> SampleRows:
    if cache.batch_size == 1:
        return SampleRows(1)
    index, boundaries = cache.coords[:, 0], torch.arange(cache.batch_size + 1, device=cache.coords.device)
    batch, order = index.sort(stable=True)
    cu_rows = torch.searchsorted(batch, boundaries.to(batch.dtype), out_int32=True)
    return SampleRows(cache.batch_size, index, cu_rows, order.int())
