"""The surface of a set of cells."""

import numpy as np
import pytest

from diffusers_sparse3d.geometry.cell_mesh import cells_to_mesh


def test_a_block_of_cells_is_a_closed_box():
    cells = np.stack(np.meshgrid([2, 3], [1, 2, 3], [0], indexing="ij"), axis=-1).reshape(-1, 3)
    mesh = cells_to_mesh(cells, 4)
    assert mesh.is_watertight and len(mesh.faces) == 2 * (2 * 6 + 2 * 2 + 2 * 3)
    np.testing.assert_allclose(mesh.bounds, [[0, -0.5, -1], [1, 1, -0.5]])
    # Outward: the signed volume is that of six cells of half a unit.
    np.testing.assert_allclose(mesh.volume, 6 * 0.5**3)


def test_cells_that_do_not_touch():
    mesh = cells_to_mesh(np.array([[0, 0, 0], [2, 2, 2]]), 3)
    assert len(mesh.faces) == 24 and mesh.body_count == 2


@pytest.mark.parametrize(
    "cells", [np.zeros((0, 3), dtype=int), np.array([[0, 0, 4]]), np.array([[-1, 0, 0]]), np.zeros(3)]
)
def test_what_does_not_fit(cells):
    with pytest.raises(ValueError, match="`coords`"):
        cells_to_mesh(cells, 4)
