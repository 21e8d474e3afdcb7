"""Lists of neighbouring voxels, one list per offset."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel


# Offsets 0 to 13 are listed: 26 - k is the opposite of k, and 13 is its own.
LISTED_OFFSETS = 14
_TILE_ROWS = 512


@Kernel
@triton.jit
def _pairs_kernel(neighbours, ends, input_rows, output_rows, num_rows, ROWS: tl.constexpr):
    """The pairs of a tile of voxels at one offset.

    Args:
        neighbours: `[27, N]` int32, N where there is none.
        ends: `[14 N]` int32, how many pairs there are up to and with each entry of the first 14 offsets.
        input_rows: `[14 N]` int32, written: the neighbours, without gaps.
        output_rows: `[14 N]` int32, written: the voxels that have them.
        num_rows: N, the voxels.
        ROWS: voxels of a tile.
    """
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1).to(tl.int64) * num_rows
    found = tl.load(neighbours + start + rows, mask=rows < num_rows, other=num_rows)
    exists = found < num_rows
    places = tl.load(ends + start + rows, mask=exists, other=1) - 1
    tl.store(input_rows + places, found, mask=exists)
    tl.store(output_rows + places, rows, mask=exists)


@on_device_of_first_argument
def neighbour_pairs(neighbours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of neighbours at the offsets 0 to 13, without a transfer to the host.

    Args:
        neighbours: `[27, N]` int32, contiguous.

    Returns:
        `input_rows`, `output_rows` and `starts` of `plan.GradientPlan`.
    """
    num_rows = neighbours.shape[1]
    exists = neighbours[:LISTED_OFFSETS] < num_rows
    # One scan of all offsets: a scan of each would run on one multiprocessor.
    ends = exists.flatten().cumsum(0, dtype=torch.int32)
    starts = torch.nn.functional.pad(exists.sum(1).cumsum(0), (1, 0)).int()
    input_rows, output_rows = (torch.empty_like(ends) for _ in range(2))
    if num_rows:
        grid = (cdiv(num_rows, _TILE_ROWS), LISTED_OFFSETS)
        _pairs_kernel[grid](neighbours, ends, input_rows, output_rows, num_rows, ROWS=_TILE_ROWS)
    return input_rows, output_rows, starts
