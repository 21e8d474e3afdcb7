"""
Ways to show a surface other than by light: its normals, and its triangles.
"""

import numpy as np

from .surface import GAMMA


STYLES = ("shaded", "normals", "wireframe")
# Width of the lines between triangles, in pixels, and their linear grey.
LINE_WIDTH = 1.0
LINE_COLOR = 0.02


def normal_light(normals: np.ndarray, axes: tuple[np.ndarray, np.ndarray, np.ndarray], exposure: float) -> np.ndarray:
    """
    The light that appears as the normal map in camera space: red to the right, green up, blue to the viewer.

    Args:
        normals: `[P, 3]`, unit normals turned towards the viewer.
        axes: right, up and backward unit vectors `[3]` of the camera.
        exposure: of the response `(1 - exp(-exposure light))^(1 / GAMMA)`, which is undone here.

    Returns:
        `[P, 3]`, linear.
    """
    color = np.clip(0.5 + 0.5 * normals @ np.stack(axes, axis=1), 0, 0.995)
    return -np.log1p(-(color**GAMMA)) / exposure


def on_edge(corners: np.ndarray, weights: np.ndarray, pixel_size: np.ndarray) -> np.ndarray:
    """
    Whether points lie on the line between two triangles.

    Args:
        corners: `[P, 3, 3]`, of the triangle of each point.
        weights: `[P, 3]`, barycentric coordinates of each point.
        pixel_size: `[P]`, width of a pixel at each point, in the units of the corners.

    Returns:
        `[P]` bool.
    """
    sides = corners[:, [2, 0, 1]] - corners[:, [1, 2, 0]]
    double_area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    # The distance to the side opposite of a corner is the corner's weight times its height over that side.
    heights = double_area[:, None] / np.maximum(np.linalg.norm(sides, axis=2), 1e-12)
    return (weights * heights).min(axis=1) < 0.5 * LINE_WIDTH * pixel_size
