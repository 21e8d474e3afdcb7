"""Configurations of tiny models that several tests train, some of them in processes of their own."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.record_cache import RecordCache
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.latents import LatentDataset


DENSE_VAE: dict[str, Any] = {
    "latent_channels": 2,
    "sample_size": 4,
    "encoder_block_out_channels": [8, 16],
    "decoder_block_out_channels": [16, 8],
    "layers_per_block": 1,
    "mid_layers": 1,
}
SPARSE_VAE: dict[str, Any] = {
    "latent_channels": 4,
    "sample_size": 4,
    "encoder_channels": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_channels": 32,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "norm_num_groups": 2,
}


def cached_latents(folder: Path, data: Path) -> LatentDataset:
    """The latents of the training split of a dataset that a folder has, of one VAE alone."""
    (cache,) = folder.iterdir()
    sparse = cache.name.startswith("32-")
    keys = SparseSDFDataset(data, "train").content("sdf_32" if sparse else "occupancy")
    return LatentDataset(RecordCache(Folder(cache), ["latents"], pa.schema([]), {}).open(keys))
