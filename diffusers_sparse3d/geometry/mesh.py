"""Loading, normalising and exporting meshes."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import trimesh

from ..checks import check_choice, check_positive
from ..files import written_beside


# A normalised mesh fills 0.95 of the model cube, so its longest side is 1.9.
NORMALIZED_SCALE = 0.95
EXPORT_SUFFIXES = (".glb", ".obj", ".stl", ".ply", ".3mf")

MeshLike = trimesh.Trimesh | trimesh.Scene | str | Path


def check_mesh(mesh: trimesh.Trimesh, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """
    The vertices `[V, 3]` float64 and faces `[F, 3]` int64 of a mesh, checked: libraries in C take them on trust.

    Args:
        mesh: the mesh; it may be empty.
        finite: whether vertices must be finite, as far as faces have them.

    Raises:
        TypeError: if `mesh` is no Trimesh.
        ValueError: if it has faces of vertices that do not exist or are not finite.
    """
    if not isinstance(mesh, trimesh.Trimesh):
        raise TypeError(f"`mesh` must be a trimesh.Trimesh, got {type(mesh).__name__}")
    vertices = np.asarray(mesh.vertices, dtype=np.float64).reshape(-1, 3)
    faces = np.asarray(mesh.faces, dtype=np.int64).reshape(-1, 3)
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise ValueError(f"`mesh` has faces that refer to vertices beyond its {len(vertices)}.")
    if finite and not np.isfinite(vertices).all() and not np.isfinite(vertices[faces]).all():
        raise ValueError("`mesh` must have finite vertices, got NaN or infinity.")
    return vertices, faces


def load_mesh(mesh: MeshLike) -> trimesh.Trimesh:
    """
    The triangles of a mesh, a scene or a file as one mesh for geometry processing.

    Materials and textures are left out, the parts of a scene are concatenated with their transforms applied, and
    polygons are triangulated. Vertices of exactly equal position are merged where they leave a surface open, as those
    of `.stl` and along seams of textures do, or where an edge joins them; solids that touch stay apart. Faces that
    have a vertex that is not finite, or that this leaves with fewer than three corners, are dropped. Of other faces
    without area, which may close a surface, only those that reach beyond the bounding box of the rest are dropped. The
    input is not modified.

    Args:
        mesh: a `trimesh.Trimesh`, a `trimesh.Scene`, or the path of any file that trimesh can load.

    Returns:
        A new `trimesh.Trimesh` with at least one face; its vertices are float64 in the units of the input.

    Raises:
        ValueError: if `mesh` holds no usable triangle, or faces of vertices that do not exist.
    """
    source = repr(str(mesh)) if isinstance(mesh, (str, Path)) else type(mesh).__name__
    if isinstance(mesh, (str, Path)):
        mesh = _read_scene(Path(mesh))
    if isinstance(mesh, trimesh.Scene):
        mesh = mesh.to_mesh()
    if not isinstance(mesh, trimesh.Trimesh):
        raise ValueError(f"`mesh` must be a Trimesh, a Scene or a path, got {source}.")

    vertices, faces = check_mesh(mesh, finite=False)
    faces = _welded(vertices, faces[np.isfinite(vertices[faces]).all(axis=(1, 2))])
    corners = vertices[faces]
    proper = (np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) != 0).any(axis=1)
    if not proper.any():
        raise ValueError(f"`mesh` ({source}) has no triangle with a positive area and finite vertices.")
    if not proper.all():
        # The bounding box is that of pictures of the mesh, where faces without area do not count.
        seen = corners[proper].reshape(-1, 3)
        faces = faces[proper | ((corners >= seen.min(axis=0)) & (corners <= seen.max(axis=0))).all(axis=(1, 2))]
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    return trimesh.Trimesh(vertices[used], (np.cumsum(used) - 1)[faces], process=False)


def _welded(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """
    The faces `[G, 3]` with three different corners, after vertices of exactly equal position were merged.

    Those at open edges and those that an edge joins are merged, into the first of them. Others are left: they are
    where solids touch, and merging them would give an edge four faces.
    """
    # Others would hide open edges.
    faces = _with_three_corners(faces)
    if len(faces) == 0:
        return faces
    first, second = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    # Sorting one integer is many times faster than sorting two columns.
    edges = np.minimum(first, second) * len(vertices) + np.maximum(first, second)
    edges.sort()
    changes = np.concatenate([[True], edges[1:] != edges[:-1], [True]])
    to_merge = np.zeros(len(vertices), dtype=bool)
    to_merge[np.concatenate(np.divmod(edges[changes[1:] & changes[:-1]], len(vertices)))] = True
    joined = (vertices[first] == vertices[second]).all(axis=1)
    to_merge[first[joined]] = to_merge[second[joined]] = True
    candidates = np.flatnonzero(to_merge)
    candidates = candidates[np.lexsort(vertices[candidates].T)]
    positions = vertices[candidates]
    starts = np.ones(len(candidates), dtype=bool)
    starts[1:] = (positions[1:] != positions[:-1]).any(axis=1)
    kept = np.arange(len(vertices))
    # The sort is stable: the first of equal ones has the lowest number.
    kept[candidates] = candidates[starts][np.cumsum(starts) - 1]
    return _with_three_corners(kept[faces])


def _with_three_corners(faces: np.ndarray) -> np.ndarray:
    """Those of the faces `[F, 3]` whose three vertices differ."""
    return faces[(faces != np.roll(faces, -1, axis=1)).all(axis=1)]


def _read_scene(path: Path) -> trimesh.Scene:
    """The scene in a file; a ValueError says what is wrong with a file that is damaged or of an unknown format."""
    if not path.is_file():
        state = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(f"`mesh` must be a file, got {str(path)!r}, which is {state}")
    try:
        return trimesh.load_scene(path, process=False, skip_materials=True)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"`mesh` ({path}) cannot be read: {error}") from error
    except MemoryError:
        raise
    # trimesh meets damaged files with errors of many classes.
    except Exception as error:
        known = path.suffix.lower().lstrip(".") in trimesh.available_formats()
        reason = f"the file is damaged ({type(error).__name__}: {error})" if known else "its format is not known"
        raise ValueError(f"`mesh` ({path}) cannot be read: {reason}") from error


def fit_to_model_cube(vertices: np.ndarray) -> tuple[np.ndarray, float]:
    """
    The centre of the bounding box of a mesh, and the scale that makes its longest side 1.9.

    Args:
        vertices: `[V, 3]`, the vertices of the mesh.

    Returns:
        The centre `[3]`, and the scale.

    Raises:
        ValueError: if `vertices` are no such array, or the bounding box is empty or not finite; the message then
            names `mesh`.
    """
    vertices = np.asarray(vertices)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not len(vertices) or vertices.dtype.kind not in "iuf":
        raise ValueError(f"`vertices` must be numbers [V, 3] with V > 0, got {vertices.dtype} {list(vertices.shape)}")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    longest = float((high - low).max())
    # The inverse of a smaller side is infinite.
    if not np.isfinite(longest) or longest < np.finfo(float).tiny:
        raise ValueError(f"`mesh` must have a finite bounding box of positive size, its longest side is {longest}.")
    return (low + high) / 2, 2 * NORMALIZED_SCALE / longest


def normalize_mesh(mesh: trimesh.Trimesh) -> tuple[trimesh.Trimesh, np.ndarray, float]:
    """
    A copy of a mesh, centred in the model cube [-1, 1]^3 by its bounding box and scaled to a longest side of 1.9.

    Args:
        mesh: a mesh in any units; not modified.

    Returns:
        The normalised copy, the centre `[3]` of the original bounding box, and the scale, so that
        `normalised = (original - center) * scale`.

    Raises:
        ValueError: if `mesh` has no faces, or its bounding box is empty or not finite.
    """
    vertices, faces = check_mesh(mesh)
    if len(faces) == 0:
        raise ValueError("`mesh` must have faces, got none.")
    center, scale = fit_to_model_cube(vertices)
    normalized = mesh.copy()
    normalized.vertices = (mesh.vertices - center) * scale
    return normalized, center, scale


def check_export_support(path: str | Path) -> None:
    """
    Check that [`export_mesh`] can write a file with this suffix.

    Raises:
        ValueError: if the suffix is none of `EXPORT_SUFFIXES`.
        ImportError: for `.3mf`, if lxml or networkx is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise ValueError(f"`path` must end in one of {', '.join(EXPORT_SUFFIXES)}, got {str(path)!r}.")
    missing = [name for name in ("lxml", "networkx") if suffix == ".3mf" and find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ImportError(f".3mf files need {names}: `pip install 'diffusers_sparse3d[mesh]'` installs it.")


def export_mesh(mesh: trimesh.Trimesh, path: str | Path, up_axis: str = "y", scale: float = 1.0) -> Path:
    """
    Writes a mesh with its normals to a file, which is the old or the new one at any moment.

    glTF is y up and in metres by its specification, and Blender turns it to its own z on import. Blender's importer of
    OBJ takes y for up by default, too; its importers of STL and PLY, and slicers, take z.

    Args:
        mesh: the mesh, y up as model space and glTF are.
        path: the file; its suffix, `.glb`, `.obj`, `.stl`, `.ply` or `.3mf`, selects the format. Missing folders are
            created. The unit of `.3mf` is the millimetre.
        up_axis: the axis that points up in the file: "y", or "z" for programs with that convention, such as slicers
            for 3D printing.
        scale: factor from the units of the mesh to those of the file.

    Returns:
        The path of the file.

    Raises:
        TypeError: if `mesh` is no Trimesh or `path` no path.
        ValueError: if the suffix of `path` or `up_axis` is none of these, or `scale` is not positive and finite.
        ImportError: for `.3mf`, if lxml or networkx is missing.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"`path` must be a path, got {type(path).__name__}")
    path = Path(path)
    check_export_support(path)
    suffix = path.suffix.lower()
    check_choice("up_axis", up_axis, ("y", "z"))
    check_mesh(mesh)
    scale = check_positive("scale", scale)
    if up_axis == "z" or scale != 1:
        x, y, z = np.asarray(mesh.vertices).T * scale
        vertices = [x, -z, y] if up_axis == "z" else [x, y, z]
        mesh = trimesh.Trimesh(np.stack(vertices, axis=1), mesh.faces, process=False)
    options = {".glb": {"include_normals": True}, ".obj": {"include_normals": True}, ".ply": {"vertex_normal": True}}
    with written_beside(path) as partial:
        mesh.export(partial, file_type=suffix[1:], **options.get(suffix, {}))
    return path
