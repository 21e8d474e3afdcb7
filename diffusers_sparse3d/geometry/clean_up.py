"""
Clean-up of meshes: inner parts, floaters, holes, number of faces.

A part is a set of faces connected by shared vertices; the meshes of `sparse_sdf_to_mesh` share them.

Each step uses a library that has wheels and a licence for commercial use, installed by the extra `mesh`:

- Parts: SciPy (BSD).
- Inside or outside: winding numbers by libigl (MPL-2.0), which are defined for open surfaces, too.
- Holes: VTK through PyVista (BSD, MIT). MeshFix and MeshLab are GPL; trimesh leaves larger holes open.
- Simplification: the quadric error metric of libigl, which keeps a closed surface closed. fast-simplification is
  faster but does not, and may stop early.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import trimesh

from ..checks import check_choice, check_integer, check_number
from .mesh import check_mesh


# Longest side of a floater relative to the longest side of the mesh; at 1024^3 that is 49 samples.
FLOATER_SIZE = 0.05


def remove_floaters(mesh: trimesh.Trimesh, min_size: float = FLOATER_SIZE) -> trimesh.Trimesh:
    """
    A copy of a mesh without its small parts.

    Args:
        mesh: the mesh; not modified.
        min_size: a part is removed if the longest side of its bounding box is below this fraction of the longest side
            of the bounding box of `mesh`. The largest part is always kept.

    Returns:
        A mesh of the parts that are kept.

    Raises:
        ImportError: if scipy is missing.
        ValueError: if `min_size` is not between 0 and 1.
    """
    check_number("min_size", min_size, 0, 1)
    if len(check_mesh(mesh)[1]) == 0:
        return mesh.copy()
    part, low, high = _parts(mesh)
    size = (high - low).max(axis=1)
    kept = size >= min(min_size * (high.max(axis=0) - low.min(axis=0)).max(), size.max())
    return _select(mesh, kept[part])


def remove_inner_parts(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """
    A copy of a mesh without the parts inside another part: walls of cavities, and parts that float in them.

    A part is removed if all its vertices have a winding number above one half with respect to one other part.

    Args:
        mesh: the mesh, oriented outward; not modified.

    Returns:
        A mesh of the parts that are kept.

    Raises:
        ImportError: if libigl or scipy is missing.
    """
    vertices, faces = check_mesh(mesh)
    if len(faces) == 0:
        return mesh.copy()
    import igl

    part, low, high = _parts(mesh)
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


def count_bodies(mesh: trimesh.Trimesh) -> int:
    """The number of parts of a mesh: sets of faces connected by shared vertices; 0 without faces."""
    return len(_parts(mesh)[1]) if len(check_mesh(mesh)[1]) else 0


def fill_holes(mesh: trimesh.Trimesh, max_size: float | None = None) -> trimesh.Trimesh:
    """
    A copy of a mesh whose holes are filled with triangles between existing vertices.

    A hole is a loop of edges that belong to one face only.

    Args:
        mesh: the mesh; not modified.
        max_size: half the diagonal of the bounding box of the largest hole to fill; holes of any size if None.

    Returns:
        The mesh, with the faces of each part consistently oriented.

    Raises:
        ImportError: if pyvista is missing.
    """
    if max_size is not None:
        check_number("max_size", max_size, 0)
    vertices, faces = check_mesh(mesh)
    faces = _proper_faces(faces)
    if len(faces) == 0 or mesh.is_watertight:
        return mesh.copy()
    import pyvista

    surface = pyvista.PolyData.from_regular_faces(vertices, faces)
    surface = surface.fill_holes(np.finfo(np.float64).max if max_size is None else max_size).triangulate()
    surface = surface.compute_normals(
        point_normals=False, consistent_normals=True, split_vertices=False, non_manifold_traversal=False
    )
    return trimesh.Trimesh(np.asarray(surface.points), surface.regular_faces, process=False)


def simplify_mesh(mesh: trimesh.Trimesh, num_faces: int) -> trimesh.Trimesh:
    """
    A copy of a mesh, reduced to `num_faces` triangles by collapsing the edges that change the surface least.

    The error is the quadric metric of Garland and Heckbert. A closed surface stays closed. Millions of faces take
    seconds to minutes.

    Args:
        mesh: the mesh; not modified. If it has at most `num_faces` faces, the result is a plain copy.
        num_faces: triangles to keep, at least 4. The result has one less if the last collapse is at a border, and more
            if every further collapse would break the surface.

    Raises:
        ImportError: if libigl is missing.
        ValueError: if `num_faces` is not an integer of at least 4, an edge of `mesh` has more than two faces, or
            neighbouring faces have opposite orientations.
    """
    num_faces = check_integer("num_faces", num_faces, 4)
    vertices, faces = check_mesh(mesh)
    if len(faces) <= num_faces:
        return mesh.copy()
    import igl

    faces = _proper_faces(faces)
    # igl.qslim does not end on some meshes whose faces pass an edge in the same direction.
    directed = faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    if len(np.unique(directed[:, 0] * len(vertices) + directed[:, 1])) < len(directed):
        raise ValueError(
            "`mesh` cannot be simplified: it has edges of more than two faces, or neighbouring faces of opposite"
            " orientation."
        )
    used, faces = np.unique(faces, return_inverse=True)
    vertices, faces = vertices[used], faces.reshape(-1, 3)
    if len(faces) > num_faces:
        vertices, faces, _, _ = igl.qslim(vertices, faces, num_faces)
    if len(faces) == 0:
        raise ValueError("`mesh` cannot be simplified: its surface is not that of a solid or a sheet.")
    return trimesh.Trimesh(vertices, faces, process=False)


def _proper_faces(faces: np.ndarray) -> np.ndarray:
    """The faces `[F, 3]` that have three corners, each once: a face may not occur again, turned or flipped either."""
    corners = np.sort(faces, axis=1)
    proper = (corners[:, 0] < corners[:, 1]) & (corners[:, 1] < corners[:, 2])
    faces, corners = faces[proper], corners[proper]
    if len(faces) == 0:
        return faces
    first = np.unique(corners, axis=0, return_index=True)[1]
    return faces[np.sort(first)] if len(first) < len(faces) else faces


@dataclass(frozen=True)
class MeshCleanUp:
    """
    A sequence of clean-up steps, applied to a mesh in the order of the attributes when called. By default it has none.

    Attributes:
        remove_inner_parts: whether to apply [`remove_inner_parts`].
        remove_floaters: whether to apply [`remove_floaters`].
        fill_holes: whether to apply [`fill_holes`].
        num_faces: the number of triangles for [`simplify_mesh`]; no simplification if None.

    Raises:
        ImportError: on construction, if a library that a step needs is missing.
        ValueError: if `num_faces` is not None and not an integer of at least 4.
    """

    remove_inner_parts: bool = False
    remove_floaters: bool = False
    fill_holes: bool = False
    num_faces: int | None = None

    def __post_init__(self) -> None:
        for name in ("remove_inner_parts", "remove_floaters", "fill_holes"):
            check_choice(name, getattr(self, name), (False, True))
        if self.num_faces is not None:
            check_integer("num_faces", self.num_faces, 4)
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
        """Applies only the steps that remove whole parts."""
        if self.remove_inner_parts:
            mesh = remove_inner_parts(mesh)
        return remove_floaters(mesh) if self.remove_floaters else mesh

    def __call__(self, mesh: trimesh.Trimesh) -> trimesh.Trimesh:
        """Applies all steps; `mesh` itself is returned if there are none."""
        mesh = self.remove_parts(mesh)
        if self.fill_holes:
            mesh = fill_holes(mesh)
        return mesh if self.num_faces is None else simplify_mesh(mesh, self.num_faces)


def _parts(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The parts of a mesh.

    Returns:
        The part of each face `[F]`, and the lowest and highest corner of each part's bounding box, `[P, 3]` each.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    first, second, third = faces.astype(np.int32).T
    edges = np.concatenate([first, second]), np.concatenate([second, third])
    graph = coo_matrix((np.ones(len(edges[0]), dtype=bool), edges), shape=(len(vertices), len(vertices)))
    count, label = connected_components(graph, directed=False)
    # Vertices without faces are no parts.
    number, num_parts = _numbers(label[first], count)
    part_of_vertex = number[label]
    order = np.argsort(part_of_vertex, kind="stable")
    start, *starts = np.searchsorted(part_of_vertex[order], np.arange(num_parts + 1))
    corners = vertices[order[start:]]
    bounds = np.subtract([start, *starts[:-1]], start)
    return number[label[first]], np.minimum.reduceat(corners, bounds), np.maximum.reduceat(corners, bounds)


def _numbers(used: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Consecutive numbers for those of `count` things that occur in `used`, -1 for others, and how many there are."""
    occurs = np.zeros(count, dtype=bool)
    occurs[used.reshape(-1)] = True
    number = np.full(count, -1)
    number[occurs] = np.arange(occurs.sum())
    return number, int(occurs.sum())


def _select(mesh: trimesh.Trimesh, faces: np.ndarray) -> trimesh.Trimesh:
    """A mesh of those faces of `mesh` that the mask `faces [F]` selects, and of their vertices."""
    kept, vertices = np.asarray(mesh.faces)[faces], np.asarray(mesh.vertices)
    number, _ = _numbers(kept, len(vertices))
    return trimesh.Trimesh(vertices[number >= 0], number[kept], process=False)
