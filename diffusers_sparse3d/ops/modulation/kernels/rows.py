"""What the kernels share: how tokens and the rows of their samples are addressed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2


# Values of a tile of tokens.
_TILE_VALUES = 4096


@triton.jit
def sample_of(index, index_stride, rows, valid, rows_per_sample):
    """The sample `[ROWS]` int32 of each row: read from `index`, or of equal parts where that is None."""
    if index is None:
        return rows // rows_per_sample
    else:
        return tl.load(index + rows.to(tl.int64) * index_stride, mask=valid, other=0).to(tl.int32)


@triton.jit
def load_tile(pointer, rows, stride, channels, mask):
    """`[ROWS, CHANNELS]` float32 values of rows that are `stride` values apart; zeros where masked."""
    places = pointer + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, rows, stride, channels, values, mask):
    """The counterpart of `load_tile`, in the dtype of the pointer."""
    places = pointer + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    tl.store(places, values.to(pointer.dtype.element_ty), mask=mask)


def tile_of(num_channels: int) -> dict[str, int]:
    """Compile-time arguments: channels of a token and their padding, tokens of a tile, warps."""
    channels = next_power_of_2(num_channels)
    rows = max(1, _TILE_VALUES // channels)
    return {"C": num_channels, "CHANNELS": channels, "ROWS": rows, "num_warps": 4 if channels <= 4096 else 8}


def index_of(index: Tensor | None, num_rows: int, batch_size: int) -> tuple[Tensor | None, int, int]:
    """The arguments of `sample_of` on the host: index, its stride, rows of a sample where there is no index."""
    return index, 1 if index is None else index.stride(0), max(1, num_rows // batch_size)


def with_whole_rows(values: Tensor) -> Tensor:
    """`[B, C]` whose rows are contiguous; they may be apart, as views of a wider tensor are."""
    return values if values.stride(1) == 1 else values.contiguous()
