"""
Signed distance to a mesh in a narrow band of grid samples.

Distances are exact. The sign comes from `outer_surface.py` and is defined for any mesh, closed or not.
"""

from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...checks import check_device, check_integer
from ...sparse_tensor import SparseTensor
from ..distance import SurfaceDistance
from ..mesh import MeshLike, load_mesh, normalize_mesh
from ..rasterized_distance import BandSamples
from .outer_surface import OUTSIDE, SHEET, SOLID, OuterSurface
from .point_distance import point_distance


# Half thickness, in grid spacings, of the shell that a sheet becomes. It exceeds a half, so that every grid edge that
# pierces the sheet has an end inside the shell.
SHELL_OFFSET = 0.51
# Radius, in grid spacings, of the tube that a wire becomes. A wire, thinner than a spacing in two directions, may be
# as far as sqrt(1/2) spacings from the nearest sample.
WIRE_OFFSET = 0.72
# Edges are sharp if their faces deviate from a plane by more than this, in degrees.
SHARP_ANGLE = 30.0


@dataclass
class SDFBlocks:
    """
    A narrow band of signed distances s, stored as full blocks of samples.

    Attributes:
        coords: `[M, 3]` int32, block coordinates in ascending (x, y, z) order; along each axis, block b holds the
            samples from `b * block_size` to `b * block_size + block_size - 1`.
        values: `[M, block_size, block_size, block_size]` float32: s / tau in (-1, 1) for samples of the band, exactly
            1 for other samples outside the object, and -1 for those inside.
        sharp: `[M, block_size, block_size, block_size]` bool, whether a sample is in the band and within tau of a
            sharp edge.
        resolution: samples per axis of the grid.
    """

    coords: Tensor
    values: Tensor
    sharp: Tensor
    resolution: int

    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """The samples of the band: coordinates `[N, 3]` int32, values `[N, 1]` float32 and sharp flags `[N]` bool."""
        size = self.values.shape[-1]
        bits = size.bit_length() - 1
        index = (self.values.abs() < 1).flatten().nonzero()[:, 0]
        local = torch.stack([index >> 2 * bits & size - 1, index >> bits & size - 1, index & size - 1], dim=1).int()
        coords = local.add_(self.coords.index_select(0, index >> 3 * bits).mul_(size))
        values, sharp = (tensor.reshape(-1).index_select(0, index) for tensor in (self.values, self.sharp))
        return coords, values.unsqueeze(1), sharp


def narrow_band_width(resolution: int) -> float:
    """
    The half width tau of the narrow band in model space: 1/128, but at least two grid spacings.

    Args:
        resolution: samples per axis; the grid spacing is `2 / (resolution - 1)`.
    """
    return max(1 / 128, 4 / (resolution - 1))


