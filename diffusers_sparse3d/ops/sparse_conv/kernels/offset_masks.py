"""Bit masks of the neighbours that voxels have."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import Kernel
from .common import NUM_OFFSETS


_TILE_ROWS = 512


@Kernel
@triton.jit
def _mask_kernel(neighbours, masks, num_rows, OFFSETS: tl.constexpr, ROWS: tl.constexpr):
    """The masks of a tile of voxels.

    Args:
        neighbours: `[27, N]` int32, N where there is none.
        masks: `[N]` int32, written.
        num_rows: N, the voxels.
        OFFSETS: 27.
        ROWS: voxels of a tile.
    """
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    mask = tl.zeros((ROWS,), tl.int32)
    for offset in range(OFFSETS):
        mask |= (tl.load(neighbours + rows, mask=valid, other=0) < num_rows).to(tl.int32) << offset
        neighbours += num_rows
    tl.store(masks + rows, mask, mask=valid)


@on_device_of_first_argument
def offset_masks(neighbours: Tensor) -> Tensor:
    """`[27, N]` neighbour map -> `[N]` int32: bit k says that the voxel has a neighbour at offset k."""
    num_rows = neighbours.shape[1]
    masks = torch.empty(num_rows, dtype=torch.int32, device=neighbours.device)
    if num_rows:
        _mask_kernel[(cdiv(num_rows, _TILE_ROWS),)](neighbours, masks, num_rows, OFFSETS=NUM_OFFSETS, ROWS=_TILE_ROWS)
    return masks
