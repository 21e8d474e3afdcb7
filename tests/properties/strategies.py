"""Random voxels, meshes, and values of every kind."""

import numpy as np
import torch
import trimesh
from hypothesis import strategies as st


# What may be given for a number by mistake, and numbers.
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**9, -(10**9), 2**63]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=3),
    st.lists(st.integers(-1, 9), max_size=3),
    st.dictionaries(st.text(max_size=1), st.integers(), max_size=1),
)


@st.composite
def voxels(draw: st.DrawFn, size: int = 6, samples: int = 3, least: int = 0, most: int = 40) -> torch.Tensor:
    """`[N, 4]` int32, distinct rows in any order, of up to `samples` samples, some of them empty."""
    row = st.tuples(st.integers(0, samples - 1), *[st.integers(0, size - 1)] * 3)
    rows = draw(st.lists(row, min_size=least, max_size=most, unique=True))
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)


@st.composite
def meshes(draw: st.DrawFn, most_vertices: int = 12, most_faces: int = 16) -> trimesh.Trimesh:
    """Triangles on few vertices: open, crossing, degenerate, doubled, at any scale."""
    coordinate = st.sampled_from([-1.0, -0.5, 0.0, 1e-7, 0.3, 1.0]) | st.floats(-1, 1)
    vertices = draw(st.lists(st.tuples(*[coordinate] * 3), min_size=3, max_size=most_vertices))
    corner = st.integers(0, len(vertices) - 1)
    faces = draw(st.lists(st.tuples(*[corner] * 3), min_size=1, max_size=most_faces))
    scale = 10.0 ** draw(st.sampled_from([0, 0, 0, -12, 12]))
    return trimesh.Trimesh(np.array(vertices) * scale, np.array(faces), process=False)
