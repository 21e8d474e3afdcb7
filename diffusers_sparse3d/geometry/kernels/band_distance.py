"""
Distance from grid samples to triangles in a narrow band, as kernels.

`../rasterized_distance.py` has the same in plain PyTorch. Here, triangles are not cut into pieces. The pairs of a
triangle and a tile of 4^3 samples in its bounding box are tested by the distance of the centre of the tile, one lane a
pair, and those that are near enough are listed. Then, each listed pair compares its 64 samples with the triangle.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.runtime.dispatch import cdiv, on_device_of_first_argument
from ...ops.runtime.launch import Kernel


# Samples per axis of a tile.
TILE = tl.constexpr(4)
# From the centre of a tile to its farthest sample, in spacings.
TILE_RADIUS = 3**0.5 * (TILE.value - 1) / 2
# Pairs of a triangle and a tile in one pass, of which the list takes 8 bytes each.
PAIR_CHUNK = 1 << 24
# Larger than the code of any distance, see `_nearest_kernel`.
UNKNOWN = torch.iinfo(torch.int64).max
# Lanes of a program, and listed pairs of a program.
LANES, PAIRS = tl.constexpr(128), tl.constexpr(4)
NUMBERS = ("num_triangles", "num_pairs", "num_found", "num_steps", "start", "stop", "resolution", "per_axis")


@triton.jit
def _closest_on_segment(px, py, pz, ax, ay, az, bx, by, bz):
    """The closest point of the segment from a to b to p, and its squared distance."""
    dx, dy, dz = bx - ax, by - ay, bz - az
    length = tl.maximum(dx * dx + dy * dy + dz * dz, 1e-30)
    place = ((px - ax) * dx + (py - ay) * dy + (pz - az) * dz) / length
    place = tl.minimum(tl.maximum(place, 0.0), 1.0)
    x, y, z = ax + place * dx, ay + place * dy, az + place * dz
    return x, y, z, (x - px) * (x - px) + (y - py) * (y - py) + (z - pz) * (z - pz)


@triton.jit
def _is_inside(px, py, pz, ax, ay, az, bx, by, bz, nx, ny, nz):
    """Whether p is on the inner side of the side from a to b of a triangle with the normal n."""
    ex, ey, ez = bx - ax, by - ay, bz - az
    x, y, z = px - ax, py - ay, pz - az
    return (ey * z - ez * y) * nx + (ez * x - ex * z) * ny + (ex * y - ey * x) * nz >= 0


@triton.jit
def _closest_on_triangle(px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz):
    """The closest point of the triangle a, b, c to p, and its squared distance; without area, that of its sides."""
    x, y, z, squared = _closest_on_segment(px, py, pz, ax, ay, az, bx, by, bz)
    x1, y1, z1, squared1 = _closest_on_segment(px, py, pz, bx, by, bz, cx, cy, cz)
    nearer = squared1 < squared
    x, y, z = tl.where(nearer, x1, x), tl.where(nearer, y1, y), tl.where(nearer, z1, z)
    squared = tl.where(nearer, squared1, squared)
    x2, y2, z2, squared2 = _closest_on_segment(px, py, pz, cx, cy, cz, ax, ay, az)
    nearer = squared2 < squared
    x, y, z = tl.where(nearer, x2, x), tl.where(nearer, y2, y), tl.where(nearer, z2, z)
    squared = tl.where(nearer, squared2, squared)

    ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    area = nx * nx + ny * ny + nz * nz
    inside = _is_inside(px, py, pz, ax, ay, az, bx, by, bz, nx, ny, nz)
    inside &= _is_inside(px, py, pz, bx, by, bz, cx, cy, cz, nx, ny, nz)
    inside &= _is_inside(px, py, pz, cx, cy, cz, ax, ay, az, nx, ny, nz)
    inside &= area > 1e-18
    height = ((px - ax) * nx + (py - ay) * ny + (pz - az) * nz) / tl.maximum(area, 1e-18)
    x, y, z = (
        tl.where(inside, px - height * nx, x),
        tl.where(inside, py - height * ny, y),
        tl.where(inside, pz - height * nz, z),
    )
    return x, y, z, tl.where(inside, height * height * area, squared)


@triton.jit
def _load_triangle(corners, triangle, valid):
    """The nine coordinates of triangles of `corners [F, 3, 3]`."""
    place = corners + triangle.to(tl.int64) * 9
    ax, ay, az = tl.load(place, valid, 0.0), tl.load(place + 1, valid, 0.0), tl.load(place + 2, valid, 0.0)
    bx, by, bz = tl.load(place + 3, valid, 0.0), tl.load(place + 4, valid, 0.0), tl.load(place + 5, valid, 0.0)
    cx, cy, cz = tl.load(place + 6, valid, 0.0), tl.load(place + 7, valid, 0.0), tl.load(place + 8, valid, 0.0)
    return ax, ay, az, bx, by, bz, cx, cy, cz


@triton.jit
def _tiles_along(a, b, c, reach, resolution):
    """The first tile along an axis that may hold a sample within reach of a triangle, and how many there are."""
    low = tl.ceil(tl.minimum(tl.minimum(a, b), c) - reach)
    high = tl.floor(tl.maximum(tl.maximum(a, b), c) + reach)
    first = tl.maximum(low, 0.0).to(tl.int32)
    last = tl.minimum(high, resolution - 1.0).to(tl.int32)
    return first // TILE, tl.where(last < first, 0, last // TILE - first // TILE + 1)


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _count_kernel(corners, limits, counts, num_triangles, resolution):
    """How many tiles the bounding box of each triangle, widened by the reach, has.

    Args:
        corners: `[F, 3, 3]` float64, in spacings.
        limits: `[3]` float64: the reach in spacings, and the squares of the farthest sample and tile.
        counts: `[F]` int64, written.
        num_triangles: F.
        resolution: samples per axis.
    """
    triangle = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = triangle < num_triangles
    ax, ay, az, bx, by, bz, cx, cy, cz = _load_triangle(corners, triangle, valid)
    reach = tl.load(limits)
    _, width = _tiles_along(ax, bx, cx, reach, resolution)
    _, height = _tiles_along(ay, by, cy, reach, resolution)
    _, depth = _tiles_along(az, bz, cz, reach, resolution)
    tl.store(counts + triangle, width.to(tl.int64) * height * depth, valid)


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _list_kernel(
    corners, limits, ends, listed, counter, table, num_triangles, num_steps, start, stop, resolution, per_axis
):
    """Lists the pairs of a triangle and a tile that may hold a sample within reach, in any order.

    Args:
        corners, limits: see `_count_kernel`.
        ends: `[F]` int64, the sums of the counts up to each triangle, with its own.
        listed: `[2, chunk]` int32, written: the triangle and the tile of each pair.
        counter: `[1]` int32, the number of listed pairs, at first 0.
        table: `[per_axis^3]` int32, 0 is written for each tile of the list.
        num_triangles: F.
        num_steps: more than the base 2 logarithm of F.
        start, stop: which pairs of all are tested.
        resolution: samples per axis.
        per_axis: tiles per axis.
    """
    pair = start + tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    valid = pair < stop
    # The first triangle whose end exceeds the number of the pair.
    low = tl.zeros((LANES,), tl.int32)
    high = low + num_triangles - 1
    for _ in range(num_steps):
        middle = (low + high) // 2
        beyond = tl.load(ends + middle, valid, 0) > pair
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, tl.minimum(middle + 1, high))
    triangle = low
    ax, ay, az, bx, by, bz, cx, cy, cz = _load_triangle(corners, triangle, valid)
    reach = tl.load(limits)
    x, width = _tiles_along(ax, bx, cx, reach, resolution)
    y, height = _tiles_along(ay, by, cy, reach, resolution)
    z, depth = _tiles_along(az, bz, cz, reach, resolution)
    height, depth = tl.maximum(height, 1), tl.maximum(depth, 1)
    count = width.to(tl.int64) * height * depth
    local = pair - (tl.load(ends + triangle, valid, 0) - count)
    x += (local // (height * depth)).to(tl.int32)
    y += (local // depth % height).to(tl.int32)
    z += (local % depth).to(tl.int32)
    centre: tl.constexpr = (TILE - 1) / 2
    px, py, pz = (
        (x * TILE).to(tl.float64) + centre,
        (y * TILE).to(tl.float64) + centre,
        (z * TILE).to(tl.float64) + centre,
    )
    _, _, _, squared = _closest_on_triangle(px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz)
    near = valid & (squared <= tl.load(limits + 2))
    number = near.to(tl.int32)
    place = tl.atomic_add(counter, tl.sum(number, 0), sem="relaxed") + tl.cumsum(number, 0) - 1
    tile = (x * per_axis + y) * per_axis + z
    tl.store(listed + place, triangle, near)
    tl.store(listed + (stop - start) + place, tile, near)
    tl.store(table + tile, 0, near)


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _nearest_kernel(corners, limits, triangles, tiles, table, best, num_pairs, resolution, per_axis):
    """Compares the samples of each listed pair with its triangle.

    Args:
        corners, limits: see `_count_kernel`.
        triangles, tiles: `[P]` int32, the list.
        table: `[per_axis^3]` int32, the row of each tile.
        best: `[rows, 64]` int64, changed: the least code of each sample. The bits of non-negative floats are ordered
            as the floats are, so that one integer minimum over pairs of a distance and a triangle finds the nearest
            triangle, and of several the first.
        num_pairs: P.
        resolution: samples per axis.
        per_axis: tiles per axis.
    """
    SAMPLES: tl.constexpr = TILE * TILE * TILE
    pair = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))[:, None]
    listed = pair < num_pairs
    triangle, tile = tl.load(triangles + pair, listed, 0), tl.load(tiles + pair, listed, 0)
    local = tl.arange(0, SAMPLES)[None, :]
    x = tile // (per_axis * per_axis) * TILE + local // (TILE * TILE)
    y = tile // per_axis % per_axis * TILE + local // TILE % TILE
    z = tile % per_axis * TILE + local % TILE
    ax, ay, az, bx, by, bz, cx, cy, cz = _load_triangle(corners, triangle, listed)
    _, _, _, squared = _closest_on_triangle(
        x.to(tl.float64), y.to(tl.float64), z.to(tl.float64), ax, ay, az, bx, by, bz, cx, cy, cz
    )
    near = listed & (squared < tl.load(limits + 1))
    near &= (x < resolution) & (y < resolution) & (z < resolution)
    code = squared.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) << 32 | triangle.to(tl.int64)
    place = best + tl.load(table + tile, listed, 0).to(tl.int64) * SAMPLES + local
    # Most samples have a nearer triangle already, which a look tells sooner than an atomic operation.
    near &= code < tl.load(place, near, 0)
    tl.atomic_min(place, code, near, sem="relaxed")


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _closest_kernel(corners, best, places, tiles, coords, distance, triangles, cells, num_found, resolution, per_axis):
    """The closest points of the samples that have one.

    Args:
        corners: see `_count_kernel`.
        best: `[rows, 64]` int64, see `_nearest_kernel`.
        places: `[n]` int64, the places in `best` of the samples.
        tiles: `[rows]` int64, the tile of each row of `best`.
        coords, cells: `[n, 3]` int32, written: the samples, and the grid cells of their closest points.
        distance: `[n]` float64, written, in spacings.
        triangles: `[n]` int32, written.
        num_found: n.
        resolution: samples per axis.
        per_axis: tiles per axis.
    """
    SAMPLES: tl.constexpr = TILE * TILE * TILE
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    valid = row < num_found
    place = tl.load(places + row, valid, 0)
    tile, local = tl.load(tiles + place // SAMPLES, valid, 0).to(tl.int32), (place % SAMPLES).to(tl.int32)
    x = tile // (per_axis * per_axis) * TILE + local // (TILE * TILE)
    y = tile // per_axis % per_axis * TILE + local // TILE % TILE
    z = tile % per_axis * TILE + local % TILE
    triangle = tl.load(best + place, valid, 0).to(tl.int32)
    ax, ay, az, bx, by, bz, cx, cy, cz = _load_triangle(corners, triangle, valid)
    qx, qy, qz, squared = _closest_on_triangle(
        x.to(tl.float64), y.to(tl.float64), z.to(tl.float64), ax, ay, az, bx, by, bz, cx, cy, cz
    )
    tl.store(distance + row, tl.sqrt(squared), valid)
    tl.store(triangles + row, triangle, valid)
    tl.store(coords + 3 * row, x, valid)
    tl.store(coords + 3 * row + 1, y, valid)
    tl.store(coords + 3 * row + 2, z, valid)
    tl.store(cells + 3 * row, tl.minimum(tl.maximum(tl.floor(qx).to(tl.int32), 0), resolution - 2), valid)
    tl.store(cells + 3 * row + 1, tl.minimum(tl.maximum(tl.floor(qy).to(tl.int32), 0), resolution - 2), valid)
    tl.store(cells + 3 * row + 2, tl.minimum(tl.maximum(tl.floor(qz).to(tl.int32), 0), resolution - 2), valid)


@on_device_of_first_argument
def band_distance(corners: Tensor, resolution: int, reach: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The grid samples nearer than `reach` to triangles, sorted by tiles of 4^3 samples.

    Args:
        corners: `[F, 3, 3]` float64, contiguous, in spacings.
        resolution: samples per axis, at most 2048.
        reach: in spacings.

    Returns:
        Samples `[n, 3]` int32, distances in spacings `[n]` float64, triangles `[n]` int32, and the grid cells of the
        closest points `[n, 3]` int32.
    """
    device, per_axis = corners.device, cdiv(resolution, TILE.value)
    limits = torch.tensor([reach, reach**2, (reach + TILE_RADIUS) ** 2], dtype=torch.float64, device=device)
    table = torch.full((per_axis**3,), -1, dtype=torch.int32, device=device)
    lists = _list_pairs(corners, limits, table, resolution, per_axis)
    tiles = (table == 0).nonzero()[:, 0]
    table[tiles] = torch.arange(len(tiles), dtype=torch.int32, device=device)
    best = torch.full((len(tiles) * TILE.value**3,), UNKNOWN, device=device)
    for listed in lists:
        count = listed.shape[1]
        if count:
            _nearest_kernel[(cdiv(count, PAIRS.value),)](
                corners, limits, listed[0], listed[1], table, best, count, resolution, per_axis
            )
    places = (best != UNKNOWN).nonzero()[:, 0]
    coords, cells = (torch.empty(len(places), 3, dtype=torch.int32, device=device) for _ in range(2))
    distance, triangles = coords.new_empty(len(places), dtype=torch.float64), coords.new_empty(len(places))
    if len(places):
        _closest_kernel[(cdiv(len(places), LANES.value),)](
            corners, best, places, tiles, coords, distance, triangles, cells, len(places), resolution, per_axis
        )
    return coords, distance, triangles, cells


