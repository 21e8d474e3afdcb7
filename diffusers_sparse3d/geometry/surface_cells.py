"""
The cells of a latent grid near a mesh, in which the second stage of Direct3D-S2 generates (arXiv 2505.17412).

Plain PyTorch; memory and time grow with the surface.
"""

import numpy as np
import torch
import trimesh
from torch import Tensor

from ..checks import check_device, check_integer, check_positive
from ..ops.coordinates import MAX_RESOLUTION
from .mesh import check_mesh
from .rasterized_distance import chunks_of_pairs, closest_on_triangles, lattice_points, split_triangles
from .sdf import narrow_band_width


# Bounding boxes in one pass.
BOX_CHUNK = 1 << 17


def cells_near_surface(
    mesh: trimesh.Trimesh,
    resolution: int,
    cell_size: int = 8,
    reach: float | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """
    The cells of a grid, `cell_size` times as coarse as the samples, that hold a sample nearer to a mesh than `reach`.

    With the default reach, the half width of the narrow band, these are the cells that a sparse SDF of a closed
    surface touches, hence its latent coordinates. At 1024^3 that reach is 1/128 in model space, which the published
    code writes as 4/1024 of a unit cube.

    The distances are exact, in float64. Most cells are settled by a vertex that is near one of their samples;
    distances to triangles are computed for the others only.

    Args:
        mesh: a mesh in model space. It may leave the cube [-1, 1]^3, which holds all samples.
        resolution: samples per axis, up to 2048; sample i lies at `-1 + 2 i / (resolution - 1)`.
        cell_size: samples per cell and axis; 8 gives the latent grid.
        reach: distance in model space; `narrow_band_width(resolution)` if None.
        device: where to compute.

    Returns:
        `[M, 3]` int32 cells in ascending (x, y, z) order, on `device`; none for a mesh without faces.

    Raises:
        TypeError: if `mesh` is no Trimesh.
        ValueError: if `resolution` is out of range or not a multiple of `cell_size`, `reach` is not positive,
            PyTorch cannot use `device`, or `mesh` lies outside of the cube, or has faces of vertices that are not
            there or not finite.
    """
    vertices, faces = check_mesh(mesh)
    resolution, cell_size, reach = _check_grid(resolution, cell_size, reach)
    device = check_device("device", device)
    # From here on all lengths are in grid spacings.
    spacing = 2 / (resolution - 1)
    reach = reach / spacing
    used, corner_index = np.unique(faces, return_inverse=True)
    corners = vertices[used]
    beyond = 1 + reach * spacing
    if len(faces) and ((corners.min(axis=0) >= beyond) | (corners.max(axis=0) <= -beyond)).any():
        raise ValueError("`mesh` must reach into the cube [-1, 1]^3, it lies outside: see `normalize_mesh`.")
    points = torch.from_numpy((corners + 1) / spacing).to(device)
    pieces, owner = split_triangles(points[torch.from_numpy(corner_index.reshape(-1, 3)).to(device)])

    cells_per_axis = resolution // cell_size
    near = torch.zeros((cells_per_axis,) * 3, dtype=torch.bool, device=device)
    # Vertices come first, since the nearest sample of a cell to a point is found without a search.
    is_part = torch.bincount(owner, minlength=1)[owner] > 1
    points = torch.cat([points, pieces[is_part].reshape(-1, 3)])
    _mark_cells_near_points(points, reach, cell_size, near)

    low, high = pieces.amin(dim=1), pieces.amax(dim=1)
    for start in range(0, len(pieces), BOX_CHUNK):
        stop = start + BOX_CHUNK
        box, cell = _cells_of_boxes(low[start:stop], high[start:stop], reach, cell_size, near)
        piece = box + start
        first = torch.maximum((low[piece] - reach).ceil().long(), cell * cell_size)
        last = torch.minimum((high[piece] + reach).floor().long(), cell * cell_size + cell_size - 1)
        extent = (last - first + 1).clamp(min=0)
        for begin, end in chunks_of_pairs(extent.prod(dim=1)):
            pair, sample = lattice_points(first[begin:end], extent[begin:end])
            pair = pair + begin
            distance = (closest_on_triangles(sample.double(), pieces[piece[pair]]) - sample).norm(dim=1)
            near[cell[pair[distance < reach]].unbind(1)] = True
    return near.nonzero().int()


def cells_near_points(points: Tensor, resolution: int, cell_size: int = 8, reach: float | None = None) -> Tensor:
    """
    The cells of a grid, `cell_size` times as coarse as the samples, that hold a sample nearer to a point than `reach`.

    Of points that are dense on a surface, in comparison with the reach, these are nearly the cells of the surface.

    Args:
        points: `[P, 3]` in model space, on the device that computes.
        resolution, cell_size, reach: see [`cells_near_surface`].

    Returns:
        `[M, 3]` int32 cells in ascending (x, y, z) order, on the device of the points.

    Raises:
        ValueError: if `resolution` is out of range or not a multiple of `cell_size`, or `reach` is not positive.
    """
    resolution, cell_size, reach = _check_grid(resolution, cell_size, reach)
    spacing = 2 / (resolution - 1)
    near = torch.zeros((resolution // cell_size,) * 3, dtype=torch.bool, device=points.device)
    _mark_cells_near_points((points.double() + 1) / spacing, reach / spacing, cell_size, near)
    return near.nonzero().int()


def _check_grid(resolution: int, cell_size: int, reach: float | None) -> tuple[int, int, float]:
    """The arguments of a grid, checked, with the default of `reach`."""
    resolution = check_integer("resolution", resolution, 2, MAX_RESOLUTION)
    cell_size = check_integer("cell_size", cell_size, 1)
    if resolution % cell_size:
        raise ValueError(f"`resolution` must be a multiple of `cell_size`, got {resolution} and {cell_size}.")
    reach = narrow_band_width(resolution) if reach is None else check_positive("reach", reach)
    return resolution, cell_size, reach


def _mark_cells_near_points(points: Tensor, reach: float, cell_size: int, near: Tensor) -> None:
    """Sets in `near [C, C, C]` the cells that hold a sample nearer to `points [P, 3]` than `reach`, in spacings."""
    for start in range(0, len(points), BOX_CHUNK):
        point = points[start : start + BOX_CHUNK]
        _, cell = _cells_of_boxes(point, point, reach, cell_size, near)
        near[cell.unbind(1)] = True


def _cells_of_boxes(low: Tensor, high: Tensor, reach: float, cell_size: int, known: Tensor) -> tuple[Tensor, Tensor]:
    """
    Pairs of a box and a cell that holds a sample nearer to the box than `reach`.

    Args:
        low, high: `[n, 3]`, the corners of axis-aligned boxes, in grid spacings.
        reach: in grid spacings.
        cell_size: samples per cell and axis.
        known: `[C, C, C]` bool, cells to leave out.

    Returns:
        The box `[m]` and the cell `[m, 3]` of each pair, int64.
    """
    first = ((low - reach) / cell_size).floor().clamp(min=0).long()
    last = ((high + reach) / cell_size).floor().clamp(max=len(known) - 1).long()
    box, cell = lattice_points(first, (last - first + 1).clamp(min=0))
    new = ~known[cell.unbind(1)]
    box, cell = box[new], cell[new]
    low, high = low[box], high[box]
    # The samples of a cell and a box are both products of intervals, so the nearest sample is found axis by axis,
    # among those next to either side of the box.
    gaps = []
    for sample in (low.ceil(), high.floor()):
        sample = sample.clamp(cell * cell_size, cell * cell_size + cell_size - 1)
        gaps.append(torch.maximum(low - sample, sample - high).clamp(min=0))
    near = torch.minimum(*gaps).square().sum(dim=1) < reach * reach
    return box[near], cell[near]
