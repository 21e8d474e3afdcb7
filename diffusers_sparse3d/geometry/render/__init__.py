"""
Pictures of meshes.

- `pictures.py`: previews, and meshes side by side.
- `renderer.py`: views of a mesh, and the ray caster.
- `styles.py`: normal maps and wireframes.
- `lights.py`: the directions of the camera and of the lights.
- `surface.py`: triangles with normals, colours and textures, from any mesh.
- `rasterizer/`: many pictures at a time by a z-buffer, on a CPU or a GPU.
"""

from .pictures import preview, side_by_side
from .renderer import MeshRenderer, render_mesh_views
from .styles import STYLES
from .surface import BASE_COLOR, UP_ROTATIONS, Surface, corner_normals, load_surface


__all__ = [
    "BASE_COLOR",
    "STYLES",
    "UP_ROTATIONS",
    "MeshRenderer",
    "Surface",
    "corner_normals",
    "load_surface",
    "preview",
    "render_mesh_views",
    "side_by_side",
]