def _list_pairs(corners: Tensor, limits: Tensor, table: Tensor, resolution: int, per_axis: int) -> list[Tensor]:
    """The lists of pairs `[2, P]`, of all chunks; `table` is 0 for the tiles that they hold. See `_list_kernel`."""
    num_triangles = len(corners)
    if not num_triangles:
        return []
    counts = torch.empty(num_triangles, dtype=torch.int64, device=corners.device)
    _count_kernel[(cdiv(num_triangles, LANES.value),)](corners, limits, counts, num_triangles, resolution)
    ends = counts.cumsum(0)
    total, num_steps = int(ends[-1]), math.ceil(math.log2(num_triangles)) + 1
    lists = []
    for start in range(0, total, PAIR_CHUNK):
        stop = min(start + PAIR_CHUNK, total)
        listed = torch.empty(2, stop - start, dtype=torch.int32, device=corners.device)
        counter = torch.zeros(1, dtype=torch.int32, device=corners.device)
        _list_kernel[(cdiv(stop - start, LANES.value),)](
            *(corners, limits, ends, listed, counter, table, num_triangles, num_steps, start, stop),
            *(resolution, per_axis),
        )
        # A copy, so that the memory of pairs that are not near is free again.
        lists.append(listed[:, : int(counter)].clone())
    return lists
