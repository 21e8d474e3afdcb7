"""Tables that the group norm kernels derive from the coordinates alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


class GroupNormPlan(NamedTuple):
    """Which rows belong to which sample.

    Attributes:
        coords: `[N, 4]` int32, contiguous; the first column is the sample.
        cu_rows: `[B + 1]` int32, where each sample starts in the order.
        order: `[N]` int32, the rows sample by sample; None if there is one sample.
    """

    coords: Tensor
    cu_rows: Tensor
    order: Tensor | None


# Disabled for `torch.compile`: the lookup of a plan that does not exist yet breaks the graph. A call whose plan exists
# does not reach this function, and is traced as a whole.
@torch.compiler.disable
def _make_plan(cache: CoordinateCache) -> tuple[Tensor, Tensor, Tensor | None]:
    coords = cache.coords.contiguous()
    boundaries = torch.arange(cache.batch_size + 1, dtype=torch.int32, device=coords.device)
    if cache.batch_size == 1:
        return coords, boundaries * coords.shape[0], None
    batch, order = coords[:, 0].sort(stable=True)
    return coords, torch.searchsorted(batch, boundaries, out_int32=True), order.int()


def plan_group_norm(cache: CoordinateCache) -> tuple[Tensor, Tensor, Tensor | None]:
    """The fields of the `GroupNormPlan` of these coordinates, made at the first call for a cache."""
    return cache.derived("group_norm", lambda: _make_plan(cache))
