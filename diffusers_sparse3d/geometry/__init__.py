"""
Geometry: meshes, sparse signed distance fields, and the way between them.

- `mesh.py`: loading, normalising and exporting meshes.
- `sdf/`: mesh to sparse signed distance field.
- `marching_cubes/`: sparse signed distance field to mesh.
- `surface_cells.py`: the cells of a latent grid near a mesh.
- `clean_up.py`: inner parts, floaters, holes, simplification.
- `metrics.py`: Chamfer distance, F1, normal consistency, volume IoU.
- `render/`: pictures of meshes.
- `distance.py`, `rasterized_distance.py`: exact distances to a mesh, on a CPU and on a GPU.
"""
