"""
Marching cubes on sparse samples.

Follows the surface from cell to cell, so memory and time grow with the surface alone. The table is derived from one
rule per cube face, which both cells of a face share: the surface is closed, and every edge belongs to two triangles.
"""

from functools import cache, lru_cache

import torch
import trimesh
from torch import Tensor


BLOCK_SIZE = 8
# How far, in samples, the surface is followed out of the sampled region: two latent blocks.
MAX_EXTENSION = 16
# From here on, what the samples around an empty block say of its side is clear.
CLEAR_SIDE = 0.5
RELAXATION_STEPS = 32

# Corner c of a cell is at (c >> 2 & 1, c >> 1 & 1, c & 1). An edge is (lower corner, axis).
_EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> (2 - axis) & 1]
# The index after the edges: a vertex inside the cell.
_CENTER = len(_EDGES)
# Corners of each face in cyclic order, counter-clockwise seen from outside the cell.
_FACES = [
    (0, 1, 3, 2),  # x = 0
    (4, 6, 7, 5),  # x = 1
    (0, 4, 5, 1),  # y = 0
    (2, 3, 7, 6),  # y = 1
    (0, 2, 6, 4),  # z = 0
    (1, 5, 7, 3),  # z = 1
]


def _edge_between(first: int, second: int) -> int:
    low, high = min(first, second), max(first, second)
    return _EDGES.index((low, {4: 0, 2: 1, 1: 2}[high - low]))


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
        return any(set(_ends(first)) <= set(face) and set(_ends(second)) <= set(face) for face in _FACES)

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
    return [(*edge, _CENTER) for edge in zip(loop, loop[1:] + loop[:1])] if cost else list(triangles)


def _ends(edge: int) -> tuple[int, int]:
    corner, axis = _EDGES[edge]
    return corner, corner | 4 >> axis


@lru_cache(maxsize=1)
def _triangle_table() -> tuple[Tensor, Tensor]:
    """
    Triangles of every cell configuration.

    Returns:
        `[256 * 64, T, 3]` int8, edges of each triangle, 12 for a vertex inside the cell (always last), -1 where
        there is no triangle; and `[256 * 64]` int64, the number of triangles. Row: 64 * (bit c: corner c is inside) +
        (bit f: inside corners of face f are joined).
    """
    triangles = {}
    for corners in range(256):
        inside = [bool(corners >> corner & 1) for corner in range(8)]
        ambiguous = [
            index
            for index, face in enumerate(_FACES)
            if inside[face[0]] == inside[face[2]] != inside[face[1]] == inside[face[3]]
        ]
        ambiguous_bits = sum(1 << index for index in ambiguous)
        for joined in range(64):
            if joined & ~ambiguous_bits:
                continue
            follow = {}
            for index, face in enumerate(_FACES):
                follow.update(_face_segments(face, inside, bool(joined >> index & 1)))
            result = []
            while follow:
                loop = [min(follow)]
                while (following := follow.pop(loop[-1])) != loop[0]:
                    loop.append(following)
                result += _triangulate(loop)
            triangles[64 * corners + joined] = result
    counts = torch.zeros(256 * 64, dtype=torch.int64)
    table = torch.full((256 * 64, max(map(len, triangles.values())), 3), -1, dtype=torch.int8)
    for row, result in triangles.items():
        counts[row] = len(result)
        if result:
            table[row, : len(result)] = torch.tensor(result, dtype=torch.int8)
    return table, counts


