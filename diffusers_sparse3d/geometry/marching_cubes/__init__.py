"""
Marching cubes on sparse samples, without a dense volume.

- `extraction.py`: the public functions; vertices and faces from the crossed cells.
- `crossed_cells.py`: which edges and cells of the grid the surface crosses, and each crossed cell's configuration.
- `cell_table.py`: the triangles of every configuration of a cell.
- `surface_completion.py`: values for corners that crossed cells lack, where the surface leaves the samples.
- `sparse_samples.py`, `tile_index.py`: the samples, and the index of the tiles that hold them.
- `sample_bits.py`: planes of bits, and operations on them.

The terms (tile, plane of bits, place, pass) are defined in `sample_bits.py`.
"""

from .extraction import sparse_marching_cubes, sparse_sdf_to_mesh


__all__ = ["sparse_marching_cubes", "sparse_sdf_to_mesh"]
