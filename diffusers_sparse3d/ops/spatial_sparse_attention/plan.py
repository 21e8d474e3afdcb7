"""Everything that the kernels of Spatial Sparse Attention take from the coordinates of the tokens. Needs triton.

A plan holds the orders of the tokens and compressed keys, the boundaries of samples, blocks and windows, the lists of
tiles, and the tile shapes they were made for. It is made at the first call for a `CoordinateCache`, which keeps it.
Making it waits for the GPU; using it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..runtime.recording import RepeatedCalls
from .kernels.arguments import AttentionShapes, HeadShape
from .kernels.compression_plan import CompressionPlan
from .kernels.key_rows import KeyOrders
from .kernels.segment_plan import SegmentPlan
from .kernels.selection_plan import SelectionPlan
from .kernels.tile_shapes import TileShapes, shapes_for


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache
    from ..coordinates import Partition


# A plan as tensors and integers, which is what an operator of PyTorch can take while `torch.compile` traces it.
FlatPlan: TypeAlias = tuple[tuple[Tensor, ...], tuple[int, ...]]


class BlockSizes(NamedTuple):
    """How the voxels are divided.

    Attributes:
        compression: edge of a compression block, in voxels.
        selection: edge of a selection block, a multiple of `compression`.
        window: edge of a window.
        window_shift: added to the coordinates before they are divided into windows.
    """

    compression: int
    selection: int
    window: int
    window_shift: int


class _PlanFields(NamedTuple):
    """The contents of a `Plan`: tensors, then integers, then the numbers of the tile shapes.

    N tokens, M compressed keys and B samples; orders list row numbers.

    Attributes:
        order: `[N]` int64, the tokens grouped by selection block.
        inverse: `[N]` int64, the position of each token in `order`.
        cu_blocks: `[blocks + 1]` int32, where each selection block starts in `order`.
        cu_tokens: `[B + 1]` int32, where each sample starts in `order`.
        cu_compressed: `[B + 1]` int32, where the compressed keys of each sample start.
        compressed_tiles: `[tiles, 3]` int32, tiles of queries of the forward pass of compressed attention; like all
            lists of tiles as in `SegmentPlan`.
        compressed_backward_tiles: the same of its backward pass.
        compressed_key_tiles: `[tiles, 3]` int32, tiles of compressed keys.
        members: as in `CompressionPlan`, like the next four.
        key_slots, slot_tiles, block_slots, cu_sample_blocks: as in `CompressionPlan`.
        compressed_order: `[M]` int64, the compressed keys grouped by selection block.
        compressed_inverse: `[M]` int64, the position of each compressed key in `compressed_order`.
        window_order: `[N]` int64, the tokens grouped by window.
        window_inverse: `[N]` int64, the position of each token in `window_order`.
        cu_windows: `[windows + 1]` int32, where each window starts in `window_order`.
        window_tiles, window_backward_tiles, window_key_tiles: the lists of tiles of window attention.
        most_keys, most_slots, most_blocks, most_block_slots: as in `CompressionPlan`.
        largest_block: number of tokens of the largest selection block.
        in_order: 1 if the tokens already are in the order of `order`, else 0.
        shape_numbers: `TileShapes.numbers` of the shapes for which the lists of tiles were made.
    """

    order: Tensor
    inverse: Tensor
    cu_blocks: Tensor
    cu_tokens: Tensor
    cu_compressed: Tensor
    compressed_tiles: Tensor
    compressed_backward_tiles: Tensor
    compressed_key_tiles: Tensor
    members: Tensor
    key_slots: Tensor
    slot_tiles: Tensor
    block_slots: Tensor
    cu_sample_blocks: Tensor
    compressed_order: Tensor
    compressed_inverse: Tensor
    window_order: Tensor
    window_inverse: Tensor
    cu_windows: Tensor
    window_tiles: Tensor
    window_backward_tiles: Tensor
    window_key_tiles: Tensor
    most_keys: int
    most_slots: int
    most_blocks: int
    most_block_slots: int
    largest_block: int
    in_order: int
    shape_numbers: tuple[int, ...]


# The integers between the tensors and `shape_numbers`.
_NUM_INTEGERS = 6


class Plan(_PlanFields):
    """The plan of one set of coordinates for all three branches.

    The parts that the kernels take are put together at their first use and kept, so a call costs the host little.
    """

    @classmethod
    def of(cls, tensors: Plan | Sequence[Tensor], sizes: Sequence[int]) -> Plan:
        """The plan from its flat form; a `Plan` given in place of the tensors is returned as it is."""
        if isinstance(tensors, Plan):
            return tensors
        return cls._make((*tensors, *sizes[:_NUM_INTEGERS], tuple(sizes[_NUM_INTEGERS:])))

    @property
    def flat(self) -> FlatPlan:
        """The arguments of `of`."""
        fields: tuple[Any, ...] = self[:-1]
        return fields[:-_NUM_INTEGERS], (*fields[-_NUM_INTEGERS:], *self.shape_numbers)

    @property
    def shapes(self) -> TileShapes:
        """The tile shapes for which the lists of tiles were made."""
        return TileShapes.from_numbers(self.shape_numbers)

    @functools.cached_property
    def calls(self) -> RepeatedCalls:
        """The recorded calls of the operator for these coordinates."""
        return RepeatedCalls()

    @functools.cached_property
    def query_order(self) -> Tensor | None:
        """`[N]` int64, the tokens grouped by selection block, and so by sample; None if they are already."""
        return None if self.in_order else self.order

    @functools.cached_property
    def orders(self) -> KeyOrders:
        """The row orders in which the branches read keys and values."""
        return KeyOrders(self.window_order, self.compressed_order, self.query_order)

    @functools.cached_property
    def inverses(self) -> KeyOrders:
        """The inverses of `orders`, which bring gradients back to the rows of the caller."""
        return KeyOrders(self.window_inverse, self.compressed_inverse, self.inverse)

    @functools.cached_property
    def compression(self) -> CompressionPlan:
        """The plan of compressed attention and of the choice of the selection blocks."""
        return CompressionPlan(
            self.query_order,
            self.compressed_tiles,
            self.cu_compressed,
            self.members,
            self.key_slots,
            self.slot_tiles,
            self.block_slots,
            self.cu_sample_blocks,
            self.most_keys,
            self.most_slots,
            self.most_blocks,
            self.most_block_slots,
            self.shapes.compressed_forward,
        )

    @functools.cached_property
    def compressed(self) -> SegmentPlan:
        """The plan of the gradients of compressed attention; a segment is a sample."""
        tiles = (self.compressed_tiles, self.compressed_backward_tiles, self.compressed_key_tiles)
        shapes = self.shapes.of("compressed")
        return SegmentPlan(self.query_order, self.cu_tokens, self.cu_compressed, *tiles, shapes)

    @functools.cached_property
    def selection(self) -> SelectionPlan:
        """The plan of the attention to the chosen selection blocks."""
        return SelectionPlan(self.order, self.inverse, self.cu_blocks, self.largest_block, self.shapes.of("selection"))

    @functools.cached_property
    def window(self) -> SegmentPlan:
        """The plan of window attention; a segment is a window."""
        tiles = (self.window_tiles, self.window_backward_tiles, self.window_key_tiles)
        shapes = self.shapes.of("window")
        return SegmentPlan(self.window_order, self.cu_windows, self.cu_windows, *tiles, shapes)


def compression_plan(
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    heads: HeadShape,
    shapes: TileShapes,
    dtype: torch.dtype,
) -> tuple[SegmentPlan, CompressionPlan, Partition]:
    """Plans of compressed attention: of its gradients, of its forward pass, and the order of the compressed keys.

    Args:
        cache: the coordinates of the tokens; it keeps the result.
        compression_block_size, selection_block_size: edges of the blocks in voxels.
        heads: sizes of the heads.
        shapes: tile shapes of the kernels.
        dtype: of queries, keys and values.

    Returns:
        The segments (samples) for the gradients, the plan of the forward pass, and the partition of the compressed
        keys into selection blocks.
    """

    def make() -> tuple[SegmentPlan, CompressionPlan, Partition]:
        selection = cache.partition(selection_block_size)
        compressed, _ = cache.downsample(compression_block_size)
        ratio = selection_block_size // compression_block_size
        forward = CompressionPlan.make(selection, compressed, ratio, heads, shapes.compressed_forward, dtype)
        cu_queries = selection.cu_seqlens[selection.batch_cu_blocks.long()]
        segments = SegmentPlan.make(
            forward.order, cu_queries, compressed.cu_seqlens, heads, shapes.of("compressed"), forward.tiles
        )
        return segments, forward, compressed.partition(ratio)

    # The key is text because `torch.compile` of older versions cannot compare keys that hold instances of classes.
    key = repr(("ssa compression", compression_block_size, selection_block_size, heads, shapes, dtype))
    return cache.derived(key, make)


def window_plan(
    cache: CoordinateCache, window_size: int, window_shift: int, heads: HeadShape, shapes: AttentionShapes
) -> SegmentPlan:
    """The plan of attention inside the windows (x, y, z + `window_shift`) // `window_size`; `cache` keeps it."""

    def make() -> SegmentPlan:
        windows = cache.partition(window_size, window_shift)
        return SegmentPlan.make(windows.order, windows.cu_seqlens, windows.cu_seqlens, heads, shapes)

    return cache.derived(repr(("ssa window", window_size, window_shift, heads, shapes)), make)


