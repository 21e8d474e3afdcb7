"""
Mesh to sparse signed distance field: exact distances, and a sign that any mesh has (see `outer_surface.py`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..sparse_tensor import SparseTensor
from .distance import SurfaceDistance
from .mesh import MeshLike, load_mesh, normalize_mesh
from .outer_surface import OUTSIDE, SHEET, SOLID, OuterSurface


# In grid spacings: half the thickness of the shell that a sheet becomes. A little more than a half, so that every grid
# edge that pierces the sheet has an end in the shell.
SHELL_OFFSET = 0.51
# Something thinner than a spacing in two directions can pass between the samples at up to sqrt(1/2) spacings.
WIRE_OFFSET = 0.72
SHARP_ANGLE = 30.0


@dataclass
class SDFBlocks:
    """
    A narrow band stored as full blocks of samples.

    Attributes:
        coords: `[M, 3]` int32, block coordinates in ascending (x, y, z) order; block b holds the samples
            `b * block_size .. b * block_size + block_size - 1`.
        values: `[M, block_size, block_size, block_size]` float32 in [-1, 1]: s / tau inside the band, exactly 1
            outside of it and -1 inside the object.
        sharp: like `values`, bool: band samples within tau of a sharp edge.
        resolution: samples per axis of the grid.
    """

    coords: Tensor
    values: Tensor
    sharp: Tensor
    resolution: int

    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates `[N, 3]` int32, values `[N, 1]` float32 and sharp flags `[N]` bool of the band's samples."""
        size = self.values.shape[-1]
        bits = size.bit_length() - 1
        index = (self.values.abs() < 1).flatten().nonzero()[:, 0]
        local = torch.stack([index >> 2 * bits & size - 1, index >> bits & size - 1, index & size - 1], dim=1).int()
        coords = local.add_(self.coords.index_select(0, index >> 3 * bits).mul_(size))
        values, sharp = (tensor.reshape(-1).index_select(0, index) for tensor in (self.values, self.sharp))
        return coords, values.unsqueeze(1), sharp


def narrow_band_width(resolution: int) -> float:
    """tau, the half width of the narrow band in model space: 1/128, and at least two grid spacings."""
    return max(1 / 128, 4 / (resolution - 1))


