"""
Many pictures of meshes at a time by a z-buffer in plain PyTorch, on a CPU or a GPU: for training data.

- `rasterizer.py`: pictures of views.
- `views.py`: cameras, lights and materials of pictures, and random ones.
- `packed_surfaces.py`: surfaces in one set of tensors.
- `projection.py`: triangles on the screens of cameras and of lights.
- `depth_buffer.py`: which triangle each pixel shows.
- `fragments.py`: the points of surfaces that pixels show.
- `materials.py`: their colours.
- `lighting.py`: the light that they receive, and shadows.
"""

from .packed_surfaces import PackedSurfaces
from .rasterizer import rasterize_views
from .views import Cameras, LightSettings, Materials, Views, concatenate_views, random_views


__all__ = [
    "Cameras",
    "LightSettings",
    "Materials",
    "PackedSurfaces",
    "Views",
    "concatenate_views",
    "random_views",
    "rasterize_views",
]
