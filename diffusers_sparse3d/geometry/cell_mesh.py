"""The surface of a set of cells, to show what a dense stage has found."""

import numpy as np
import trimesh

from ..checks import check_integer
from ..ops.coordinates import MAX_RESOLUTION


# The corners of a cell's face towards +x, +y and +z, seen from outside against the clock; (0, 0, 0) to (1, 1, 1).
_FACES = np.array([[[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]], [[0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 0]],
                   [[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]]])  # fmt: skip


def cells_to_mesh(coords: np.ndarray, resolution: int) -> trimesh.Trimesh:
    """
    The faces between cells of a set and all other cells, as triangles in model space [-1, 1]^3, oriented outward.

    Args:
        coords: `[N, 3]` integers, the cells, from 0 up to `resolution - 1`.
        resolution: cells per axis.

    Raises:
        ValueError: if there is no cell, or one lies outside the grid, or `resolution` is out of range.
    """
    resolution = check_integer("resolution", resolution, 1, MAX_RESOLUTION)
    coords = np.asarray(coords)
    if coords.ndim != 2 or coords.shape[1] != 3 or len(coords) == 0 or coords.dtype.kind not in "iu":
        raise ValueError(
            f"`coords` must be integers of shape [N, 3] with N > 0, got {coords.dtype} {list(coords.shape)}"
        )
    if coords.min() < 0 or coords.max() >= resolution:
        raise ValueError(f"`coords` must be from 0 to {resolution - 1}, got {coords.min()} to {coords.max()}")
    occupied = np.zeros((resolution + 2,) * 3, dtype=bool)
    occupied[tuple(coords.T + 1)] = True
    quads = []
    for axis in range(3):
        for side in (1, -1):
            exposed = coords[~occupied[tuple((coords + 1 + side * np.eye(3, dtype=int)[axis]).T)]]
            corners = _FACES[axis] if side == 1 else _FACES[axis][::-1] - np.eye(3, dtype=int)[axis]
            quads.append(exposed[:, None] + corners)
    corners, faces = np.unique(np.concatenate(quads).reshape(-1, 3), axis=0, return_inverse=True)
    faces = faces.reshape(-1, 4)
    triangles = np.concatenate([faces[:, [0, 1, 2]], faces[:, [0, 2, 3]]])
    return trimesh.Trimesh(corners / resolution * 2 - 1, triangles, process=False)
