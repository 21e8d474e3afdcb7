"""The settings that decide the bytes of a dataset, and the file in which its folder keeps them."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...data.folder import Folder
from ...data.index import SHARDS
from ...files import write_text


SETTINGS_FILE = "preparation.json"
# Bytes of a mesh at 256^3, and the power of the resolution with which they grow; of a picture with 224^2 pixels.
SDF_BYTES, SDF_POWER, PICTURE_BYTES, OCCUPANCY_BYTES = 4e6, 2.2, 15e3, 5e3
MAX_MESHES_PER_SHARD = 1024


@dataclass(frozen=True)
class Settings:
    """What a record depends on beside its mesh, and which meshes share a shard.

    Attributes:
        resolutions: Samples per axis of the SDFs, ascending.
        num_views: Renders per mesh.
        image_size: Edge of the pictures in pixels.
        azimuth_range: Range of the azimuths in degrees.
        elevation_range: Range of the elevations in degrees.
        focal_range: Range of the focal lengths in mm.
        webp_quality: Quality of the WebP files, from 0 to 100.
        seed: Seed of views and colours.
        up_axis: Axis of the meshes that points up, as on the command line.
        random_colors: Sources whose meshes get a random colour.
        rendered: Whether pictures are rendered here; otherwise a folder has them.
        renderer: What renders them: "embree" or "raster".
        augment: Shapes that are made of a mesh, as `[SOURCE=]N` of the command line; none: it is taken as it is.
        stretch: Largest absolute logarithm of the factor by which a shape is stretched along an axis.
        bend: Largest bend of a shape.
        dense_only: Whether records have no SDF.
        meshes_per_shard: Rows of the input whose meshes go into one shard.
    """

    resolutions: tuple[int, ...]
    num_views: int
    image_size: int
    azimuth_range: tuple[float, float]
    elevation_range: tuple[float, float]
    focal_range: tuple[float, float]
    webp_quality: int
    seed: int
    up_axis: tuple[str, ...] = ()
    random_colors: tuple[str, ...] = ()
    rendered: bool = True
    renderer: str = "embree"
    augment: tuple[str, ...] = ()
    stretch: float = 0.2
    bend: float = 0.2
    dense_only: bool = False
    meshes_per_shard: int = 64

    @property
    def sdf_resolutions(self) -> tuple[int, ...]:
        """Samples per axis of the SDFs that records have."""
        return () if self.dense_only else self.resolutions

    def shapes_per_mesh(self, source: str) -> float:
        """Returns how many shapes are made of a mesh of a source, in the mean; 1 where `augment` does not say."""
        numbers = dict(text.rpartition("=")[::2] for text in self.augment)
        return float(numbers.get(source, numbers.get("", 1)))


def meshes_per_shard(
    shard_bytes: float, resolutions: tuple[int, ...], num_views: int, image_size: int, shapes: float = 1
) -> int:
    """Returns how many ordinary meshes fill a shard of `shard_bytes` bytes.

    Args:
        shard_bytes: Bytes of a shard.
        resolutions: Of the SDFs.
        num_views: Pictures of a shape.
        image_size: Edge of the pictures in pixels.
        shapes: Shapes that are made of a mesh.
    """
    size = sum(SDF_BYTES * (resolution / 256) ** SDF_POWER for resolution in resolutions) or OCCUPANCY_BYTES
    size += PICTURE_BYTES * num_views * (image_size / 224) ** 2
    return max(1, min(MAX_MESHES_PER_SHARD, round(shard_bytes / (size * max(shapes, 1)))))


def recorded_settings(folder: Folder) -> Settings | None:
    """Returns the settings with which a dataset was prepared; None if its folder does not have them."""
    if not folder.exists(SETTINGS_FILE):
        return None
    recorded, names = json.loads(folder.read(SETTINGS_FILE)), {field.name for field in fields(Settings)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items() if name in names
    }
    return Settings(**values)


def claim_folder(folder: Path, settings: Settings) -> None:
    """Writes the settings into the folder of a dataset, or compares them with those with which it was begun.

    Raises:
        ValueError: if one of them differs, or the folder has shards of another origin, as of the format before.
    """
    path = folder / SETTINGS_FILE
    if not path.exists() and ((folder / SHARDS).exists() or any(folder.glob("shard-*.safetensors"))):
        raise ValueError(
            f"`output` must be a new folder or one that a preparation began, got {str(folder)!r}, which has other"
            " shards"
        )
    now = json.loads(json.dumps(asdict(settings)))
    # What was begun before a setting was there has its default.
    defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    if path.exists():
        begun = json.loads(json.dumps(defaults)) | json.loads(path.read_text(encoding="utf-8"))
        for field in fields(settings):
            if begun[field.name] != now[field.name]:
                raise ValueError(
                    f"`{field.name}` must be {begun[field.name]}, with which the dataset {folder} was begun, got"
                    f" {now[field.name]}: other settings need another folder"
                )
    else:
        write_text(path, json.dumps(now, indent=2) + "\n")
