"""Augmentation: how the shapes of a mesh are deformed, decided by its id, their number and the seed alone."""

import numpy as np

from .deformation import Deformation
from .index import MeshEntry
from .settings import Settings
from .shapes import generator_of


# Shares of the shapes that are stretched, bent, mirrored, and turned by any angle instead of one of the range: fronts
# are seen more often than backs.
STRETCHED, BENT, MIRRORED, TURNED_AROUND = 0.6, 0.2, 0.5, 0.3


def deformation_of(entry: MeshEntry, settings: Settings) -> Deformation | None:
    """Returns what makes a shape of its mesh; None where nothing is augmented."""
    if not settings.augment:
        return None
    if entry.copy is None:
        generator = generator_of(f"turn {settings.seed} {entry.id}")
        return Deformation(turn(-generator.uniform(*settings.azimuth_range)), np.zeros(2))
    limits = (settings.stretch, settings.bend)
    return random_deformation(entry.mesh_id, entry.copy, settings.seed, settings.azimuth_range, *limits)


def random_deformation(
    mesh_id: str, copy: int, seed: int, azimuth_range: tuple[float, float], stretch: float, bend: float
) -> Deformation:
    """Returns a deformation that its first three arguments decide, alike on all machines.

    Args:
        mesh_id: Id of the mesh.
        copy: Number of the shape, from 0 on.
        seed: Seed of the dataset.
        azimuth_range: Where the camera that the shape faces afterwards is before, in degrees.
        stretch: Largest absolute logarithm of the factor of each axis.
        bend: Largest absolute value of `Deformation.bend`.
    """
    generator = generator_of(f"{seed} {mesh_id} {copy}")
    # All are drawn, so that one limit does not change what the others decide.
    around = generator.random() < TURNED_AROUND
    yaw = -generator.uniform(*((-180, 180) if around else azimuth_range))
    is_stretched, is_bent, is_mirrored = generator.random(3) < (STRETCHED, BENT, MIRRORED)
    factors = np.exp(stretch * is_stretched * generator.uniform(-1, 1, 3))
    bends = bend * is_bent * generator.uniform(-1, 1, 2)
    factors[0] *= -1 if is_mirrored else 1
    return Deformation(turn(yaw) @ np.diag(factors), bends)


def turn(yaw: float) -> np.ndarray:
    """Returns the matrix `[3, 3]` of a turn about y by degrees; minus the azimuth of a camera has a shape face it."""
    cos, sin = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    return np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
