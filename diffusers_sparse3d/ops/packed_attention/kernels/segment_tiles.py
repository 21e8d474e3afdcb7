"""Segments cut into tiles, without a transfer to the host."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _tiles_kernel(cu_seqlens, tiles, num_segments, num_rows, SIZE: tl.constexpr, PLACES: tl.constexpr):
    """The tiles of one segment.

    Args:
        cu_seqlens: `[S + 1]` int32, where each segment starts.
        tiles: `[num_rows // SIZE + S + 1, 3]` int32, written: segment, first row, row after the last.
        num_segments: S.
        num_rows: rows of all segments, and of none.
        SIZE: rows of a tile.
        PLACES: tiles that are written at once.
    """
    segment = tl.program_id(0)
    first = tl.load(cu_seqlens + segment)
    end = num_rows
    if segment < num_segments:
        end = tl.load(cu_seqlens + segment + 1)
    # The next segment's places start where these end. There are as many as tiles, or one more.
    first_place, end_place = first // SIZE + segment, end // SIZE + segment + 1
    for begin in range(first_place, end_place, PLACES):
        # [PLACES]
        places = begin + tl.arange(0, PLACES)
        start = tl.minimum(first + (places - first_place) * SIZE, end)
        tile, valid = tiles + 3 * places, places < end_place
        tl.store(tile, tl.where(start < end, segment, num_segments), mask=valid)
        tl.store(tile + 1, start, mask=valid)
        tl.store(tile + 2, tl.minimum(start + SIZE, end), mask=valid)


@on_device_of_first_argument
def segment_tiles(cu_seqlens: Tensor, num_rows: int, size: int) -> Tensor:
    """Segments cut into tiles of at most `size` rows, with tiles of no rows among them.

    The number of tiles is the largest that the lengths of the segments can lead to, so the host need not know them.

    Args:
        cu_seqlens: `[S + 1]` int32, where each segment starts. Rows after the last one count as a segment S.
        num_rows: of all segments.
        size: rows of a tile.

    Returns:
        `[num_rows // size + S + 1, 3]` int32: segment, first row, row after the last. Tiles without rows are of
        segment S.
    """
    num_segments = len(cu_seqlens) - 1
    tiles = cu_seqlens.new_empty(num_rows // size + num_segments + 1, 3)
    _tiles_kernel[(num_segments + 1,)](cu_seqlens, tiles, num_segments, num_rows, SIZE=size, PLACES=64, num_warps=1)
    return tiles
