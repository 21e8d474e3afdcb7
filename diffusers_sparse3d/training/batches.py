"""Batches of SDF blocks and of occupancy grids, as the VAEs are trained on and encode them."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.folder import Folder
from ..data.records import pack_bits, unpack_bits
from ..ops.coordinates import subdivide_coords
from ..ops.gather import take_rows
from .dataset import BLOCK_SIZE, SparseSDFDataset
from .loose_cells import encoder_rows, loosen_cells, seed_of
from .orientations import UNCHANGED, Orientation
from .sampler import SampleKey, key_tensors


# Requests to an object store that a loader's worker has at the same time.
REQUESTS = 16


class ReadTogether(Dataset[dict[str, Tensor]]):
    """A dataset whose samples of a batch are read at the same time where each is a request to another machine."""

    def folders(self) -> list[Folder]:
        """The folders that samples are read from."""
        raise NotImplementedError

    def __getitems__(self, keys: list[Any]) -> list[dict[str, Tensor]]:
        """Returns samples in the order of their keys, as data loaders ask for a batch."""
        if all(folder.is_local for folder in self.folders()):
            return [self[key] for key in keys]
        with ThreadPoolExecutor(min(len(keys), REQUESTS)) as pool:
            return list(pool.map(self.__getitem__, keys))


class BlockDataset(ReadTogether):
    """SDF blocks for the sparse VAE.

    `dataset[index, resolution]`, or a `SampleKey`, gives `coords` `[M, 3]`, `values` `[M, 512]` float16, `sharp`
    `[M, 64]` uint8, the bits of 512 flags, and `resolution`: the blocks as they are stored, 1,091 bytes each. They are
    expanded on the device, see `expand_blocks`.

    Args:
        data: The shapes.
        orientation: Orientation of the shapes.
        loose_cells: Share of `loosen_cells`; the seed is that of a `SampleKey`, or else one of the mesh.
    """

    def __init__(self, data: SparseSDFDataset, orientation: Orientation = UNCHANGED, loose_cells: float = 0.0):
        self.data, self.orientation, self.loose_cells = data, orientation, loose_cells

    def __len__(self) -> int:
        return len(self.data)

    def folders(self) -> list[Folder]:
        return [self.data.folder]

    def __getitem__(self, key: tuple[int, int] | SampleKey) -> dict[str, Tensor]:
        packed = self.data.packed_blocks(key[0], key[1])
        if self.orientation != UNCHANGED or self.loose_cells:
            seed = key.seed if isinstance(key, SampleKey) else seed_of(self.data.ids[key[0]])
            blocks = loosen_cells(self.data.blocks(key[0], key[1]), self.loose_cells, seed)
            blocks = self.orientation.apply_to_blocks(blocks)
            packed = {
                "coords": blocks.coords,
                "values": blocks.values.half().flatten(1),
                "sharp": pack_bits(blocks.sharp.flatten(1)),
            }
        return {**packed, "resolution": torch.tensor(key[1]), **key_tensors(key)}


class OccupancyDataset(ReadTogether):
    """Occupancy grids for the dense VAE: `dataset[index, ...]` gives `occupancy` `[1, D, D, D]` bool."""

    def __init__(self, data: SparseSDFDataset, orientation: Orientation = UNCHANGED):
        self.data, self.orientation = data, orientation

    def __len__(self) -> int:
        return len(self.data)

    def folders(self) -> list[Folder]:
        return [self.data.folder]

    def __getitem__(self, key: tuple[int, int] | SampleKey) -> dict[str, Tensor]:
        return {"occupancy": self.orientation.apply_to_grid(self.data.occupied_cells(key[0])), **key_tensors(key)}


def pack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins items to a batch.

    If items have `coords`, rows of `coords`, `values`, `sharp`, `mean` and `logvar` are packed, with the number of the
    sample as first column of `coords`. All other tensors are stacked.
    """
    packed = ("coords", "values", "sharp", "mean", "logvar") if "coords" in items[0] else ()
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key == "coords":
            values = [F.pad(value.int(), (1, 0), value=sample) for sample, value in enumerate(values)]
        batch[key] = torch.cat(values) if key in packed else torch.stack(values)
    return batch


