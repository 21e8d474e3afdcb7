"""
Clean-up of meshes: inner parts, floaters, holes, number of faces. Each by a library with wheels and a licence that
allows commercial use, of the extra `mesh`: parts by SciPy (BSD); inside or outside by the winding numbers of libigl
(MPL-2.0), which open surfaces have too; holes by VTK through PyVista (BSD and MIT; MeshFix and MeshLab are GPL,
trimesh leaves larger holes open); simplification by the quadric error metric of libigl, which keeps a closed surface
closed (fast-simplification is faster, but does not, and may stop early).

A part is what is connected by shared vertices, which the meshes of `sparse_sdf_to_mesh` are welded by.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import trimesh


# A floater is smaller than this, relative to the longest side of the mesh: 49 samples at 1024^3.
FLOATER_SIZE = 0.05


def remove_floaters(mesh: trimesh.Trimesh, min_size: float = FLOATER_SIZE) -> trimesh.Trimesh:
    """
    Removes small parts.

    Args:
        mesh: the mesh; not modified.
        min_size: parts whose bounding box has a longest side below this fraction of the longest side of `mesh` go; the
            largest part stays in any case.

    Returns:
        A mesh of the other parts.

    Raises:
        ImportError: if scipy is missing.
        ValueError: if `min_size` is not between 0 and 1.
    """
    if not 0 <= min_size <= 1:
        raise ValueError(f"`min_size` must be between 0 and 1, got {min_size}.")
    if len(mesh.faces) == 0:
        return mesh.copy()
    part, low, high = _parts(mesh)
    size = (high - low).max(axis=1)
    kept = size >= min(min_size * (high.max(axis=0) - low.min(axis=0)).max(), size.max())
    return _select(mesh, kept[part])


def remove_inner_parts(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """
    Removes the parts that lie inside of another one and cannot be seen: walls of cavities and what floats in them.

    A part goes if all its vertices have a winding number above one half with respect to one other part.

    Args:
        mesh: the mesh, oriented outward; not modified.

    Returns:
        A mesh of the other parts.

    Raises:
        ImportError: if libigl or scipy is missing.
    """
    if len(mesh.faces) == 0:
        return mesh.copy()
    import igl

    part, low, high = _parts(mesh)
    faces, vertices = np.asarray(mesh.faces, dtype=np.int64), np.asarray(mesh.vertices, dtype=np.float64)
    inner = np.zeros(len(low), dtype=bool)
    for outer in np.argsort(-(high - low).prod(axis=1)):
        contained = ((low >= low[outer]) & (high <= high[outer])).all(axis=1) & ~inner
        contained[outer] = False
        if inner[outer] or not contained.any():
            continue
        used, outer_faces = np.unique(faces[part == outer], return_inverse=True)
        queries = np.flatnonzero(contained[part])
        points = np.unique(faces[queries])
        winding = np.full(len(vertices), np.nan)
        winding[points] = igl.fast_winding_number(vertices[used], outer_faces.reshape(-1, 3), vertices[points])
        lowest = np.full(len(low), np.inf)
        np.minimum.at(lowest, part[queries], winding[faces[queries]].min(axis=1))
        inner |= contained & (lowest > 0.5)
    return _select(mesh, ~inner[part])


def fill_holes(mesh: trimesh.Trimesh, max_size: float | None = None) -> trimesh.Trimesh:
    """
    Closes the loops of edges that only one face has, without new vertices.

    Args:
        mesh: the mesh; not modified.
        max_size: radius of the largest hole to close, in the units of the mesh; any if None.

    Returns:
        The closed mesh, with the faces of each part oriented alike.

    Raises:
        ImportError: if pyvista is missing.
    """
    if len(mesh.faces) == 0 or mesh.is_watertight:
        return mesh.copy()
    import pyvista

    surface = pyvista.PolyData.from_regular_faces(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    surface = surface.fill_holes(np.finfo(np.float64).max if max_size is None else max_size).triangulate()
    surface = surface.compute_normals(
        point_normals=False, consistent_normals=True, split_vertices=False, non_manifold_traversal=False
    )
    return trimesh.Trimesh(np.asarray(surface.points), surface.regular_faces, process=False)


def simplify_mesh(mesh: trimesh.Trimesh, num_faces: int) -> trimesh.Trimesh:
    """
    Reduces a mesh to `num_faces` triangles by collapsing the edges that change the surface least (Garland and
    Heckbert). A closed surface stays closed. Takes seconds to minutes for millions of faces.

    Args:
        mesh: the mesh; not modified. One that has no more faces comes back as a copy.
        num_faces: triangles to keep, at least 4. One less is left where an edge at a border goes, more where every
            further collapse would break the surface.

    Raises:
        ImportError: if libigl is missing.
        ValueError: if `num_faces` is not an integer of at least 4, or an edge of `mesh` has more than two faces.
    """
    _check_num_faces(num_faces)
    if len(mesh.faces) <= num_faces:
        return mesh.copy()
    import igl

    vertices, faces, _, _ = igl.qslim(np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces), num_faces)
    if len(faces) == 0:
        raise ValueError("`mesh` cannot be simplified: it has edges of more than two faces.")
    return trimesh.Trimesh(vertices, faces, process=False)


def _check_num_faces(num_faces: int) -> None:
    if not isinstance(num_faces, int) or num_faces < 4:
        raise ValueError(f"`num_faces` must be an integer of at least 4, got {num_faces!r}.")


@dataclass(frozen=True)
class MeshCleanUp:
    """
    What to do to a mesh, in this order. By default nothing.

    Attributes:
        remove_inner_parts: see [`remove_inner_parts`].
        remove_floaters: see [`remove_floaters`].
        fill_holes: see [`fill_holes`].
        num_faces: simplify to this many triangles; see [`simplify_mesh`].

    Raises:
        ImportError: if a library for it is missing: said before any work is done.
        ValueError: if `num_faces` is not None and not an integer of at least 4.
    """

    remove_inner_parts: bool = False
    remove_floaters: bool = False
    fill_holes: bool = False
    num_faces: int | None = None

    def __post_init__(self) -> None:
        if self.num_faces is not None:
            _check_num_faces(self.num_faces)
        needs = {
            "remove_inner_parts": (self.remove_inner_parts, ("scipy", "igl")),
            "remove_floaters": (self.remove_floaters, ("scipy",)),
            "fill_holes": (self.fill_holes, ("pyvista",)),
            "num_faces": (self.num_faces is not None, ("igl",)),
        }
        for option, (wanted, modules) in needs.items():
            missing = [module for module in modules if wanted and find_spec(module) is None]
            if missing:
                raise ImportError(
                    f"`{option}` needs {' and '.join(missing)}: `pip install diffusers-sparse3d[mesh]` installs it."
                )

    def remove_parts(self, mesh: trimesh.Trimesh) -> trimesh.Trimesh:
        """Only what concerns whole parts."""
        if self.remove_inner_parts:
            mesh = remove_inner_parts(mesh)
        return remove_floaters(mesh) if self.remove_floaters else mesh

    def __call__(self, mesh: trimesh.Trimesh) -> trimesh.Trimesh:
        mesh = self.remove_parts(mesh)
        if self.fill_holes:
            mesh = fill_holes(mesh)
        return mesh if self.num_faces is None else simplify_mesh(mesh, self.num_faces)


def _parts(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of each face `[F]`, and the corners of the bounding box of each part, `[P, 3]` and `[P, 3]`."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first, second, third = np.asarray(mesh.faces).T
    edges = np.concatenate([first, second]), np.concatenate([second, third])
    size = len(mesh.vertices)
    graph = coo_matrix((np.ones(len(edges[0]), dtype=bool), edges), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][first]
    part = np.unique(labels, return_inverse=True)[1].reshape(-1)
    low = np.full((part.max() + 1, 3), np.inf)
    high = -low
    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)]
    np.minimum.at(low, part, corners.min(axis=1))
    np.maximum.at(high, part, corners.max(axis=1))
    return part, low, high


def _select(mesh: trimesh.Trimesh, faces: np.ndarray) -> trimesh.Trimesh:
    """The faces of a mask `[F]` and their vertices."""
    used, kept = np.unique(np.asarray(mesh.faces)[faces], return_inverse=True)
    return trimesh.Trimesh(np.asarray(mesh.vertices)[used], kept.reshape(-1, 3), process=False)
