"""What the convolution kernels derive from the coordinates alone: the order of the rows, and which offsets they have.

A tile of rows works on the offsets that at least one of its rows has. In the order in which voxels usually come, most
tiles of a surface have nearly all 27 although a row has about half of them. Sorted by the bit mask of their offsets,
the rows of a tile mostly agree. That saves matrix products, and costs a sort, a permuted copy of the map and locality:
it is for wide layers, whose time is matrix products. The gradient of their weights takes each offset by itself, so it
needs lists of the rows that have it instead, which keep their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel


if TYPE_CHECKING:
    from ....sparse_tensor import CoordinateCache


NUM_OFFSETS = 27
# The others are opposite to these.
LISTED_OFFSETS = 14
_TILE_ROWS = 512


@Kernel
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
        _mask_kernel[(cdiv(num_rows, _TILE_ROWS),)](neighbours, masks, num_rows, NUM_OFFSETS, _TILE_ROWS)
    return masks


class ConvPlan(NamedTuple):
    """How the kernels go through the voxels.

    Attributes:
        neighbours: `[27, N]` int32 in the order of the plan, N where there is none; its values are rows of the input.
        order: `[N]` int32, the rows in the order of the plan; None if that is the order of the input.
        masks: `[N]` int32 in the order of the plan, bit k for offset k; None if rows are not sorted by it.
    """

    neighbours: Tensor
    order: Tensor | None = None
    masks: Tensor | None = None

    @classmethod
    def make(cls, neighbours: Tensor, by_mask: bool) -> ConvPlan:
        neighbours = neighbours.contiguous()
        if not by_mask:
            return cls(neighbours)
        masks, order = offset_masks(neighbours).sort(stable=True)
        return cls(neighbours.index_select(1, order), order.int(), masks)

    @classmethod
    def of(cls, cache: CoordinateCache, by_mask: bool) -> ConvPlan:
        """The plan of these coordinates, made once."""
        return cache.derived(("sparse_conv", by_mask), lambda: cls.make(cache.neighbour_map(), by_mask))

    @property
    def num_rows(self) -> int:
        return self.neighbours.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there: `ConvPlan(*tensors)` is the same plan."""
        return tuple(tensor for tensor in self if tensor is not None)


@Kernel
@triton.jit
def _pairs_kernel(neighbours, ends, input_rows, output_rows, num_rows, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1).to(tl.int64) * num_rows
    found = tl.load(neighbours + start + rows, mask=rows < num_rows, other=num_rows)
    exists = found < num_rows
    places = tl.load(ends + start + rows, mask=exists, other=1) - 1
    tl.store(input_rows + places, found, mask=exists)
    tl.store(output_rows + places, rows, mask=exists)


@on_device_of_first_argument
def neighbour_pairs(neighbours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[27, N]` neighbour map -> what `GradientPlan` has of pairs, without a transfer to the host."""
    num_rows = neighbours.shape[1]
    exists = neighbours[:LISTED_OFFSETS] < num_rows
    # One scan of all offsets: if it were one for each, each would run on one multiprocessor.
    ends = exists.flatten().cumsum(0, dtype=torch.int32)
    starts = torch.nn.functional.pad(exists.sum(1).cumsum(0), (1, 0)).int()
    input_rows, output_rows = (torch.empty_like(ends) for _ in range(2))
    if num_rows:
        grid = (cdiv(num_rows, _TILE_ROWS), LISTED_OFFSETS)
        _pairs_kernel[grid](neighbours, ends, input_rows, output_rows, num_rows, _TILE_ROWS)
    return input_rows, output_rows, starts


class GradientPlan(NamedTuple):
    """How the gradient of the weights goes through the voxels.

    Attributes:
        neighbours: `[27, N]` int32, N where there is none.
        input_rows, output_rows: `[14 N]` int32, for the offsets 0 to 13, one after the other, the rows of all
            neighbours and of the voxels that have them, in the order of the voxels; what follows the last pair is not
            defined. Offset 26 - k has the pairs of offset k the other way round. None if it goes through the map.
        starts: `[15]` int32, where each offset's pairs begin, and where the last one's end.
    """

    neighbours: Tensor
    input_rows: Tensor | None = None
    output_rows: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def make(cls, neighbours: Tensor, by_pairs: bool) -> GradientPlan:
        neighbours = neighbours.contiguous()
        if not by_pairs:
            return cls(neighbours)
        return cls(neighbours, *neighbour_pairs(neighbours))

    @classmethod
    def of(cls, cache: CoordinateCache, by_pairs: bool) -> GradientPlan:
        """The plan of these coordinates, made once."""
        key = ("sparse_conv weight gradient", by_pairs)
        return cache.derived(key, lambda: cls.make(cache.neighbour_map(), by_pairs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there: `GradientPlan(*tensors)` is the same plan."""
        return tuple(tensor for tensor in self if tensor is not None)