@lru_cache(maxsize=32)
def block_voxels(device: torch.device) -> Tensor:
    """Returns the voxels (0, x, y, z) of a block in the row order of SparseVAE's decoder, `[512, 4]` int32.

    They are made once for each device, as are the orders below: a GPU waits for dozens of small operations otherwise.
    """
    # Tensors of inference mode could not be used in a training.
    with torch.inference_mode(False), torch.no_grad():
        return _in_decoder_order(torch.zeros(1, 4, dtype=torch.int32)).to(device)


@lru_cache(maxsize=32)
def decoder_order(device: torch.device) -> Tensor:
    """Returns the place in a block, 64 x + 8 y + z, of each of the 512 rows that a latent is decoded to, int64."""
    with torch.inference_mode(False), torch.no_grad():
        x, y, z = block_voxels(device)[:, 1:].long().unbind(1)
        return (x * BLOCK_SIZE + y) * BLOCK_SIZE + z


@lru_cache(maxsize=32)
def _grid_order(device: torch.device) -> Tensor:
    """Returns the inverse of `decoder_order`."""
    with torch.inference_mode(False), torch.no_grad():
        return decoder_order(device).argsort()


def block_grids(rows: Tensor) -> Tensor:
    """Returns rows in the order of SparseVAE's decoder, `[512 M]`, as grids of samples `[M, 8, 8, 8]` (x, y, z)."""
    return rows.view(-1, BLOCK_SIZE**3)[:, _grid_order(rows.device)].unflatten(1, (BLOCK_SIZE,) * 3)


def vae_targets(block_values: Tensor, block_sharp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the values that SparseVAE's decoder should give, in its row order, and the loss terms of each row.

    The decoder turns latent i into the rows 512 i, ..., 512 i + 511 in the order of three nested subdivisions. Latents
    must be those of the blocks in ascending order, as `encode` makes them of the narrow band.

    Args:
        block_values: Values s / tau of the blocks of all samples, `[M, 512]`.
        block_sharp: Bits of the flags of samples near sharp edges, `[M, 64]` uint8.

    Returns:
        target `[512 M, 1]`: s / tau, clamped to [-1, 1]; is_input `[512 M]` bool: whether the voxel is in the
        encoder's input, as those of the narrow band are, see `encoder_rows` (the decoder adds the others, which have
        the "extra" loss); is_sharp `[512 M]` bool: whether it is in the band and near a sharp edge.
    """
    order = decoder_order(block_values.device)
    target = block_values[:, order].reshape(-1, 1)
    is_input = encoder_rows(block_values.unflatten(1, (BLOCK_SIZE,) * 3)).flatten(1)
    return target, is_input[:, order].reshape(-1), unpack_bits(block_sharp)[:, order].reshape(-1)


def expand_blocks(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the voxels of a batch of blocks in the row order of SparseVAE's decoder.

    Returns:
        coords `[512 M, 4]` int32, target `[512 M, 1]` float32, is_input and is_sharp `[512 M]` bool, see
        `vae_targets`. The encoder's input are the rows of coords and target where is_input is true.
    """
    return _in_decoder_order(batch["coords"]), *vae_targets(batch["values"].float(), batch["sharp"])


def encoder_input(coords: Tensor, target: Tensor, is_input: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what SparseVAE encodes of a batch of blocks, without making the voxels that it does not.

    Args:
        coords: Of the blocks, `[M, 4]` int32.
        target, is_input: Of `vae_targets`.

    Returns:
        The rows where is_input is true: values `[N, 1]`, and voxels `[N, 4]` int32 (batch, x, y, z).
    """
    rows = is_input.nonzero()[:, 0]
    first = torch.cat([coords[:, :1], coords[:, 1:] * BLOCK_SIZE], dim=1)
    # Indexing would spend a thread block of a GPU on each row of four integers.
    voxels = take_rows(first, rows // BLOCK_SIZE**3) + take_rows(block_voxels(rows.device), rows % BLOCK_SIZE**3)
    return target.view(-1).index_select(0, rows)[:, None], voxels


def _in_decoder_order(coords: Tensor) -> Tensor:
    """Returns the voxels of blocks, `[M, 4]` to `[512 M, 4]`, in the row order of SparseVAE's decoder."""
    for _ in range(3):
        coords = subdivide_coords(coords)
    return coords
