"""
Pictures of meshes.

- `renderer.py`: the public functions and the ray caster.
- `lights.py`: the directions of the camera and of the lights.
- `surface.py`: triangles with normals, colours and textures, from any mesh.
"""

from .renderer import MeshRenderer, preview, render_mesh_views
from .surface import BASE_COLOR, UP_ROTATIONS, Surface, corner_normals, load_surface


__all__ = [
    "BASE_COLOR",
    "UP_ROTATIONS",
    "MeshRenderer",
    "Surface",
    "corner_normals",
    "load_surface",
    "preview",
    "render_mesh_views",
]
