"""Records, and what a dataset has of a mesh.

Sections of a mesh, with R for each resolution and M for the number of its blocks of 8^3 samples that touch the narrow
band (the tokens of the sparse models):

    occupancy   "occupancy"  uint8           bits of the dense grid of (smallest R / 8)^3 cells, x slowest: which
                                             blocks there are
    sdf_R       "coords"     uint8 [M, 3]    coordinates of the blocks, in ascending (x, y, z) order
                "values"     float16 [M, 512]  s / tau in (-1, 1) inside the band, +1 outside and -1 inside the object;
                                             sample (x, y, z) of a block has the index 64 x + 8 y + z
                "sharp"      uint8 [M, 64]   bits of the 512 samples: in the band and near a sharp edge
    images      "0", "1"...  uint8           a WebP or PNG file with alpha each; renders first, given images last

Bits are packed as `numpy.packbits` does it: the first one is the highest of its byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..geometry.sdf import SDFBlocks
from .sections import content_hash, encode


BLOCK_SIZE = 8
# `format_version` in metadata.json. A higher one means sections or columns that this reader would misunderstand.
FORMAT_VERSION = 1
OCCUPANCY, IMAGES = "occupancy", "images"
# Columns of the cameras of renders, as docs/data.md defines them: angles in degrees, mm, lengths of model space, and
# halves of the square around the projected object.
CAMERA_COLUMNS = (
    *("azimuths", "elevations", "focal_lengths", "rolls"),
    *("distances", "scales", "right_shifts", "down_shifts"),
)
# The largest float16 below 1: values of the band stay below 1 in absolute value when they are rounded.
LARGEST_IN_BAND = 1 - 2**-11


@dataclass(frozen=True)
class Record:
    """What belongs to one sample, as it goes into a shard.

    Attributes:
        id: Name of the sample, unique in its dataset.
        sections: Bytes of each section, see `sections.encode`, in the order in which they are written.
        columns: Values of columns of the index.
        picture: A WebP or PNG file that shows the sample to people.
    """

    id: str
    sections: Mapping[str, bytes]
    columns: Mapping[str, Any] = field(default_factory=dict)
    picture: bytes | None = None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Content hash of each section, 32 hexadecimal digits."""
        return {name: content_hash([data]) for name, data in self.sections.items()}

    @property
    def hash(self) -> str:
        """Content hash of all sections and their names; columns and picture are not part of it."""
        return content_hash(part for name, digest in sorted(self.hashes.items()) for part in (name, digest))


def sdf_section(resolution: int) -> str:
    """Returns the name of the section of an SDF, sdf_R."""
    return f"sdf_{resolution}"


def mesh_section_names(resolutions: Sequence[int]) -> list[str]:
    """Returns the names of all sections of a mesh, in the order in which they are in a shard."""
    return [OCCUPANCY, *(sdf_section(resolution) for resolution in sorted(resolutions)), IMAGES]


def mesh_columns(resolutions: Sequence[int]) -> pa.Schema:
    """Returns the columns that the index of a dataset has beside those of every index, see `index.index_schema`.

    All may be null. `CAMERA_COLUMNS` have a number for each render; `tokens_R` are the blocks of the SDF and
    `voxels_R` the samples of its narrow band.
    """
    texts = [(name, pa.string()) for name in ("source", "category", "name", "license", "author", "split")]
    counts = [("num_images", pa.int32()), ("num_given", pa.int32())]
    cameras = [(name, pa.list_(pa.float32())) for name in CAMERA_COLUMNS]
    sizes = [
        (f"{name}_{resolution}", kind)
        for resolution in sorted(resolutions)
        for name, kind in (("tokens", pa.int32()), ("voxels", pa.int64()))
    ]
    return pa.schema([*texts, *counts, *cameras, *sizes])


def mesh_record(name: str, fields: Sequence[SDFBlocks], images: Sequence[bytes], /, **columns: Any) -> Record:
    """Returns the record of a mesh.

    Args:
        name: Id of the mesh.
        fields: SDF blocks of 8^3 samples at each resolution; the occupancy is that of the lowest one.
        images: WebP or PNG files with alpha; renders first, given images last. The first one is the picture.
        columns: Further columns of `mesh_columns` and of the dataset's own.

    Raises:
        ValueError: if there is no field, or two are of one resolution.
    """
    fields = sorted(fields, key=lambda blocks: blocks.resolution)
    if not fields or len({blocks.resolution for blocks in fields}) < len(fields):
        raise ValueError(f"`fields` must be of different resolutions, got {[blocks.resolution for blocks in fields]}")
    sections = {}
    sizes = {}
    for blocks in fields:
        sections[sdf_section(blocks.resolution)] = encode(_sdf_tensors(blocks))
        sizes[f"tokens_{blocks.resolution}"] = len(blocks.coords)
        sizes[f"voxels_{blocks.resolution}"] = int((blocks.values.abs() < 1).sum())
    size = fields[0].resolution // BLOCK_SIZE
    return _record(name, fields[0].coords, size, sections, images, {**sizes, **columns})


def occupancy_record(name: str, cells: Tensor, size: int, images: Sequence[bytes], /, **columns: Any) -> Record:
    """Returns the record of a mesh without an SDF, for the dense stage.

    Args:
        name: Id of the mesh.
        cells: Occupied cells of the dense grid, `[M, 3]`.
        size: Cells of the grid per axis.
        images: See `mesh_record`.
        columns: See `mesh_record`.
    """
    return _record(name, cells, size, {}, images, columns)


def _record(
    name: str,
    cells: Tensor,
    size: int,
    fields: Mapping[str, bytes],
    images: Sequence[bytes],
    columns: Mapping[str, Any],
) -> Record:
    sections = {OCCUPANCY: encode({OCCUPANCY: _occupancy_bits(cells, size)}), **fields}
    sections[IMAGES] = encode({str(k): np.frombuffer(data, dtype=np.uint8) for k, data in enumerate(images)})
    picture = bytes(images[0]) if images else None
    return Record(name, sections, {"num_images": len(images), **columns}, picture)


def pack_bits(flags: Tensor) -> Tensor:
    """Returns flags, `[..., 8 n]` bool, as bits, the first one the highest of its byte: `[..., n]` uint8."""
    return torch.from_numpy(np.packbits(flags.cpu().numpy(), axis=-1))


def unpack_bits(bits: Tensor) -> Tensor:
    """Returns bits, `[..., n]` uint8, as flags `[..., 8 n]` bool on the same device: the reverse of `pack_bits`."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> places & 1).bool().flatten(-2)


def _occupancy_bits(cells: Tensor, size: int) -> np.ndarray:
    grid = np.zeros((size,) * 3, dtype=bool)
    grid[tuple(cells.T.cpu().numpy())] = True
    return np.packbits(grid)


def _sdf_tensors(blocks: SDFBlocks) -> dict[str, np.ndarray]:
    values = blocks.values.flatten(1)
    values = torch.where(values.abs() < 1, values.clamp(-LARGEST_IN_BAND, LARGEST_IN_BAND), values)
    return {
        "coords": blocks.coords.to(torch.uint8).numpy(),
        "values": values.half().numpy(),
        "sharp": pack_bits(blocks.sharp.flatten(1)).numpy(),
    }
