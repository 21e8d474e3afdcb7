"""Compressed keys of every sample, and the selection blocks that they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...runtime.dispatch import cdiv, next_power_of_2
from .arguments import SMALLEST, CompressedKeys, HeadShape, TileShape
from .segment_plan import segment_tiles


if TYPE_CHECKING:
    from ....sparse_tensor import CoordinateCache
    from ...coordinates import Partition


class CompressionPlan(NamedTuple):
    """The compressed keys of each sample, and the selection blocks that they are in.

    Attributes:
        order: `[N]` int64, the queries grouped by sample; None if they are.
        tiles: of the samples, as `segment_tiles` makes them.
        cu_keys: `[B + 1]` int32, where the compressed keys of each sample start.
        members: `[M, C]`, one where a key's slot is among the up to C of its tile, else zero.
        key_slots: `[M + 1]` int32, the slot of each key, and at the end how many there are.
        slot_tiles: `[slots]` int32, the tile that each slot is from, among those of the sample.
        block_slots: `[num_blocks + 1]` int32, where the slots of each selection block start.
        cu_blocks: `[B + 1]` int32, where the selection blocks of each sample start.
        most_keys, most_slots, most_blocks: of a sample.
        most_block_slots: of a selection block.
        shape: of the tiles.
    """

    order: Tensor | None
    tiles: Tensor
    cu_keys: Tensor
    members: Tensor
    key_slots: Tensor
    slot_tiles: Tensor
    block_slots: Tensor
    cu_blocks: Tensor
    most_keys: int
    most_slots: int
    most_blocks: int
    most_block_slots: int
    shape: TileShape

    @property
    def pointers(self) -> CompressedKeys:
        """The tensors that the kernel finds slots and blocks by."""
        return CompressedKeys(
            self.cu_keys, self.members, self.key_slots, self.slot_tiles, self.block_slots, self.cu_blocks
        )

    @classmethod
    def make(
        cls,
        selection: Partition,
        compressed: CoordinateCache,
        ratio: int,
        heads: HeadShape,
        shape: TileShape,
        dtype: torch.dtype,
    ) -> CompressionPlan:
        """`selection` has the voxels in blocks of `ratio`^3 voxels of `compressed`."""
        blocks = compressed.partition(ratio)
        cu_keys, device = compressed.cu_seqlens, selection.order.device
        in_order = torch.equal(selection.order, torch.arange(len(selection.order), device=device))
        cu_queries = selection.cu_seqlens[selection.batch_cu_blocks.long()]
        # Slots start where a block or a tile does.
        places = torch.arange(int(cu_keys[-1]), device=device) - torch.repeat_interleave(
            cu_keys[:-1], cu_keys.diff(), output_size=int(cu_keys[-1])
        )
        starts = places % shape.keys == 0
        starts[blocks.cu_seqlens[:-1].long()] = True
        slots = torch.cat([starts.cumsum(0) - 1, starts.sum(0, keepdim=True)]).int()
        first_keys = starts.nonzero().squeeze(1)
        first_of_tile = slots[torch.arange(len(places), device=device) - places % shape.keys]
        numbers = (slots[:-1] - first_of_tile).long()
        # As narrow as possible, which is the smallest edge for most shapes.
        columns = max(SMALLEST, next_power_of_2(1 + int(numbers.max())))
        members = torch.nn.functional.one_hot(numbers, columns).to(dtype)
        block_slots = slots[blocks.cu_seqlens.long()]
        return cls(
            None if in_order else selection.order,
            segment_tiles(cu_queries, heads.tokens(shape.rows)),
            cu_keys,
            members,
            slots,
            (places[first_keys] // shape.keys).int(),
            block_slots,
            selection.batch_cu_blocks,
            most_keys=compressed.batch_partition().max_seqlen,
            most_slots=int(slots[cu_keys.long()].diff().max()),
            most_blocks=selection.most_blocks,
            # Not what these blocks have: kernels are compiled for it.
            most_block_slots=cdiv(ratio**3 - 1, shape.keys) + 1,
            shape=shape,
        )
