"""Tables that the convolution kernels derive from the coordinates alone. They need the package triton.

A tile of rows works on the offsets that at least one of its rows has. In the order in which voxels usually come, most
tiles of a surface have nearly all 27 although a row has about half of them. Sorted by the bit mask of their offsets,
the rows of a tile mostly agree. That saves matrix products, and costs a sort, a permuted copy of the map and locality:
it is for wide layers, whose time is matrix products. The gradient of their weights takes each offset by itself, so it
goes through lists of the pairs of neighbours instead, which keep the order of the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kernels.convolution import convolution_shape
from .kernels.neighbour_pairs import neighbour_pairs
from .kernels.offset_masks import offset_masks
from .kernels.weight_gradient import gradient_shape


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


class ConvolutionPlan(NamedTuple):
    """The order in which the forward kernel goes through the voxels.

    Attributes:
        neighbours: `[27, N]` int32 in the order of the plan, N where there is none; its values are rows of the input.
        order: `[N]` int32, the rows in the order of the plan; None if that is the order of the input.
        masks: `[N]` int32 in the order of the plan, bit k for offset k; None if rows are not sorted by it.
    """

    neighbours: Tensor
    order: Tensor | None = None
    masks: Tensor | None = None

    @classmethod
    def make(cls, neighbours: Tensor, by_mask: bool) -> ConvolutionPlan:
        """The plan of a `[27, N]` neighbour map, with rows sorted by their masks or in their own order."""
        neighbours = neighbours.contiguous()
        if not by_mask:
            return cls(neighbours)
        masks, order = offset_masks(neighbours).sort(stable=True)
        return cls(neighbours.index_select(1, order), order.int(), masks)

    @classmethod
    def of(cls, cache: CoordinateCache, by_mask: bool) -> ConvolutionPlan:
        """The plan of these coordinates, made once."""
        return cache.derived(("sparse_conv", by_mask), lambda: cls.make(cache.neighbour_map(), by_mask))

    @property
    def num_rows(self) -> int:
        """Number of voxels."""
        return self.neighbours.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tables that exist: `ConvolutionPlan(*tensors)` is the same plan."""
        return tuple(tensor for tensor in self if tensor is not None)


class GradientPlan(NamedTuple):
    """The pairs of voxels that the gradient of the weights goes through.

    Attributes:
        neighbours: `[27, N]` int32, N where there is none.
        input_rows: `[14 N]` int32, for the offsets 0 to 13, one after the other, the rows of all neighbours; entries
            after the last pair are not defined. Offset 26 - k has the pairs of offset k the other way round. None if
            the gradient goes through the map.
        output_rows: `[14 N]` int32, the rows of the voxels that have these neighbours, ascending for each offset.
        starts: `[15]` int32, where each offset's pairs begin, and where the last one's end.
    """

    neighbours: Tensor
    input_rows: Tensor | None = None
    output_rows: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def make(cls, neighbours: Tensor, by_pairs: bool) -> GradientPlan:
        """The plan of a `[27, N]` neighbour map, with lists of pairs or with the map alone."""
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
        """The tables that exist: `GradientPlan(*tensors)` is the same plan."""
        return tuple(tensor for tensor in self if tensor is not None)


# Disabled for `torch.compile`: the lookup of a plan that does not exist yet breaks the graph. A call whose plans exist
# does not reach these functions, and is traced as a whole.
@torch.compiler.disable
def _make_plan(cache: CoordinateCache, in_channels: int, out_channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return ConvolutionPlan.of(cache, convolution_shape(in_channels, out_channels, dtype).by_mask).tensors


@torch.compiler.disable
def _make_gradient_plan(
    cache: CoordinateCache, in_channels: int, out_channels: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return GradientPlan.of(cache, gradient_shape(in_channels, out_channels, dtype).by_pairs).tensors


def plan_convolution(
    cache: CoordinateCache, weight: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tables that the operator of a layer takes, made at the first call for a cache.

    Args:
        cache: of the coordinates.
        weight: `[27, Cin, Cout]`, or any tensor of this shape that requires a gradient if that does.
        dtype: of the features.

    Returns:
        `ConvolutionPlan.tensors` of the output and of the gradient of the features, and `GradientPlan.tensors`; the
        latter is empty where no gradient of the weights is wanted.
    """
    in_channels, out_channels = weight.shape[1:]
    # Keys of strings and numbers, since `torch.compile` looks them up too.
    key = ("sparse_conv layer", in_channels, out_channels, dtype)
    plan = cache.derived(key, lambda: _make_plan(cache, in_channels, out_channels, dtype))
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return plan, ()
    key = ("sparse_conv weight gradient of a layer", in_channels, out_channels, dtype)
    return plan, cache.derived(key, lambda: _make_gradient_plan(cache, in_channels, out_channels, dtype))
