"""Batches of SDF blocks and of occupancy grids, as the VAEs are trained on and encode them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..ops.coordinates import subdivide_coords
from .dataset import BLOCK_SIZE, SparseSDFDataset
from .orientations import UNCHANGED, Orientation


class BlockDataset(Dataset):
    """SDF blocks for the sparse VAE: `dataset[index, resolution]` gives coords [M, 3], values [M, 512] float16,
    sharp [M, 512] bool, and the resolution. The band is taken out of the blocks on the device: see `expand_blocks`.
    """

    def __init__(self, data: SparseSDFDataset, orientation: Orientation = UNCHANGED):
        self.data, self.orientation = data, orientation

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        blocks = self.orientation.apply_to_blocks(self.data.blocks(*key))
        return {
            "coords": blocks.coords,
            "values": blocks.values.half().flatten(1),
            "sharp": blocks.sharp.flatten(1),
            "resolution": torch.tensor(blocks.resolution),
        }


class OccupancyDataset(Dataset):
    """Occupancy grids for the dense VAE: `dataset[index, _]` gives occupancy [1, D, D, D]."""

    def __init__(self, data: SparseSDFDataset, orientation: Orientation = UNCHANGED):
        self.data, self.orientation = data, orientation

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {"occupancy": self.orientation.apply_to_grid(self.data[key[0]]["occupancy"])}


def limit_rows(items: list[dict[str, Tensor]], key: str, limit: int | None) -> list[dict[str, Tensor]]:
    """The first items, as many as have at most `limit` rows of `key` together, but at least one: bounds the memory."""
    if limit is None:
        return items
    total, kept = 0, []
    for item in items:
        total += item[key].shape[0]
        if kept and total > limit:
            break
        kept.append(item)
    return kept


def pack(items: list[dict[str, Tensor]], max_rows: int | None = None) -> dict[str, Tensor]:
    """Batches items: rows of `coords`, `values`, `sharp`, `mean` and `logvar` (where there are `coords`) are packed,
    with the sample's number as first column of `coords`; everything else is stacked."""
    packed = ("coords", "values", "sharp", "mean", "logvar") if "coords" in items[0] else ()
    if packed:
        items = limit_rows(items, "coords", max_rows)
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key == "coords":
            values = [F.pad(value.int(), (1, 0), value=sample) for sample, value in enumerate(values)]
        batch[key] = torch.cat(values) if key in packed else torch.stack(values)
    return batch


def vae_targets(block_values: Tensor, block_sharp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What SparseVAE's decoder should give, in its row order, and which of the three loss terms a row belongs to.

    The decoder turns latent i into the rows 512 i, ..., 512 i + 511 in the order of three nested subdivisions. The
    latents have to be those of the blocks, in ascending order: what `encode` makes of the band.

    Args:
        block_values (`Tensor` [M, 512]), block_sharp (`Tensor` [M, 512] bool): of the blocks of all samples.

    Returns:
        target [512 M, 1]: s / tau, clamped to [-1, 1]; is_input [512 M] bool: the voxel is in the band, hence in the
        encoder's input (else it is one that the decoder adds: the "extra" term); is_sharp [512 M] bool: it is in the
        band and near a sharp edge.
    """
    coords = torch.zeros(1, 4, dtype=torch.int32)
    for _ in range(3):
        coords = subdivide_coords(coords)
    order = (coords[:, 1:].long() @ torch.tensor([BLOCK_SIZE**2, BLOCK_SIZE, 1])).to(block_values.device)
    target = block_values[:, order].reshape(-1, 1)
    return target, (target[:, 0].abs() < 1), block_sharp[:, order].reshape(-1)


def expand_blocks(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The voxels of a batch of blocks, in the row order of SparseVAE's decoder.

    Returns:
        coords `[512 M, 4]` int32, target `[512 M, 1]` float32, is_input and is_sharp `[512 M]` bool: see
        `dataset.vae_targets`. The encoder's input are the rows of coords and target where is_input holds.
    """
    target, is_input, is_sharp = vae_targets(batch["values"].float(), batch["sharp"])
    coords = batch["coords"]
    for _ in range(3):
        coords = subdivide_coords(coords)
    return coords, target, is_input, is_sharp
