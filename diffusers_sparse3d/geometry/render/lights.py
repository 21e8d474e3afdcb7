"""
Directions of the camera and of the lights of a picture.
"""

from dataclasses import dataclass

import numpy as np


# Rays per pixel and axis.
SUBPIXELS = 2


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """`vectors [..., d]`, scaled to length 1."""
    return vectors / np.sqrt(np.maximum(np.einsum("...d,...d", vectors, vectors), 1e-38))[..., None]


def camera_axes(azimuth: float, elevation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The right, up and backward unit vectors `[3]` of a camera that looks at the origin; angles in radians."""
    backward = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)], dtype=np.float32)
    back = np.array(backward, dtype=np.float32)
    return right, np.cross(back, right), back


@dataclass
class Lights:
    """
    Unit vectors towards the lights for the P rays of a pixel; alike for all pixels, so that pictures have no noise.

    Attributes:
        key: `[P, 3]` float32, the main light, in slightly different directions, which makes its shadows soft.
        fill: `[3]` float32, a light from the other side, which casts no shadows.
        sky: `[P, K, 3]` float32, ambient light from directions spread evenly over the sphere.
    """

    key: np.ndarray
    fill: np.ndarray
    sky: np.ndarray

    @classmethod
    def around(cls, azimuth: float, key_light: tuple[float, float], sky_rays: int) -> "Lights":
        """
        Lights that turn with the camera.

        Args:
            azimuth: of the camera, in radians.
            key_light: azimuth relative to the camera's, and elevation, of the main light in degrees.
            sky_rays: K, the directions of ambient light of each ray.
        """
        rays = SUBPIXELS**2
        key_azimuth, key_elevation = np.deg2rad(key_light)
        right, up, toward_key = camera_axes(azimuth + key_azimuth, key_elevation)
        angle = 2 * np.pi * (np.arange(rays)[:, None] + 0.4) / rays
        key = unit_vectors(toward_key + 0.06 * (np.cos(angle) * right + np.sin(angle) * up)).astype(np.float32)
        fill = camera_axes(azimuth - key_azimuth, 0.2)[2].astype(np.float32)
        # Each ray gets every P-th point of a Fibonacci sphere; these are evenly spread, too.
        index = np.arange(rays * sky_rays) + 0.5
        height, longitude = 1 - 2 * index / len(index), np.pi * (1 + 5**0.5) * index
        radius = np.sqrt(1 - height**2)
        sphere = np.stack([radius * np.cos(longitude), height, radius * np.sin(longitude)], axis=1).astype(np.float32)
        return cls(key=key, fill=fill, sky=sphere.reshape(sky_rays, rays, 3).transpose(1, 0, 2))