def make_plan(
    cache: CoordinateCache, sizes: BlockSizes, heads: HeadShape, shapes: TileShapes, dtype: torch.dtype
) -> Plan:
    """A new plan of the coordinates in `cache`, of at least one token.

    Args:
        cache: the coordinates of the tokens; it keeps the parts of the plan.
        sizes: edges of blocks and windows.
        heads: sizes of the heads.
        shapes: tile shapes of the kernels.
        dtype: of queries, keys and values.
    """
    segments, forward, compressed = compression_plan(cache, sizes.compression, sizes.selection, heads, shapes, dtype)
    window = window_plan(cache, sizes.window, sizes.window_shift, heads, shapes.of("window"))
    selection, windows = cache.partition(sizes.selection), cache.partition(sizes.window, sizes.window_shift)
    return Plan(
        order=selection.order,
        inverse=selection.inverse,
        cu_blocks=selection.cu_seqlens,
        cu_tokens=segments.cu_queries,
        cu_compressed=segments.cu_keys,
        compressed_tiles=segments.query_tiles,
        compressed_backward_tiles=segments.backward_query_tiles,
        compressed_key_tiles=segments.key_tiles,
        members=forward.members,
        key_slots=forward.key_slots,
        slot_tiles=forward.slot_tiles,
        block_slots=forward.block_slots,
        cu_sample_blocks=forward.cu_blocks,
        compressed_order=compressed.order,
        compressed_inverse=compressed.inverse,
        window_order=windows.order,
        window_inverse=windows.inverse,
        cu_windows=windows.cu_seqlens,
        window_tiles=window.query_tiles,
        window_backward_tiles=window.backward_query_tiles,
        window_key_tiles=window.key_tiles,
        most_keys=forward.most_keys,
        most_slots=forward.most_slots,
        most_blocks=forward.most_blocks,
        most_block_slots=forward.most_block_slots,
        largest_block=selection.max_seqlen,
        in_order=int(forward.order is None),
        # Compressed attention may have got a shape of its own.
        shape_numbers=shapes._replace(compressed_forward=forward.shape).numbers,
    )


