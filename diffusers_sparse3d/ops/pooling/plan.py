"""Tables that the pooling kernels derive from the coordinates alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


# Disabled for `torch.compile`: the lookup of a plan that does not exist yet breaks the graph. A call whose plan exists
# does not reach this function, and is traced as a whole.
@torch.compiler.disable
def _make_plan(cache: CoordinateCache, factor: int) -> tuple[Tensor, Tensor, Tensor]:
    coarse, parents = cache.downsample(factor)
    parents = parents.int()
    ordered, order = parents.sort(stable=True)
    numbers = torch.arange(coarse.coords.shape[0] + 1, dtype=torch.int32, device=parents.device)
    return parents, order.int(), torch.searchsorted(ordered, numbers, out_int32=True)


def plan_pooling(cache: CoordinateCache, factor: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of the operator, all int32, made at the first call for a cache.

    Returns:
        `parents [N]`, the coarse row of each row; `order [N]`, the rows grouped by parent; `starts [M + 1]`, where the
        rows of each parent start.
    """
    return cache.derived(("pooling", factor), lambda: _make_plan(cache, factor))
