"""The plan of compressed attention: compressed keys grouped by selection block, and their slots."""

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


# Sums over more slots than this would not fit in the registers.
_MOST_COLUMNS = 32


class CompressionPlan(NamedTuple):
    """The compressed keys of each sample, grouped by selection block, and their slots.

    A tile of keys may end inside a block. The keys that a tile has of a block are a slot: slots start wherever a block
    or a tile does.

    Attributes:
        order: `[N]` int64, the queries grouped by sample; None if they are.
        tiles: `[tiles, 3]` int32, the queries of the samples cut into tiles, see `segment_tiles`.
        cu_keys, members, key_slots, slot_tiles, block_slots, cu_blocks: see `CompressedKeys`.
        most_keys: compressed keys of the largest sample.
        most_slots: slots of the sample with most of them.
        most_blocks: selection blocks of the sample with most of them.
        most_block_slots: slots that a selection block can have.
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
        """The plan of the compressed keys of some tokens.

        Args:
            selection: the tokens in selection blocks.
            compressed: the cells of the compression blocks.
            ratio: edge of a selection block, in compression blocks.
            heads: sizes.
            shape: of the tiles; with fewer keys where these would have too many slots.
            dtype: of query and keys.
        """
        blocks = compressed.partition(ratio)
        cu_keys, device = compressed.cu_seqlens, selection.order.device
        in_order = torch.equal(selection.order, torch.arange(len(selection.order), device=device))
        cu_queries = selection.cu_seqlens[selection.batch_cu_blocks.long()]
        # The place of each key in its sample.
        places = torch.arange(int(cu_keys[-1]), device=device) - torch.repeat_interleave(
            cu_keys[:-1], cu_keys.diff(), output_size=int(cu_keys[-1])
        )
        starts, numbers = _slots(places, blocks.cu_seqlens, shape.keys)
        columns = _columns(numbers)
        if columns > _MOST_COLUMNS:
            # Blocks with hardly a key each, as noise has them.
            shape = shape._replace(keys=_MOST_COLUMNS)
            starts, numbers = _slots(places, blocks.cu_seqlens, shape.keys)
            columns = _columns(numbers)
        slots = torch.cat([starts.cumsum(0) - 1, starts.sum(0, keepdim=True)]).int()
        first_keys = starts.nonzero().squeeze(1)
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
            # An upper bound, not the number of these blocks, because kernels are compiled for it.
            most_block_slots=cdiv(ratio**3 - 1, shape.keys) + 1,
            shape=shape,
        )


def _slots(places: Tensor, cu_blocks: Tensor, tile_size: int) -> tuple[Tensor, Tensor]:
    """Where slots start, and the slot of each key among those of its tile.

    Args:
        places: `[M]` int64, the place of each compressed key in its sample.
        cu_blocks: `[num_blocks + 1]` int32, the first key of each selection block.
        tile_size: keys of a tile.

    Returns:
        `[M]` bool and `[M]` int64.
    """
    starts = places % tile_size == 0
    starts[cu_blocks[:-1].long()] = True
    slots = starts.cumsum(0)
    first_of_tile = slots[torch.arange(len(places), device=places.device) - places % tile_size]
    return starts, slots - first_of_tile


def _columns(numbers: Tensor) -> int:
    """The edge of a product that sums over the slots of a tile; for most tile shapes it is the smallest there is."""
    return max(SMALLEST, next_power_of_2(1 + int(numbers.max())))