# Making a plan waits for the GPU, which cannot be traced. Under `torch.compile`, the plan has to be made before.
@torch.compiler.disable
def _make_flat_plan(cache: CoordinateCache, sizes: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> FlatPlan:
    shapes = shapes_for(heads, dtype, cache.coords.device)
    return make_plan(cache, BlockSizes(*sizes), heads, shapes, dtype).flat


def flat_plan(cache: CoordinateCache, sizes: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> FlatPlan:
    """The plan as tensors and integers, made at the first call for a cache.

    Args:
        cache: the coordinates of at least one token; it keeps the plan.
        sizes: the fields of `BlockSizes`.
        heads: sizes of the heads.
        dtype: of queries, keys and values.
    """
    return cache.derived(_plan_key("flat", sizes, heads, dtype), lambda: _make_flat_plan(cache, sizes, heads, dtype))


def whole_plan(cache: CoordinateCache, sizes: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> Plan:
    """The plan with its parts and recorded calls, made at the first call for a cache; arguments as in `flat_plan`."""
    return cache.derived(
        _plan_key("whole", sizes, heads, dtype), lambda: Plan.of(*flat_plan(cache, sizes, heads, dtype))
    )


def _plan_key(form: str, sizes: Sequence[int], heads: HeadShape, dtype: torch.dtype) -> tuple[Any, ...]:
    # Numbers and no instances of classes, because `torch.compile` looks the key up too.
    return ("ssa", form, *sizes, *heads, dtype)
