"""What the convolution kernels derive from the coordinates alone: the order of the rows, and which offsets they have.

A tile of rows works on the offsets that at least one of its rows has. In the order in which voxels usually come, most
tiles of a surface have nearly all 27 although a row has about half of them. Sorted by the bit mask of their offsets,
the rows of a tile mostly agree. That saves matrix products, and costs a sort, a permuted copy of the map and locality:
it is for wide layers, whose time is matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_dispatch import on_device_of_first_argument


if TYPE_CHECKING:
    from ....sparse_tensor import CoordinateCache


NUM_OFFSETS = 27
_MASK_ROWS = 512


@triton.jit
def _mask_kernel(neighbours, masks, num_rows, NUM_OFFSETS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    mask = tl.zeros((ROWS,), tl.int32)
    for offset in range(NUM_OFFSETS):
        mask |= (tl.load(neighbours + rows, mask=valid, other=0) < num_rows).to(tl.int32) << offset
        neighbours += num_rows
    tl.store(masks + rows, mask, mask=valid)


@on_device_of_first_argument
def offset_masks(neighbours: Tensor) -> Tensor:
    """`[27, N]` neighbour map -> `[N]` int32: bit k says that the voxel has a neighbour at offset k."""
    num_rows = neighbours.shape[1]
    masks = torch.empty(num_rows, dtype=torch.int32, device=neighbours.device)
    if num_rows:
        _mask_kernel[(triton.cdiv(num_rows, _MASK_ROWS),)](neighbours, masks, num_rows, NUM_OFFSETS, _MASK_ROWS)
    return masks


class ConvPlan(NamedTuple):
    """How the kernels go through the voxels.

    Attributes:
        neighbours: `[27, N]` int32 in the order of the plan, N where there is none; its values are rows of the input.
        order: `[N]` int32, the rows in the order of the plan; None if that is the order of the input.
        masks: `[N]` int32 in the order of the plan, bit k for offset k; None if rows are not sorted by it.
        tile_lists: `[27, tiles]` int32 of tiles of a number of rows: those with offset k come first, in ascending
            order. For the gradient of the weights alone; None if rows are not sorted by their masks.
        tile_counts: `[27]` int32, how many tiles have offset k.
    """

    neighbours: Tensor
    order: Tensor | None = None
    masks: Tensor | None = None
    tile_lists: Tensor | None = None
    tile_counts: Tensor | None = None

    @classmethod
    def make(cls, neighbours: Tensor, by_mask: bool) -> ConvPlan:
        """Without lists of tiles."""
        neighbours = neighbours.contiguous()
        if not by_mask:
            return cls(neighbours)
        masks, order = offset_masks(neighbours).sort(stable=True)
        return cls(neighbours.index_select(1, order), order.int(), masks)

    @classmethod
    def of(cls, cache: CoordinateCache, by_mask: bool, tile_rows: int | None = None) -> ConvPlan:
        """The plan of these coordinates, made once; with lists of tiles of so many rows where `by_mask`."""
        if not by_mask or tile_rows is None:
            return cache.derived(("sparse_conv", by_mask), lambda: cls.make(cache.neighbour_map(), by_mask))
        return cache.derived(
            ("sparse_conv tiles", tile_rows), lambda: cls.of(cache, by_mask).with_tile_lists(tile_rows)
        )

    def with_tile_lists(self, tile_rows: int) -> ConvPlan:
        present = self.neighbours < self.num_rows
        present = torch.nn.functional.pad(present, (0, -self.num_rows % tile_rows))
        present = present.view(NUM_OFFSETS, -1, tile_rows).any(-1)
        tiles = torch.argsort(present.byte(), dim=1, descending=True, stable=True)
        return self._replace(tile_lists=tiles.int(), tile_counts=present.sum(1, dtype=torch.int32))

    @property
    def num_rows(self) -> int:
        return self.neighbours.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there: `ConvPlan(*tensors)` is the same plan."""
        return tuple(tensor for tensor in self if tensor is not None)
