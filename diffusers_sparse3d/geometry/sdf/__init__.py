"""
Mesh to sparse signed distance field.

- `narrow_band.py`: the public functions; exact signed distances in a narrow band.
- `outer_surface.py`: the sign, by a flood fill from outside, and the part of the surface that counts.
- `grid_crossings.py`: crossings of grid edges with triangles.
- `point_distance.py`: distance of samples to the nearest of many points.
- `block_grid.py`: storage for samples near the surface, and the flood fill; kernels of both are in `../kernels`.
"""

from .narrow_band import SDFBlocks, mesh_to_sdf_blocks, mesh_to_sparse_sdf, narrow_band_width


__all__ = ["SDFBlocks", "mesh_to_sdf_blocks", "mesh_to_sparse_sdf", "narrow_band_width"]