def _sharp_segments(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """
    Sharp edges `[S, 2]` of a welded mesh: edges where two faces deviate from a plane by more than 30 degrees, whatever
    their orientation, and edges with one face or more than two.
    """
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    opposite = faces[:, [2, 0, 1]].reshape(-1)
    order = np.argsort(edges[:, 0] * len(vertices) + edges[:, 1], kind="stable")
    edges, opposite = edges[order], opposite[order]
    starts = np.flatnonzero(np.r_[True, (edges[1:] != edges[:-1]).any(axis=1)])
    counts = np.diff(np.r_[starts, len(edges)])
    # The direction of each face away from the edge; the two are opposite where the surface is flat.
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

    Any mesh will do: open, self-intersecting, with inconsistent orientation, of many parts. What the outside cannot
    reach through a gap wider than one grid spacing is solid, its zero level lies on the surface, and faces inside it
    are ignored: values inside are distances to the outer surface (within a cell of a seam where parts overlap, up to a
    spacing too small). Sheets, and plates thinner than the grid, become closed shells, half a spacing on either side.
    Grid sample i lies at `-1 + 2 i / (resolution - 1)`. Memory grows with the surface.

    Args:
        mesh: a Trimesh, a Scene, or a path.
        resolution: samples per axis, a multiple of `block_size`.
        block_size: samples per block and axis, a power of two; 8 gives the latent grid.
        normalize: centre the mesh and scale its longest side to 1.9 first; without it, `mesh` must lie in [-1, 1]^3.
        progress: show a progress bar; by default one appears after a second.
        device: of a GPU, to compute the distances there.

    Returns:
        The blocks that hold at least one sample with |s| < tau, tau = max(1/128, 2 spacings), on the CPU.

    Raises:
        ValueError: if `mesh` has no usable triangle or leaves the cube, or `resolution` or `block_size` does not fit.
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
    """[`mesh_to_sdf_blocks`], with the result on the device."""
    if block_size < 2 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two and at least 2, got {block_size}.")
    if resolution % block_size or not 2 * block_size <= resolution <= 2048:
        raise ValueError(
            f"`resolution` must be a multiple of {block_size} from {2 * block_size} to 2048, got {resolution}."
        )
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
            near_edge = SurfaceDistance(surface.vertices, segments, device).samples_within(resolution, tau, bar)[0]
    grid = surface.grid
    signed = _signed_distance(surface, tau)
    band = signed.abs() < tau
    values = torch.where(surface.outside, 1.0, -1.0).float()
    # A value that rounds to 1 would leave the band.
    values[surface.slot[band]] = (signed[band] / tau).float().clamp(-1 + 2**-24, 1 - 2**-24)
    sharp = grid.full(False, torch.bool)
    if len(segments):
        sharp[grid.slots(near_edge)] = True
    sharp &= values.abs() < 1

    values, sharp = grid.tiles(values), grid.tiles(sharp)
    kept = (values.abs() < 1).flatten(1).any(dim=1)
    return SDFBlocks(grid.blocks[kept].int(), values[kept], sharp[kept], resolution)


def _signed_distance(surface: OuterSurface, tau: float) -> Tensor:
    """
    Signed distance `[n]` of the samples near a surface, to its outer part; where that is a sheet, to the shell around
    it. Distances of solid samples that exceed tau need not be exact.
    """
    distance, device = surface.distance, surface.distance.device
    outside = surface.outside[surface.slot]
    around = surface.code_around(surface.cell)

    # Solid samples whose closest face is inside the solid: measure to the outer surface instead.
    outer = around & OUTSIDE > 0
    inner = (~outside & ~outer).nonzero()[:, 0]
    if len(inner) and outer.any():
        outer_faces = surface.faces[surface.face[outer].unique().cpu().numpy()]
        near = SurfaceDistance(surface.vertices, outer_faces, device)
        if device.type == "cpu":
            found, _, closest = near.closest(surface.coords[inner].numpy() * surface.spacing - 1)
            found, cell = torch.from_numpy(found), surface.cells_of(closest)
        else:
            found, cell = _look_up(surface, inner, *near.samples_within(surface.resolution, tau))
        # That face may again be closest where it is inside. The points on its outer part stand for it.
        hidden = ((found < tau) & (surface.code_around(cell) & OUTSIDE == 0)).nonzero()[:, 0]
        if len(hidden) and len(surface.boundary):
            found[hidden] = _distance_to_points(surface, surface.coords[inner[hidden]], tau)
        distance = distance.index_copy(0, inner, found)

    offset = SHELL_OFFSET * (around & SHEET > 0).double()
    # Where no sample shows the surface it is the rim of a sheet, a ridge that fell between the samples, or a wire.
    unseen = (outside & (around & (SOLID | SHEET) == 0)).nonzero()[:, 0]
    wider = surface.code_around(surface.cell[unseen], reach=2)
    offset[unseen[wider & SOLID == 0]] = WIRE_OFFSET
    offset[unseen[wider & SHEET > 0]] = SHELL_OFFSET
    return torch.where(outside, distance, -distance) - offset * surface.spacing


def _look_up(
    surface: OuterSurface, inner: Tensor, coords: Tensor, distance: Tensor, _: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Distance `[n]` and cell `[n, 3]` of the samples `inner [n]` of a surface among those at `coords`; infinite, and the
    sample itself, where it is none of them.
    """
    row = surface.grid.full(-1, torch.long)
    row[surface.grid.slots(coords)] = torch.arange(len(coords), device=coords.device)
    row[surface.grid.size] = -1
    row = row[surface.slot[inner]]
    found = torch.where(row >= 0, distance[row], torch.inf)
    return found, torch.where((row >= 0)[:, None], cell[row], surface.coords[inner])


def _distance_to_points(surface: OuterSurface, coords: Tensor, reach: float) -> Tensor:
    """Distance `[n]` of samples `coords [n, 3]` to the boundary points of a surface; infinite beyond `reach`."""
    from scipy.spatial import cKDTree

    # Balancing the tree, and looking further than the band, would take minutes on meshes of many inner faces.
    tree = cKDTree(surface.boundary.cpu().numpy(), balanced_tree=False)
    points = coords.cpu().numpy() * surface.spacing - 1
    distance = tree.query(points, distance_upper_bound=reach, workers=torch.get_num_threads())[0]
    return torch.from_numpy(distance).to(coords.device)


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
    Sparse signed distance field of any mesh: the band part of [`mesh_to_sdf_blocks`], which explains the method.

    Args:
        mesh: a Trimesh, a Scene, or a path.
        resolution: samples per axis, a multiple of 8; sample i lies at `-1 + 2 i / (resolution - 1)`.
        normalize: centre the mesh and scale its longest side to 1.9 first.
        return_sharp: also return which samples lie within tau of a sharp edge (dihedral deviation above 30 degrees, or
            the border of a sheet).
        progress: show a progress bar; by default one appears after a second.
        device: of a GPU, to compute the distances there; the result is on the CPU.

    Returns:
        A `SparseTensor` with `feats [N, 1]` float32, s / tau in (-1, 1), positive outside, and `coords [N, 4]` int32
        with batch index 0; with `return_sharp`, also a bool tensor `[N]`.

    Raises:
        ValueError: as [`mesh_to_sdf_blocks`].
    """
    coords, feats, sharp = _sdf_blocks(mesh, resolution, 8, normalize, progress, device).band()
    tensor = SparseTensor(feats=feats.cpu(), coords=torch.nn.functional.pad(coords, (1, 0)).cpu())
    return (tensor, sharp.cpu()) if return_sharp else tensor