def _sharp_segments(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """
    The sharp edges of a welded mesh, as pairs of vertices `[S, 2]`.

    An edge of two faces is sharp if they deviate from a plane by more than `SHARP_ANGLE`, whatever their orientation.
    An edge of one face or of more than two is sharp in any case.

    Args:
        vertices: `[V, 3]` float64.
        faces: `[F, 3]` int64.
    """
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    opposite = faces[:, [2, 0, 1]].reshape(-1)
    order = np.argsort(edges[:, 0] * len(vertices) + edges[:, 1], kind="stable")
    edges, opposite = edges[order], opposite[order]
    starts = np.flatnonzero(np.r_[True, (edges[1:] != edges[:-1]).any(axis=1)])
    counts = np.diff(np.r_[starts, len(edges)])
    # The direction in which each face leaves the edge. The two directions are opposite where the surface is flat.
    origin = vertices[edges[:, 0]]
    direction = vertices[edges[:, 1]] - origin
    direction /= np.linalg.norm(direction, axis=1, keepdims=True).clip(1e-12)
    away = vertices[opposite] - origin
    away -= (away * direction).sum(axis=1, keepdims=True) * direction
    away /= np.linalg.norm(away, axis=1, keepdims=True).clip(1e-12)
    pair = starts[counts == 2]
    folded = (away[pair] * away[pair + 1]).sum(axis=1) > -np.cos(np.radians(SHARP_ANGLE))
    return np.concatenate([edges[pair[folded]], edges[starts[counts != 2]]])


def mesh_to_sdf_blocks(
    mesh: MeshLike,
    resolution: int,
    block_size: int = 8,
    *,
    normalize: bool = True,
    progress: bool | None = None,
    device: torch.device | str = "cpu",
) -> SDFBlocks:
    """
    Signed distance to the outer surface of a mesh in a narrow band, as full blocks of samples.

    The mesh may be open, self-intersecting, inconsistently oriented, and of many parts. Space that the outside cannot
    reach through a gap wider than one grid spacing is solid. Faces inside the solid are ignored, so that the zero
    level is the outer surface (within a cell of the seam of overlapping parts, the distance of solid samples may be up
    to a spacing too small). Sheets, and plates thinner than the grid, become closed shells that extend half a spacing
    to either side. Memory grows with the surface.

    Args:
        mesh: a Trimesh, a Scene, or a path.
        resolution: samples per axis, a multiple of `block_size`; sample i lies at `-1 + 2 i / (resolution - 1)`.
        block_size: samples per block and axis, a power of two; 8 gives the latent grid.
        normalize: whether to centre the mesh and scale its longest side to 1.9 first; without it, `mesh` must lie in
            [-1, 1]^3.
        progress: whether to show a progress bar; if None, one appears after a second.
        device: where to compute.

    Returns:
        The blocks that hold at least one sample with |s| < tau, tau = max(1/128, 2 spacings), on the CPU.

    Raises:
        ValueError: if `mesh` has no usable triangle or leaves the cube, or `resolution`,
            `block_size` or `device` does not fit.
        ImportError: if libigl or scipy is missing.
    """
    blocks = _sdf_blocks(mesh, resolution, block_size, normalize, progress, device)
    return SDFBlocks(blocks.coords.cpu(), blocks.values.cpu(), blocks.sharp.cpu(), resolution)


def _sdf_blocks(
    mesh: MeshLike,
    resolution: int,
    block_size: int,
    normalize: bool,
    progress: bool | None,
    device: torch.device | str,
) -> SDFBlocks:
    """The result of [`mesh_to_sdf_blocks`], for its arguments, on `device`."""
    block_size, resolution = check_integer("block_size", block_size), check_integer("resolution", resolution)
    if block_size < 2 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two and at least 2, got {block_size}.")
    if resolution % block_size or not 2 * block_size <= resolution <= 2048:
        raise ValueError(
            f"`resolution` must be a multiple of {block_size} from {2 * block_size} to 2048, got {resolution}."
        )
    device = check_device("device", device)
    mesh = load_mesh(mesh)
    if normalize:
        mesh, _, _ = normalize_mesh(mesh)
    spacing, tau = 2 / (resolution - 1), narrow_band_width(resolution)
    with tqdm(
        desc=f"SDF {resolution}", unit=" samples", unit_scale=True, leave=False, delay=1, disable=progress is False
    ) as bar:
        surface = OuterSurface(mesh, resolution, tau + SHELL_OFFSET * spacing, block_size, bar, device)
        segments = _sharp_segments(surface.vertices, surface.faces)
        if len(segments):
            edges = SurfaceDistance(surface.vertices, segments, device)
            near_edge = edges.samples_within(resolution, tau, bar).coords
    grid = surface.grid
    signed = _signed_distance(surface, tau)
    band = (signed.abs() < tau).nonzero()[:, 0]
    values = torch.where(surface.outside, 1.0, -1.0).float()
    # In float32 a value may round to 1, which would take its sample out of the band.
    values[surface.slot[band]] = (signed[band] / tau).float().clamp(-1 + 2**-24, 1 - 2**-24)
    sharp = grid.full(False, torch.bool)
    if len(segments):
        sharp[grid.slots(near_edge)] = True
    sharp &= values.abs() < 1

    values, sharp = grid.tiles(values), grid.tiles(sharp)
    kept = (values.abs() < 1).flatten(1).any(dim=1).nonzero()[:, 0]
    return SDFBlocks(grid.blocks[kept].int(), values[kept], sharp[kept], resolution)


def _signed_distance(surface: OuterSurface, tau: float) -> Tensor:
    """
    The signed distances `[n]` float64 of the samples `surface.coords` to the outer surface.

    Sheets and wires are replaced by the shells and tubes around them. Distances of solid samples are exact up to tau;
    beyond it they merely exceed tau.
    """
    distance, device = surface.distance, surface.distance.device
    outside = surface.outside[surface.slot]
    around = surface.code_around(surface.cell)

    # For a solid sample whose closest point is inside the solid, the distance to the outer surface is found instead.
    outer = around & OUTSIDE > 0
    inner = (~outside & ~outer).nonzero()[:, 0]
    if len(inner) and outer.any():
        outer_faces = surface.faces[surface.face[outer].unique().cpu().numpy()]
        near = SurfaceDistance(surface.vertices, outer_faces, device)
        if device.type == "cpu":
            distances, _, closest = near.closest(surface.coords[inner].numpy() * surface.spacing - 1)
            found, cell = torch.from_numpy(distances), surface.cells_of(closest)
        else:
            found, cell = _look_up(surface, inner, near.samples_within(surface.resolution, tau))
        # A face that is partly outside may be closest at a point inside. The boundary points then represent its outer
        # part.
        hidden = ((found < tau) & (surface.code_around(cell) & OUTSIDE == 0)).nonzero()[:, 0]
        if len(hidden) and len(surface.boundary):
            coords = surface.coords[inner[hidden]]
            found[hidden] = point_distance(surface.boundary, coords, surface.resolution, tau)
        distance = distance.index_copy(0, inner, found)

    offset = SHELL_OFFSET * (around & SHEET > 0).double()
    # An outside sample whose closest point has only outside samples around it, none of them next to a sheet, is near
    # the rim of a sheet, a ridge between samples, or a wire. The wider neighbourhood tells which.
    unseen = (outside & (around & (SOLID | SHEET) == 0)).nonzero()[:, 0]
    wider = surface.code_around(surface.cell[unseen], reach=2)
    offset[unseen] = torch.where(
        wider & SHEET > 0, SHELL_OFFSET, torch.where(wider & SOLID == 0, WIRE_OFFSET, offset[unseen])
    )
    return torch.where(outside, distance, -distance) - offset * surface.spacing


def _look_up(surface: OuterSurface, inner: Tensor, band: BandSamples) -> tuple[Tensor, Tensor]:
    """
    Looks up samples of a surface in a narrow band.

    Args:
        surface: the surface.
        inner: `[n]` int64, rows of `surface.coords`.
        band: samples with their distances.

    Returns:
        The distances `[n]`, infinite for samples that `band` lacks, and the cells of the closest points `[n, 3]`,
        which are the samples themselves for those.
    """
    row = surface.grid.full(-1, torch.long)
    row[surface.grid.slots(band.coords)] = torch.arange(len(band.coords), device=row.device)
    row[surface.grid.size] = -1
    row = row[surface.slot[inner]]
    found = torch.where(row >= 0, band.distance[row], torch.inf)
    return found, torch.where((row >= 0)[:, None], band.cell[row], surface.coords[inner])


@overload
def mesh_to_sparse_sdf(
    mesh: MeshLike,
    resolution: int,
    *,
    normalize: bool = ...,
    return_sharp: Literal[False] = ...,
    progress: bool | None = ...,
    device: torch.device | str = ...,
) -> SparseTensor: ...


@overload
def mesh_to_sparse_sdf(
    mesh: MeshLike,
    resolution: int,
    *,
    normalize: bool = ...,
    return_sharp: Literal[True],
    progress: bool | None = ...,
    device: torch.device | str = ...,
) -> tuple[SparseTensor, Tensor]: ...


def mesh_to_sparse_sdf(
    mesh: MeshLike,
    resolution: int,
    *,
    normalize: bool = True,
    return_sharp: bool = False,
    progress: bool | None = None,
    device: torch.device | str = "cpu",
) -> SparseTensor | tuple[SparseTensor, Tensor]:
    """
    Sparse signed distance field of any mesh: the samples of the narrow band of [`mesh_to_sdf_blocks`].

    Args:
        mesh: a Trimesh, a Scene, or a path.
        resolution: samples per axis, a multiple of 8; sample i lies at `-1 + 2 i / (resolution - 1)`.
        normalize: whether to centre the mesh and scale its longest side to 1.9 first; without it, `mesh` must lie in
            [-1, 1]^3.
        return_sharp: whether to also return which samples lie within tau of a sharp edge: one whose faces deviate from
            a plane by more than 30 degrees, or the border of a sheet.
        progress: whether to show a progress bar; if None, one appears after a second.
        device: where to compute; the result is on the CPU.

    Returns:
        A `SparseTensor` with `feats [N, 1]` float32, s / tau in (-1, 1), positive outside, and `coords [N, 4]` int32
        with batch index 0; with `return_sharp`, also a bool tensor `[N]`.

    Raises:
        ValueError: if `mesh` has no usable triangle or leaves the cube, or `resolution` or `device` does
            not fit.
        ImportError: if libigl or scipy is missing.
    """
    coords, feats, sharp = _sdf_blocks(mesh, resolution, 8, normalize, progress, device).band()
    tensor = SparseTensor(feats=feats.cpu(), coords=torch.nn.functional.pad(coords, (1, 0)).cpu())
    return (tensor, sharp.cpu()) if return_sharp else tensor
