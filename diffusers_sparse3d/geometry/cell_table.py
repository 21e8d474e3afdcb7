"""
The triangles of every configuration of a cell.

Derived from one rule per cube face, which both cells of a face share: the surface is closed, and every edge belongs to
two triangles.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor


# Corner c of a cell is at (c >> 2 & 1, c >> 1 & 1, c & 1). An edge is (lower corner, axis).
EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> (2 - axis) & 1]
# The index after the edges: a vertex inside the cell.
CENTER = len(EDGES)
# Corners of each face in cyclic order, counter-clockwise seen from outside the cell.
FACES = [
    (0, 1, 3, 2),  # x = 0
    (4, 6, 7, 5),  # x = 1
    (0, 4, 5, 1),  # y = 0
    (2, 3, 7, 6),  # y = 1
    (0, 2, 6, 4),  # z = 0
    (1, 5, 7, 3),  # z = 1
]


def _edge_between(first: int, second: int) -> int:
    low, high = min(first, second), max(first, second)
    return EDGES.index((low, {4: 0, 2: 1, 1: 2}[high - low]))


def _face_segments(face: tuple[int, ...], inside: list[bool], joined: bool) -> list[tuple[int, int]]:
    """
    Directed segments (from edge, to edge) of the surface on one face; with the direction chosen so that the loops they
    form turn their front to the outside. `joined` connects the two inside corners of an ambiguous face.
    """
    flags = [inside[corner] for corner in face]
    edges = [_edge_between(face[i], face[(i + 1) % 4]) for i in range(4)]
    entering = [edges[i] for i in range(4) if not flags[i] and flags[(i + 1) % 4]]
    leaving = [edges[i] for i in range(4) if flags[i] and not flags[(i + 1) % 4]]
    if len(entering) < 2:
        return list(zip(entering, leaving))
    # Around the face the edges alternate: each entering edge is followed by the leaving edge of the same corner.
    start = edges.index(entering[0])
    cycle = [edges[(start + i) % 4] for i in range(4)]
    if joined:
        return [(cycle[0], cycle[3]), (cycle[2], cycle[1])]
    return [(cycle[0], cycle[1]), (cycle[2], cycle[3])]


def _triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """
    Triangulates a loop of cell edges without diagonals in a face of the cell, where they could meet a diagonal of the
    next cell: around a vertex in its middle if there is no other way.
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
    corner, axis = EDGES[edge]
    return corner, corner | 4 >> axis


@lru_cache(maxsize=1)
def triangle_table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Triangles of every cell configuration, those of a configuration one after the other.

    Returns:
        `[T, 3]` int8, edges of each triangle, `CENTER` for a vertex inside the cell (always last); `[256 * 64]`
        int64, where each configuration starts, and how many triangles it has; `[256]` bool, whether there is an
        ambiguous face. Configuration: 64 * (bit c: corner c is inside) + (bit f: inside corners of face f are joined).
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
            follow = {}
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
