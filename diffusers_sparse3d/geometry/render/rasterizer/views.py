"""
What pictures are taken with: cameras, lights and materials, and random ones.

Angles are in degrees throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor


# How the surface of a picture is coloured, see `Materials.style`.
OWN_COLORS, ONE_COLOR, NOISE, CHECKER = range(4)


@dataclass(frozen=True)
class Cameras:
    """
    Cameras that look at the origin, from where the bounding sphere of the surface fits the sensor.

    Attributes:
        azimuth: `[B]`, 0 looks at the front (from +z), 90 from +x.
        elevation: `[B]`, positive from above.
        focal_mm: `[B]`, focal length for a sensor 36 mm wide.
        roll: `[B]`, turn of the camera about its axis; positive ones turn the picture clockwise.
    """

    azimuth: Tensor
    elevation: Tensor
    focal_mm: Tensor
    roll: Tensor


@dataclass(frozen=True)
class LightSettings:
    """
    The light of pictures.

    Attributes:
        key: `[B, 2]`, azimuth relative to the camera's, and elevation, of the main light.
        key_strength: `[B]`, of the main light.
        ambient: `[B]`, strength of the light from all directions.
        shadow: `[B]`, the share of the main light that shadows keep off, 0 to 1.
        specular, gloss: `[B]`, strength and exponent of highlights.
        exposure: `[B]`, of the response `(1 - exp(-exposure light))^(1 / 2.2)`.
    """

    key: Tensor
    key_strength: Tensor
    ambient: Tensor
    shadow: Tensor
    specular: Tensor
    gloss: Tensor
    exposure: Tensor


@dataclass(frozen=True)
class Materials:
    """
    The colours of the surface of each picture.

    Attributes:
        style: `[B]` int64: `OWN_COLORS` of the surface times `tint`, `ONE_COLOR`, a mixture of both colours by smooth
            `NOISE`, or a three-dimensional `CHECKER` board of them.
        color: `[B, 2, 3]`, linear RGB.
        tint: `[B, 3]`, factors of linear RGB.
        frequency: `[B]`, features of noise or board in a unit of length.
        seed: `[B]` int64, of the noise.
    """

    style: Tensor
    color: Tensor
    tint: Tensor
    frequency: Tensor
    seed: Tensor


@dataclass(frozen=True)
class Views:
    """The B pictures that are to be taken. All tensors are float32 but for those said to be int64."""

    cameras: Cameras
    lights: LightSettings
    materials: Materials

    def __len__(self) -> int:
        return len(self.cameras.azimuth)

    def to(self, device: torch.device | str) -> Views:
        """The views with all tensors on a device."""
        return _mapped(lambda tensors: tensors[0].to(device), [self])


Settings = TypeVar("Settings")


def concatenate_views(views: Sequence[Views]) -> Views:
    """All pictures of several views, one after the other; at least one."""
    return _mapped(torch.cat, views)


def _mapped(function: Any, settings: Sequence[Settings]) -> Settings:
    """Settings whose tensors are `function` of the list of those of several settings."""
    made = {}
    for field in fields(settings[0]):  # type: ignore[arg-type]
        values = [getattr(each, field.name) for each in settings]
        made[field.name] = function(values) if isinstance(values[0], Tensor) else _mapped(function, values)
    return type(settings[0])(**made)


def random_views(
    count: int,
    generator: np.random.Generator,
    azimuth_range: tuple[float, float] = (0.0, 0.0),
    elevation_range: tuple[float, float] = (-10.0, 60.0),
    focal_range: tuple[float, float] = (25.0, 250.0),
    own_colors: bool = True,
) -> Views:
    """
    Random cameras, lights and materials.

    Angles are uniform in their ranges and focal lengths uniform in their logarithms; a quarter of the cameras is
    rolled by up to 5 degrees. Six in ten pictures show the own colours of the surface.

    Args:
        count: number of pictures.
        generator: decides everything.
        azimuth_range: in degrees; the default is for surfaces that face the camera.
        elevation_range: in degrees.
        focal_range: in mm.
        own_colors: whether the surface has colours of its own; pictures that would show them have one colour if not.

    Raises:
        ValueError: if a focal length is not positive.
    """
    if min(focal_range) <= 0:
        raise ValueError(f"`focal_range` must be positive, got {focal_range}")

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return generator.uniform(low, high, (count, *shape))

    def chance(share: float) -> np.ndarray:
        return generator.random(count) < share

    cameras = Cameras(
        azimuth=_tensor(uniform(*azimuth_range)),
        elevation=_tensor(uniform(*elevation_range)),
        focal_mm=_tensor(np.exp(uniform(math.log(focal_range[0]), math.log(focal_range[1])))),
        roll=_tensor(np.where(chance(0.25), uniform(-5, 5), 0.0)),
    )
    lights = LightSettings(
        key=_tensor(np.stack([uniform(-80, 80), uniform(15, 75)], axis=1)),
        key_strength=_tensor(uniform(0.5, 1.2)),
        ambient=_tensor(uniform(0.3, 0.75)),
        shadow=_tensor(np.where(chance(0.3), 0.0, uniform(0.4, 1.0))),
        specular=_tensor(np.where(chance(0.5), uniform(0, 0.4), 0.0)),
        gloss=_tensor(uniform(8, 80)),
        exposure=_tensor(uniform(1.1, 2.0)),
    )
    style = generator.choice(4, count, p=[0.62, 0.2, 0.11, 0.07])
    if not own_colors:
        style[style == OWN_COLORS] = ONE_COLOR
    hue, value = uniform(0, 1), uniform(0.08, 1.0)
    # A third of all things is nearly grey.
    saturation = uniform(0, 1) ** 1.3 * np.where(chance(0.35), 0.1, 1.0)
    first = _linear_color(hue, saturation, value)
    second = _linear_color((hue + uniform(-0.15, 0.15)) % 1, saturation * uniform(0, 1), uniform(0.05, 1.0))
    tint = np.where(chance(0.4)[:, None], uniform(0.6, 1.5, 1) * (1 + uniform(-0.25, 0.25, 3)), 1.0)
    materials = Materials(
        style=torch.from_numpy(style.astype(np.int64)),
        color=_tensor(np.stack([first, second], axis=1)),
        tint=_tensor(tint),
        frequency=_tensor(2 ** uniform(0.5, 4.5)),
        seed=torch.from_numpy(generator.integers(0, 1 << 31, count)),
    )
    return Views(cameras, lights, materials)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _linear_color(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Linear RGB `[B, 3]` of hue, saturation and value, `[B]` each in [0, 1]."""
    distance = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3)
    share = 1 - np.clip(distance - 1, 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * share)) ** 2.2
