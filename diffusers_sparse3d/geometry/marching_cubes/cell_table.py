"""
The triangles of marching cubes for every configuration of a cell.

The table is derived from one rule for the faces of a cell. Two cells that share a face apply the same rule to it, so
their triangles meet there: the surface is closed, and each of its edges belongs to two triangles.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor


# Corner c of a cell is at (c >> 2 & 1, c >> 1 & 1, c & 1). An edge is a pair (lower corner, axis).
EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> (2 - axis) & 1]
# Stands for a vertex inside the cell, where triangles name their corners by the edges of the cell.
CENTER = len(EDGES)
# The corners of each face in cyclic order, counter-clockwise seen from outside the cell.
FACES = [
    (0, 1, 3, 2),  # x = 0
    (4, 6, 7, 5),  # x = 1
    (0, 4, 5, 1),  # y = 0
    (2, 3, 7, 6),  # y = 1
    (0, 2, 6, 4),  # z = 0
    (1, 5, 7, 3),  # z = 1
]


def _edge_between(first: int, second: int) -> int:
    """The index of the edge between two neighbouring corners."""
    low, high = min(first, second), max(first, second)
    return EDGES.index((low, {4: 0, 2: 1, 1: 2}[high - low]))


def _face_segments(face: tuple[int, ...], inside: list[bool], joined: bool) -> list[tuple[int, int]]:
    """
    The directed segments in which the surface crosses one face of a cell, as pairs (from edge, to edge).

    The directions are such that the loops formed by the segments of all faces give triangles that point outward.

    Args:
        face: the four corners of the face, as in `FACES`.
        inside: for each corner of the cell, whether it lies inside the object.
        joined: on a face whose inside corners are diagonally opposite, whether the surface leaves them connected.
    """
    flags = [inside[corner] for corner in face]
    edges = [_edge_between(face[i], face[(i + 1) % 4]) for i in range(4)]
    entering = [edges[i] for i in range(4) if not flags[i] and flags[(i + 1) % 4]]
    leaving = [edges[i] for i in range(4) if flags[i] and not flags[(i + 1) % 4]]
    if len(entering) < 2:
        return list(zip(entering, leaving))
    # Around the face entering and leaving edges alternate; an entering edge is followed by the leaving edge of the
    # same inside corner.
    start = edges.index(entering[0])
    cycle = [edges[(start + i) % 4] for i in range(4)]
    if joined:
        return [(cycle[0], cycle[3]), (cycle[2], cycle[1])]
    return [(cycle[0], cycle[1]), (cycle[2], cycle[3])]


def _triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """
    Triangles, as triples of cell edges, that fill a closed loop of cell edges.

    No diagonal lies in a face of the cell, where it could coincide with a diagonal of the neighbouring cell. If every
    triangulation has such a diagonal, the triangles form a fan around `CENTER`.
    """

    def in_face(first: int, second: int) -> bool:
        return any(set(ends(first)) <= set(face) and set(ends(second)) <= set(face) for face in FACES)

    @cache
    def best(start: int, end: int) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        if end - start < 2:
            return 0, ()
        options = []
        for middle in range(start + 1, end):
            left, right = best(start, middle), best(middle, end)
            cost = left[0] + right[0]
            cost += middle - start > 1 and in_face(loop[start], loop[middle])
            cost += end - middle > 1 and in_face(loop[middle], loop[end])
            options.append((cost, left[1] + ((loop[start], loop[middle], loop[end]),) + right[1]))
        return min(options)

    cost, triangles = best(0, len(loop) - 1)
    return [(*edge, CENTER) for edge in zip(loop, loop[1:] + loop[:1])] if cost else list(triangles)


def ends(edge: int) -> tuple[int, int]:
    """The lower and the upper corner of an edge of a cell."""
    corner, axis = EDGES[edge]
    return corner, corner | 4 >> axis


@lru_cache(maxsize=1)
def triangle_table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The triangles of every cell configuration, sorted by configuration.

    The number of a configuration is 64 * corners + joined: bit c of `corners` says that corner c is inside, bit f of
    `joined` that the inside corners of the ambiguous face f are connected on that face.

    Returns:
        - triangles `[T, 3]` int8: the three cell edges of each triangle; `CENTER`, always last, stands for a vertex
          inside the cell.
        - starts `[256 * 64]` int64: the first triangle of each configuration.
        - counts `[256 * 64]` int64: the number of triangles of each configuration.
        - has_ambiguous `[256]` bool: for each value of `corners`, whether any face is ambiguous.
    """
    triangles: list[tuple[int, int, int]] = []
    starts, counts = torch.zeros(2, 256 * 64, dtype=torch.int64)
    has_ambiguous = torch.zeros(256, dtype=torch.bool)
    for corners in range(256):
        inside = [bool(corners >> corner & 1) for corner in range(8)]
        ambiguous = [
            index
            for index, face in enumerate(FACES)
            if inside[face[0]] == inside[face[2]] != inside[face[1]] == inside[face[3]]
        ]
        has_ambiguous[corners] = bool(ambiguous)
        ambiguous_bits = sum(1 << index for index in ambiguous)
        for joined in range(64):
            if joined & ~ambiguous_bits:
                continue
            follow: dict[int, int] = {}
            for index, face in enumerate(FACES):
                follow.update(_face_segments(face, inside, bool(joined >> index & 1)))
            row = 64 * corners + joined
            starts[row] = len(triangles)
            while follow:
                loop = [min(follow)]
                while (following := follow.pop(loop[-1])) != loop[0]:
                    loop.append(following)
                triangles += _triangulate(loop)
            counts[row] = len(triangles) - starts[row]
    return torch.tensor(triangles, dtype=torch.int8), starts, counts, has_ambiguous
