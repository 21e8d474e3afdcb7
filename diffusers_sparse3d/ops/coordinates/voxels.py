"""Integer voxel coordinates: validation, keys, distinct voxels, coarser and finer grids.

Coordinates are `[N, 4]` int32 rows (batch, x, y, z) with 0 <= x, y, z < 2048. A row is encoded as one int64 key whose
order is the lexicographic order of the row, so that sorting and searching need one tensor operation each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_at_least


MAX_RESOLUTION = 2048
# Exclusive upper bound of batch indices: tables have a row for each sample up to the last one.
MAX_SAMPLES = 1 << 16

# Bits of an axis in a key: one more than MAX_RESOLUTION needs, and coordinates are stored plus one, so that keys stay
# distinct one step outside the grid.
AXIS_BITS = 12
AXIS_STEPS = (1 << 2 * AXIS_BITS, 1 << AXIS_BITS, 1)


def check_voxel_rows(coords: Tensor, name: str = "coords") -> None:
    """Check that `coords` are integers of shape `[N, 4]`; their values are not looked at.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has another shape or no integers.
    """
    if not isinstance(coords, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(coords).__name__}")
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point() or coords.is_complex():
        raise ValueError(
            f"`{name}` must be integers of shape [N, 4] (batch, x, y, z), got {coords.dtype} {list(coords.shape)}."
        )


def check_coords(coords: Tensor, resolution: int | None = None, name: str = "coords") -> int:
    """Check that `coords` is a valid set of voxels. One wait for the GPU; rows are sorted only if not ascending.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z).
        resolution: exclusive upper bound of x, y and z; 2048 if None.
        name: what the error messages call the argument.

    Returns:
        The number of samples: one more than the highest batch index.

    Raises:
        ValueError: if the type, dtype or shape is wrong, a coordinate is out of range, or a voxel occurs twice.
    """
    if not isinstance(coords, Tensor) or coords.dtype != torch.int32:
        raise ValueError(f"`{name}` must be an int32 tensor, got {getattr(coords, 'dtype', type(coords))}")
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"`{name}` must have shape [N, 4] (batch, x, y, z), got {list(coords.shape)}")
    if coords.is_meta:
        raise ValueError(f"`{name}` must have values, got a tensor on the device meta")
    if coords.shape[0] == 0:
        return 0
    resolution = MAX_RESOLUTION if resolution is None else resolution
    keys = encode_coords(coords)
    ascending = (keys[1:] > keys[:-1]).all()
    facts = torch.cat([*torch.aminmax(coords, dim=0), ascending.int().view(1)]).tolist()
    lowest, highest, is_ascending = facts[:4], facts[4:8], facts[8]
    if min(lowest) < 0:
        raise ValueError(f"`{name}` must be non-negative, got columns that start at {lowest}")
    if max(highest[1:]) >= resolution:
        raise ValueError(f"`{name}` must lie below the resolution {resolution}, got columns that end at {highest}")
    if highest[0] >= MAX_SAMPLES:
        raise ValueError(f"`{name}` must have batch indices below {MAX_SAMPLES}, got {highest[0]}")
    if not is_ascending:
        keys = keys.sort().values
        duplicates = int((keys[1:] == keys[:-1]).sum())
        if duplicates:
            raise ValueError(f"`{name}` must have each voxel once, got {duplicates} duplicate rows")
    return int(highest[0]) + 1


def encode_coords(coords: Tensor) -> Tensor:
    """`[N, 4]` coordinates, each axis in -1..4094 -> `[N]` int64 keys in lexicographic order of the rows."""
    batch, x, y, z = coords.long().unbind(1)
    step_x, step_y, _ = AXIS_STEPS
    return (batch << 3 * AXIS_BITS) + (x + 1) * step_x + (y + 1) * step_y + (z + 1)


def decode_coords(keys: Tensor) -> Tensor:
    """The inverse of `encode_coords`: `[N]` int64 keys -> `[N, 4]` int32 coordinates."""
    mask = (1 << AXIS_BITS) - 1
    columns = [keys >> 3 * AXIS_BITS] + [(keys >> shift & mask) - 1 for shift in (2 * AXIS_BITS, AXIS_BITS, 0)]
    return torch.stack(columns, 1).int()


def unique_coords(coords: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of `[N, 4]` coordinates.

    Returns:
        `[M, 4]` int32 coordinates in ascending order, and for each input row its place among them, `[N]` int64.

    Raises:
        TypeError, ValueError: if `coords` is no tensor of integers of this shape.
    """
    check_voxel_rows(coords)
    keys, inverse = torch.unique(encode_coords(coords), return_inverse=True)
    return decode_coords(keys), inverse


def downsample_coords(coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The voxels of the grid that is coarser by `factor`.

    Returns:
        `[M, 4]` int32 coarse coordinates in ascending order, and the coarse row of each input row, `[N]` int64.

    Raises:
        TypeError, ValueError: if `coords` is no tensor of integers of this shape, or `factor` none from 1 to 2048.
    """
    check_voxel_rows(coords)
    check_at_least(1, factor=factor)
    if factor > MAX_RESOLUTION:
        raise ValueError(f"`factor` must be at most {MAX_RESOLUTION}, got {factor}")
    coarse = torch.cat([coords[:, :1], coords[:, 1:].div(factor, rounding_mode="floor")], 1)
    return unique_coords(coarse)


def subdivide_coords(coords: Tensor) -> Tensor:
    """`[N, 4]` -> `[8 N, 4]`: the eight children of voxel i are rows 8 i + j, j = 4 x + 2 y + z inside the voxel."""
    children = torch.arange(8, dtype=coords.dtype, device=coords.device)
    corner = torch.stack([torch.zeros_like(children), children >> 2, children >> 1 & 1, children & 1], 1)
    # Without numbers from the host, for which it would wait.
    doubled = torch.cat([coords[:, :1], 2 * coords[:, 1:]], 1)
    return (doubled[:, None] + corner).reshape(-1, 4)
