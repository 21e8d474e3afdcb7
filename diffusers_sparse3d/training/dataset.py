"""The training dataset: the format of its files, and the class that reads them.

A dataset is a folder with `index.csv` (one row per mesh, with its shard and the azimuths of its renders in degrees),
`metadata.json`, a dataset card, and shards `shard-00000.safetensors`, ..., which have for each mesh ID and resolution
R:

    {ID}/sdf_{R}/coords  uint8 [M, 3]       blocks of 8^3 samples that touch the narrow band, ascending: the latent
                                            coordinates
    {ID}/sdf_{R}/values  float16 [M, 512]   s / tau in (-1, 1) inside the band, +1 outside and -1 inside the object;
                                            sample (x, y, z) of a block has the index 64 x + 8 y + z
    {ID}/sdf_{R}/sharp   uint8 [M, 64]      bits of the 512 samples: in the band and near a sharp edge
    {ID}/occupancy       uint8              bits of the dense grid of (smallest R / 8)^3 cells: which blocks there are
    {ID}/images/{k}      uint8              a WebP or PNG file with alpha; renders first, given images last
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from safetensors import safe_open

from ..geometry.sdf import SDFBlocks


BLOCK_SIZE = 8


class SparseSDFDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset of meshes as sparse SDFs, dense occupancies and images.

    `dataset[index]` gives the first of `resolution`; `dataset[index, resolution]` gives another one. An item is a dict
    with:

        - **id** (`str`), **index** (`int`)
        - **coords** (`Tensor` [N, 3] int32), **feats** (`Tensor` [N, 1] float32): the narrow band, s / tau
        - **block_coords** (`Tensor` [M, 3] int32), **block_values** (`Tensor` [M, 512] float32), **block_sharp**
          (`Tensor` [M, 512] bool): the blocks around it, as in the module's docstring
        - **occupancy** (`Tensor` [1, D, D, D] float32): 0 and 1
        - **image** (`Tensor` [4, S, S] float32): RGBA in [0, 1], not premultiplied

    The choice of the view and the colour jitter draw from torch's global generator, which data loaders seed in their
    workers.

    Args:
        root: Folder of the dataset.
        split: "train" or "val"; both if None.
        resolution: Samples per axis of the SDFs, one or several; all that the dataset has if None.
        sdf: Whether items have the SDF.
        occupancy: Whether items have the occupancy.
        image: Whether items have an image.
        view: Index of the image, modulo their number (-1: the last one, which is the given image where there is one);
            a random one if None.
        color_jitter: Brightness, contrast and saturation of the image are multiplied by random factors from
            [1 - color_jitter, 1 + color_jitter].

    Raises:
        ValueError: if the dataset lacks a resolution or has no mesh in the split.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        resolution: int | list[int] | None = None,
        *,
        sdf: bool = True,
        occupancy: bool = True,
        image: bool = True,
        view: int | None = None,
        color_jitter: float = 0.0,
    ):
        self.root = Path(root)
        self.metadata = json.loads((self.root / "metadata.json").read_text(encoding="utf-8"))
        self.dense_resolution: int = self.metadata["dense_resolution"]
        if isinstance(resolution, int):
            resolution = [resolution]
        self.resolutions: list[int] = self.metadata["resolutions"] if resolution is None else resolution
        missing = sorted(set(self.resolutions) - set(self.metadata["resolutions"]))
        if missing:
            raise ValueError(
                f"`resolution` must be of {self.metadata['resolutions']}, which the dataset {root} has, got {missing}"
            )
        with (self.root / "index.csv").open(newline="", encoding="utf-8") as file:
            self.rows = [row for row in csv.DictReader(file) if split is None or row["split"] == split]
        if not self.rows:
            raise ValueError(f"`split` must name a split of the dataset {root} with a mesh in it, got {split!r}")
        self.sdf, self.occupancy, self.image = sdf, occupancy, image
        self.view, self.color_jitter = view, color_jitter
        self._shards: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        """Ids of the meshes."""
        return [row["id"] for row in self.rows]

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to the workers of a data loader; each worker opens its own.
        return {**self.__dict__, "_shards": {}}

    def _shard(self, row: dict[str, str]) -> Any:
        number = row["shard"]
        if number not in self._shards:
            self._shards[number] = safe_open(self.root / f"shard-{int(number):05d}.safetensors", "pt")
        return self._shards[number]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, resolution = key if isinstance(key, tuple) else (key, self.resolutions[0])
        row = self.rows[index]
        shard = self._shard(row)
        item: dict[str, Any] = {"id": row["id"], "index": index, "resolution": resolution}
        if self.sdf:
            blocks = self.blocks(index, resolution)
            item["coords"], item["feats"], _ = blocks.band()
            item["block_coords"] = blocks.coords
            item["block_values"], item["block_sharp"] = blocks.values.flatten(1), blocks.sharp.flatten(1)
        if self.occupancy:
            size = self.dense_resolution
            bits = np.unpackbits(shard.get_tensor(f"{row['id']}/occupancy").numpy(), count=size**3)
            item["occupancy"] = torch.from_numpy(bits.reshape(1, size, size, size)).float()
        if self.image:
            count = int(row["num_images"])
            view = int(torch.randint(count, ())) if self.view is None else self.view % count
            image = jitter_color(self.picture(index, view), self.color_jitter)
            item["image"] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return item

    def blocks(self, index: int, resolution: int) -> SDFBlocks:
        """Returns the SDF blocks of a mesh as `mesh_to_sdf_blocks` made them, with values rounded to float16."""
        row = self.rows[index]
        shard, prefix = self._shard(row), f"{row['id']}/sdf_{resolution}"
        shape = (-1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
        sharp = np.unpackbits(shard.get_tensor(f"{prefix}/sharp").numpy(), axis=1)
        return SDFBlocks(
            coords=shard.get_tensor(f"{prefix}/coords").int(),
            values=shard.get_tensor(f"{prefix}/values").float().reshape(shape),
            sharp=torch.from_numpy(sharp).bool().reshape(shape),
            resolution=resolution,
        )

    def num_blocks(self, resolution: int) -> np.ndarray:
        """Returns the number of blocks of each mesh at a resolution, `[N]` int64, from the headers of the shards."""
        slices = (self._shard(row).get_slice(f"{row['id']}/sdf_{resolution}/coords") for row in self.rows)
        return np.array([part.get_shape()[0] for part in slices], dtype=np.int64)

    def azimuths(self, index: int) -> list[float]:
        """Returns the azimuth of each image of a mesh in degrees, 0 at the front and 90 from +x, or NaN."""
        row = self.rows[index]
        known = [float(azimuth) for azimuth in (row.get("azimuths") or "").split()]
        return known + [math.nan] * (int(row["num_images"]) - len(known))

    def picture(self, index: int, view: int) -> Image.Image:
        """Returns image `view` of a mesh, RGBA."""
        row = self.rows[index]
        data = self._shard(row).get_tensor(f"{row['id']}/images/{view}").numpy().tobytes()
        return Image.open(io.BytesIO(data)).convert("RGBA")


def dataset_splits(root: str | Path) -> set[str]:
    """Returns the names of the splits of a dataset that have a mesh in them."""
    with (Path(root) / "index.csv").open(newline="", encoding="utf-8") as file:
        return {row["split"] for row in csv.DictReader(file)}


def jitter_color(image: Image.Image, strength: float) -> Image.Image:
    """Multiplies brightness, contrast and saturation by random factors in [1 - strength, 1 + strength]."""
    if strength == 0:
        return image
    alpha = image.getchannel("A")
    image = image.convert("RGB")
    factors = 1 + strength * (2 * torch.rand(3) - 1)
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors.tolist()):
        image = enhance(image).enhance(factor)
    image.putalpha(alpha)
    return image