class _Samples:
    """Random access to sparse samples, stored as blocks of 8^3; what lies outside the grid is outside the object."""

    def __init__(self, coords: Tensor, values: Tensor, resolution: int):
        self.resolution = resolution
        # One block of margin on each side, for the samples just outside the grid.
        self.per_axis = -(-resolution // BLOCK_SIZE) + 2
        self.table = torch.full((self.per_axis**3,), -1, dtype=torch.int64, device=coords.device)
        self.values = torch.empty(0, dtype=values.dtype, device=coords.device)
        self.store(coords, values)

    def address(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place in the block, `[n]` each, of samples `[n, 3]`."""
        block = torch.div(coords, BLOCK_SIZE, rounding_mode="floor")
        local = coords - block * BLOCK_SIZE
        block = block + 1
        return (
            (block[:, 0] * self.per_axis + block[:, 1]) * self.per_axis + block[:, 2],
            (local[:, 0] * BLOCK_SIZE + local[:, 1]) * BLOCK_SIZE + local[:, 2],
        )

    def store(self, coords: Tensor, values: Tensor) -> None:
        block, local = self.address(coords)
        new = torch.unique(block[self.table[block] < 0])
        self.table[new] = len(self.values) // BLOCK_SIZE**3 + torch.arange(len(new), device=new.device)
        self.values = torch.cat([self.values, self.values.new_full((len(new) * BLOCK_SIZE**3,), torch.nan)])
        self.values[self.table[block] * BLOCK_SIZE**3 + local] = values

    def lookup(self, coords: Tensor, beyond: float = 1.0) -> Tensor:
        """Values `[n]` at `[n, 3]`: NaN where there is no sample, `beyond` outside the grid."""
        block, local = self.address(coords.clamp(-1, self.resolution))
        row = self.table[block]
        values = self.values[row.clamp(min=0) * BLOCK_SIZE**3 + local]
        values = torch.where(row < 0, torch.nan, values)
        in_grid = ((coords >= 0) & (coords < self.resolution)).all(dim=1)
        return torch.where(in_grid, values, beyond)


def _empty_sides(samples: _Samples) -> Tensor:
    """
    The side `[P^3]` in [-1, 1] that blocks without any sample are on; 0 for all others.

    It spreads from the faces of the blocks with samples, as heat does: a few wrong samples, or a hole in the surface,
    leave it clear elsewhere. Blocks far from all samples stay near 0; no surface gets there.
    """
    blocks = samples.values.view(-1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE).clamp(-1, 1)
    empty = (samples.table < 0).view((samples.per_axis,) * 3)
    total, count = torch.zeros(2, *empty.shape, device=empty.device)
    neighbours = []
    for axis in range(3):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        for here, there, place in ((ahead, behind, BLOCK_SIZE - 1), (behind, ahead, 0)):
            here, there = tuple(here), tuple(there)
            means = blocks.select(axis + 1, place).flatten(1).nanmean(dim=1)
            face = torch.where(empty, torch.nan, means[samples.table.clamp(min=0)].view(empty.shape))[there]
            total[here] += face.nan_to_num()
            count[here] += ~face.isnan() | empty[there]
            neighbours.append((here, there))
    side = torch.zeros_like(total)
    for _ in range(RELAXATION_STEPS):
        spread = total.clone()
        for here, there in neighbours:
            spread[here] += side[there]
        side = torch.where(empty, spread / count.clamp(min=1), 0)
    return side.flatten()


def _offsets(span: range, device: torch.device) -> Tensor:
    axis = torch.arange(span.start, span.stop, device=device)
    return torch.cartesian_prod(axis, axis, axis)


def _surface_cells(samples: _Samples, coords: Tensor) -> Tensor:
    """
    Cells `[n, 3]` (by their lowest corner, ascending) that the surface crosses; gives `samples` the corners they lack.

    Corners without a sample, in a block without any, are on the side of the samples around it where that is clear.
    All others get the mean of the samples next to them. Of a narrow band that is the sign of the side that they are
    on: the surface keeps a distance of a spacing from them. Where the surface itself leaves the samples it is followed
    straight on, which bridges gaps; after `MAX_EXTENSION` samples all that is still unknown beside it counts as
    outside, which closes it. A face of the grid that cuts an object off is filled whole.
    """
    device = coords.device
    axes = torch.eye(3, dtype=torch.int64, device=device)
    corners, around = _offsets(range(2), device), _offsets(range(-1, 2), device)
    # The nearest samples decide; the others only where there is none.
    nearness = 1e-3 ** around.square().sum(dim=1).float()
    side_of_block = _empty_sides(samples)
    size = samples.resolution + 2
    cells = torch.empty(0, dtype=torch.int64, device=device)
    new = coords
    extension = 0
    while len(new):
        value = samples.lookup(new)
        keys = [cells]
        for axis in range(3):
            for sign in (1, -1):
                neighbour = samples.lookup(new + sign * axes[axis])
                crossing = ((value < 0) != (neighbour < 0)) & ~neighbour.isnan()
                lower = new[crossing] - (axes[axis] if sign < 0 else 0)
                # The four cells around the edge.
                shift = corners[corners[:, axis] == 0]
                cell = (lower[:, None] - shift).reshape(-1, 3) + 1
                keys.append(((cell[:, 0] * size + cell[:, 1]) * size + cell[:, 2]).unique())
        grown = torch.cat(keys).unique()
        fresh = grown[~torch.isin(grown, cells, assume_unique=True)]
        cells = grown
        fresh = torch.stack([fresh // size**2, fresh // size % size, fresh % size], dim=1) - 1
        corner = (fresh[:, None] + corners).reshape(-1, 3)
        missing = corner[samples.lookup(corner).isnan()].unique(dim=0)
        known = samples.lookup((missing[:, None] + around).reshape(-1, 3), beyond=torch.nan).view(-1, 27)
        weight = torch.where(known.isnan(), 0.0, nearness)
        context = (known.nan_to_num() * weight).sum(dim=1) / weight.sum(dim=1)
        if extension >= MAX_EXTENSION:
            at_border = ((missing == 0) | (missing == samples.resolution - 1)).any(dim=1)
            context = torch.where(at_border, context, torch.ones_like(context))
        side = side_of_block[samples.address(missing)[0]]
        context = torch.where(side.abs() >= CLEAR_SIDE, side.sign(), context)
        samples.store(missing, context)
        new = missing
        extension += 1
    return torch.stack([cells // size**2, cells // size % size, cells % size], dim=1) - 1


def sparse_sdf_to_mesh(feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0) -> trimesh.Trimesh:
    """
    Iso-surface of a sparse signed distance field, by marching cubes on the active cells alone.

    Vertices lie on the grid's edges by linear interpolation, each once: those of marching cubes on the dense grid.
    Ambiguous faces are resolved by the sign of the bilinear saddle, the same from both sides, and a few ambiguous
    cells get one vertex inside, so the surface is closed and each of its edges belongs to two triangles. The part of
    the grid without samples takes the side of the samples next to it, and what lies outside the grid is
    outside the object: a shape that the grid cuts off is closed there.

    Args:
        feats: `[N, 1]` or `[N]`, s / tau, negative inside; any floating dtype.
        coords: `[N, 4]` (batch, x, y, z) integers, all of one sample, or `[N, 3]`.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        level: the iso-level, in the units of `feats`.

    Returns:
        A `trimesh.Trimesh` in the model cube [-1, 1]^3, faces turned outward. Without a crossing it is empty.

    Raises:
        ValueError: if `feats` is not finite, `coords` holds several samples or leaves the grid, or shapes differ.
    """
    if coords.ndim != 2 or coords.shape[1] not in (3, 4) or coords.is_floating_point():
        raise ValueError(
            f"`coords` must be integers of shape [N, 4] or [N, 3], got {coords.dtype} {list(coords.shape)}."
        )
    if feats.numel() != len(coords):
        raise ValueError(
            f"`feats` must have one value per row of `coords`, got {list(feats.shape)} for {len(coords)}."
        )
    if coords.shape[1] == 4:
        if len(coords) and (coords[:, 0] != coords[0, 0]).any():
            raise ValueError("`coords` must belong to one sample; split the batch first.")
        coords = coords[:, 1:]
    if len(coords) and not (int(coords.min()) >= 0 and int(coords.max()) < resolution):
        raise ValueError(f"`coords` must lie in [0, {resolution}).")
    values = feats.detach().reshape(-1).to(torch.float32) - level
    if not values.isfinite().all():
        raise ValueError("`feats` must be finite.")

    if len(coords) == 0:
        return trimesh.Trimesh(process=False)
    coords = coords.to(torch.int64)
    samples = _Samples(coords, values, resolution)
    cells = _surface_cells(samples, coords)
    if len(cells) == 0:
        return trimesh.Trimesh(process=False)
    corners = _offsets(range(2), coords.device)
    cell_values = torch.stack([samples.lookup(cells + corner) for corner in corners], dim=1)

    # Row of the table.
    inside = cell_values < 0
    bits = 2 ** torch.arange(8, device=coords.device)
    row = 64 * (inside * bits).sum(dim=1)
    face = torch.tensor(_FACES, device=coords.device)
    diagonal = cell_values[:, face[:, 0]] * cell_values[:, face[:, 2]]
    other = cell_values[:, face[:, 1]] * cell_values[:, face[:, 3]]
    first, second = inside[:, face[:, 0]], inside[:, face[:, 1]]
    ambiguous = (first == inside[:, face[:, 2]]) & (second == inside[:, face[:, 3]]) & (first != second)
    joined = ambiguous & torch.where(first, diagonal > other, other > diagonal)
    row = row + (joined * bits[:6]).sum(dim=1)

    # Triangles, as edges of the grid, which are then welded.
    table, counts = (tensor.to(coords.device) for tensor in _triangle_table())
    # A vertex inside the cell is addressed as axis 3 of its lowest corner.
    edge_corner = torch.tensor([corner for corner, _ in _EDGES] + [0], device=coords.device)
    edge_axis = torch.tensor([axis for _, axis in _EDGES] + [3], device=coords.device)
    used = torch.arange(table.shape[1], device=coords.device) < counts[row][:, None]
    cell_index = used.nonzero()[:, 0]
    local_edge = table[row][used].to(torch.int64)
    lower = cells[cell_index][:, None] + corners[edge_corner[local_edge]] + 1
    size = resolution + 2
    key = ((lower[..., 0] * size + lower[..., 1]) * size + lower[..., 2]) * 4 + edge_axis[local_edge]
    edges, faces = torch.unique(key, return_inverse=True)

    axis, edges = edges % 4, edges // 4
    lower = torch.stack([edges // size**2, edges // size % size, edges % size], dim=1) - 1
    direction = torch.eye(4, 3, dtype=torch.int64, device=coords.device)[axis]
    start, end = samples.lookup(lower).double(), samples.lookup(lower + direction).double()
    vertices = lower + direction * (start / (start - end))[:, None]
    # In the middle of the vertices around it, each of which is the first one of a triangle that it ends.
    around, _, center = faces[local_edge[:, 2] == _CENTER].unbind(1)
    middle = torch.zeros_like(vertices).index_add_(0, center, vertices[around])
    count = torch.bincount(center, minlength=len(vertices))[:, None]
    vertices = torch.where(count > 0, middle / count.clamp(min=1), vertices)
    vertices = (vertices.clamp(0, resolution - 1) * (2 / (resolution - 1))) - 1
    return trimesh.Trimesh(vertices.cpu().numpy(), faces.cpu().numpy(), process=False)
