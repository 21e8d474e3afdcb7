"""The training dataset: meshes as sparse SDFs, occupancies and pictures.

A dataset is a folder, local or in an object store, with `metadata.json`, a dataset card, and records in the format of
`diffusers_sparse3d.data`; `diffusers_sparse3d/data/records.py` says what a record has of a mesh. Folders of the format
before it, with `index.csv`, are read too.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ..data.folder import Folder
from ..data.index import INDEX, read_index
from ..data.old_format import OLD_INDEX, OldRecords
from ..data.range_cache import RangeCache
from ..data.reader import RecordReader, section_columns
from ..data.records import BLOCK_SIZE, FORMAT_VERSION, IMAGES, OCCUPANCY, sdf_section, unpack_bits
from ..geometry.sdf import SDFBlocks
from .configuration import TrainingConfig


__all__ = ["BLOCK_SIZE", "SparseSDFDataset", "dataset_splits", "jitter_color"]


class SparseSDFDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset of meshes as sparse SDFs, dense occupancies and images.

    `dataset[index]` gives the first of `resolution`; `dataset[index, resolution]` gives another one. An item is a dict
    with:

        - **id** (`str`), **index** (`int`)
        - **coords** (`Tensor` [N, 3] int32), **feats** (`Tensor` [N, 1] float32): the narrow band, s / tau
        - **block_coords** (`Tensor` [M, 3] int32), **block_values** (`Tensor` [M, 512] float32), **block_sharp**
          (`Tensor` [M, 512] bool): the blocks around it
        - **occupancy** (`Tensor` [1, D, D, D] float32): 0 and 1
        - **image** (`Tensor` [4, S, S] float32): RGBA in [0, 1], not premultiplied

    The choice of the view and the colour jitter draw from torch's global generator, which data loaders seed in their
    workers. The index is in memory as columns, of the sections alone that items have: about 150 bytes for each mesh.

    Args:
        root: Folder of the dataset, or its address.
        split: "train" or "val"; both if None.
        resolution: Samples per axis of the SDFs, one or several; all that the dataset has if None.
        sdf: Whether items have the SDF.
        occupancy: Whether items have the occupancy.
        image: Whether items have an image.
        view: Index of the image, modulo their number (-1: the last one, which is the given image where there is one);
            a random one if None.
        color_jitter: Brightness, contrast and saturation of the image are multiplied by random factors from
            [1 - color_jitter, 1 + color_jitter].
        columns: Further columns of the index that `row` gives.

    Raises:
        ValueError: if the dataset lacks a resolution, has no SDF where items are to have it, or has no mesh in the
            split.
    """

    def __init__(
        self,
        root: str | Path | Folder,
        split: str | None = None,
        resolution: int | list[int] | None = None,
        *,
        sdf: bool = True,
        occupancy: bool = True,
        image: bool = True,
        view: int | None = None,
        color_jitter: float = 0.0,
        columns: Sequence[str] = (),
    ):
        self.folder = Folder(root)
        if not self.folder.exists("metadata.json"):
            raise ValueError(f"`root` must be a dataset, got {str(root)!r}, which has no metadata.json")
        self.metadata = json.loads(self.folder.read("metadata.json"))
        version = self.metadata.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"`root` must be a dataset of format_version {FORMAT_VERSION} or before, {root} has format_version"
                f" {version}: a newer version of diffusers_sparse3d reads it"
            )
        self.dense_resolution: int = self.metadata["dense_resolution"]
        if isinstance(resolution, int):
            resolution = [resolution]
        self.resolutions: list[int] = self.metadata["resolutions"] if resolution is None else resolution
        missing = sorted(set(self.resolutions) - set(self.metadata["resolutions"]))
        if missing:
            raise ValueError(
                f"`resolution` must be of {self.metadata['resolutions']}, which the dataset {root} has, got {missing}"
            )
        if sdf and not self.resolutions:
            raise ValueError(f"`sdf` must be False for a dataset without SDFs, got True for {root}")
        self.sdf, self.occupancy, self.image = sdf, occupancy, image
        self.view, self.color_jitter = view, color_jitter
        self.split = split
        self._rows: pa.Array | None = None
        self.records: RecordReader | OldRecords
        if has_index(self.folder):
            sections = [sdf_section(number) for number in self.resolutions] + [OCCUPANCY, IMAGES]
            tokens = [f"tokens_{number}" for number in self.resolutions]
            names = ["id", "num_images", "azimuths", *tokens, *columns, *section_columns(self.folder, sections)]
            self.records = RecordReader(self.folder, read_index(self.folder, names, split))
        else:
            self.records = OldRecords(self.folder, self.resolutions, split)
        if not len(self.records):
            raise ValueError(f"`split` must name a split of the dataset {root} with a mesh in it, got {split!r}")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def table(self) -> pa.Table:
        """The columns of the index that are in memory, one row for each mesh."""
        return self.records.table

    @property
    def ids(self) -> "Texts":
        """Ids of the meshes."""
        return Texts(self.table["id"])

    @property
    def num_images(self) -> np.ndarray:
        """Number of images of each mesh, `[N]` int64."""
        return self.table["num_images"].to_numpy().astype(np.int64)

    def row(self, index: int) -> dict[str, Any]:
        """Returns the values of a mesh in all columns that are in memory; texts are never None."""
        (row,) = self.table.slice(index, 1).to_pylist()
        texts = {name for name in self.table.column_names if pa.types.is_string(_value_type(self.table[name].type))}
        return {name: "" if value is None and name in texts else value for name, value in row.items()}

    def find(self, name: str) -> int:
        """Returns the index of the mesh with an id.

        Raises:
            ValueError: if there is none.
        """
        index = pc.index(self.table["id"], name).as_py()
        if index < 0:
            raise ValueError(f"`name` must be the id of a mesh of {self.folder}, got {name!r}")
        return int(index)

    def select(self, indices: Sequence[int] | range) -> "SparseSDFDataset":
        """Returns the dataset of some meshes, in the given order."""
        selected = object.__new__(SparseSDFDataset)
        rows = pa.array(indices, pa.int64())
        kept = rows if self._rows is None else self._rows.take(rows)
        selected.__dict__.update(self.__dict__, records=self.records.select(rows), _rows=kept)
        return selected

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, resolution = key if isinstance(key, tuple) else (key, next(iter(self.resolutions), 0))
        item: dict[str, Any] = {"id": self.ids[index], "index": index, "resolution": resolution}
        if self.sdf:
            blocks = self.blocks(index, resolution)
            item["coords"], item["feats"], _ = blocks.band()
            item["block_coords"] = blocks.coords
            item["block_values"], item["block_sharp"] = blocks.values.flatten(1), blocks.sharp.flatten(1)
        if self.occupancy:
            item["occupancy"] = self.occupied_cells(index).float()
        if self.image:
            count = self.table["num_images"][index].as_py()
            view = int(torch.randint(count, ())) if self.view is None else self.view % count
            image = jitter_color(self.picture(index, view), self.color_jitter)
            item["image"] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return item

    def packed_blocks(self, index: int, resolution: int) -> dict[str, Tensor]:
        """Returns the SDF blocks of a mesh as they are stored.

        Returns:
            `coords` `[M, 3]` uint8, `values` `[M, 512]` float16, and `sharp` `[M, 64]` uint8, bits of the samples.
        """
        return self.records.read(index, sdf_section(resolution))

    def blocks(self, index: int, resolution: int) -> SDFBlocks:
        """Returns the SDF blocks of a mesh as `mesh_to_sdf_blocks` made them, with values rounded to float16."""
        packed = self.packed_blocks(index, resolution)
        shape = (-1, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
        return SDFBlocks(
            coords=packed["coords"].int(),
            values=packed["values"].float().reshape(shape),
            sharp=unpack_bits(packed["sharp"]).reshape(shape),
            resolution=resolution,
        )

    def occupied_cells(self, index: int) -> Tensor:
        """Returns the dense occupancy of a mesh, `[1, D, D, D]` bool."""
        size = self.dense_resolution
        return unpack_bits(self.records.read(index, OCCUPANCY)[OCCUPANCY])[: size**3].reshape(1, size, size, size)

    def num_blocks(self, resolution: int) -> np.ndarray:
        """Returns the number of blocks of each mesh at a resolution, `[N]` int64."""
        return self.table[f"tokens_{resolution}"].to_numpy().astype(np.int64)

    def azimuths(self, index: int) -> list[float]:
        """Returns the azimuth of each image of a mesh in degrees, 0 at the front and 90 from +x, or NaN."""
        known = self.table["azimuths"][index].as_py() or []
        return known + [float("nan")] * (self.table["num_images"][index].as_py() - len(known))

    def all_azimuths(self) -> np.ndarray:
        """Returns the different azimuths of images of all meshes, `[A]` float64; NaN where one is not known."""
        views = self.table["azimuths"]
        known = pc.unique(pc.list_flatten(views)).to_numpy(zero_copy_only=False).astype(np.float64)
        lacking = pc.any(pc.less(pc.fill_null(pc.list_value_length(views), 0), self.table["num_images"]))
        return np.append(known, np.nan) if lacking.as_py() else known

    def pictures(self, index: int) -> list[Image.Image]:
        """Returns all images of a mesh, RGBA."""
        files = self.records.read(index, IMAGES)
        return [_open_image(files[str(view)]) for view in range(len(files))]

    def picture(self, index: int, view: int) -> Image.Image:
        """Returns image `view` of a mesh, RGBA."""
        return _open_image(self.records.read(index, IMAGES)[str(view)])

    def content(self, section: str) -> pa.Array | pa.ChunkedArray:
        """Returns the content hash of a section of each mesh, 32 hexadecimal digits."""
        if isinstance(self.records, OldRecords):
            return self.records.hashes(section)
        hashes = read_index(self.folder, [f"{section}_hash"], self.split).column(0)
        return hashes if self._rows is None else hashes.take(self._rows)


class Texts(Sequence[str]):
    """A column of texts as a sequence, which makes strings of those alone that are asked for."""

    def __init__(self, column: pa.ChunkedArray):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.column[index].to_pylist() if isinstance(index, slice) else self.column[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        return (value.as_py() for value in self.column)


def has_index(folder: Folder) -> bool:
    """Whether a dataset has an index of the format of `diffusers_sparse3d.data`, not of the one before it.

    Raises:
        ValueError: if it has neither.
    """
    if folder.exists(INDEX):
        return True
    if folder.exists(OLD_INDEX):
        return False
    raise ValueError(
        f"`root` must be a dataset whose preparation is complete, {folder} has no {INDEX}: `prepare` with the same"
        " options goes on where it stopped"
    )


def open_splits(
    config: TrainingConfig,
    resolution: int | list[int] | None = None,
    sdf: bool = True,
    occupancy: bool = True,
    columns: Sequence[str] = (),
) -> dict[str, SparseSDFDataset]:
    """Returns the split "train" of the dataset of a training and, if there is one, "val".

    Args:
        config: Configuration of the training.
        resolution: See `SparseSDFDataset`.
        sdf: See `SparseSDFDataset`.
        occupancy: See `SparseSDFDataset`.
        columns: See `SparseSDFDataset`.
    """
    folder = data_folder(config, config.data)
    names = ("train", "val") if "val" in dataset_splits(folder) else ("train",)
    return {
        name: SparseSDFDataset(folder, name, resolution, sdf=sdf, occupancy=occupancy, columns=columns)
        for name in names
    }


def check_dense_resolution(data: SparseSDFDataset, sample_size: int, name: str = "data") -> None:
    """Raises a ValueError if the occupancies of a dataset are not of the size that a dense VAE is for.

    Args:
        data: The dataset.
        sample_size: `sample_size` of the VAE.
        name: Setting that names the dataset, for the message.
    """
    if data.dense_resolution != sample_size:
        raise ValueError(
            f"`{name}` must have {8 * sample_size} as its lowest resolution for the dense stage, eight times the"
            f" `sample_size` of the dense VAE, got {8 * data.dense_resolution} in {data.folder}"
        )


def data_folder(config: TrainingConfig, path: str | Path) -> Folder:
    """Returns a folder of data or caches of a training; an address with the options and the local cache of it."""
    if "://" not in str(path):
        return Folder(path)
    cache = RangeCache(config.data_cache_dir, int(config.data_cache_gb * 1e9)) if config.data_cache_dir else None
    return Folder(path, config.data_options, cache)


def dataset_splits(root: str | Path | Folder) -> set[str]:
    """Returns the names of the splits of a dataset that have a mesh in them."""
    folder = Folder(root)
    table = read_index(folder, ["split"]) if has_index(folder) else OldRecords(folder, []).table
    return set(pc.unique(table["split"]).to_pylist())


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


def _open_image(data: Tensor) -> Image.Image:
    return Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGBA")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
