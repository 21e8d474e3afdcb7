"""Latents that the diffusion transformers are trained on, which the VAE encodes once, and their cache."""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import DenseVAE, SparseVAE
from ..data.folder import Folder
from ..data.reader import RecordReader
from ..data.record_cache import RecordCache
from ..data.records import OCCUPANCY, Record, sdf_section
from ..data.sections import encode as encode_section
from ..models.kernel_examples import sparse_encoder
from .batches import BlockDataset, OccupancyDataset, encoder_input, pack, vae_targets
from .configuration import VAETrainingConfig
from .dataset import SparseSDFDataset, data_folder
from .files import complete_folder
from .kernel_compilation import ModelExample, compile_model_examples
from .orientations import UNCHANGED, Orientation
from .shards import share


# The pipeline takes cells of at least this probability as occupied.
OCCUPANCY_THRESHOLD = 0.1
# The section of a record that has the posterior, and the columns that statistics are made of: the number of values,
# the sums of their means, of the squares of these, and of their variances.
LATENTS = "latents"
SUMS = ("values", "mean_sum", "square_sum", "variance_sum")
# Settings of a VAE that do not change what it encodes to.
NORMALIZATION = ("shift_factor", "scaling_factor")
# Digits of a fingerprint in the name of a folder: 64 bits.
DIGEST_DIGITS = 16


@torch.no_grad()
def encode_sparse(vae: SparseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns `mean` and `logvar` `[m, C]` and `coords` `[m, 3]` for each sample of a batch of blocks."""
    target, is_input, _ = vae_targets(batch["values"].float(), batch["sharp"])
    output = vae.encode(*encoder_input(batch["coords"], target, is_input), check_inputs=False)
    sizes = torch.bincount(output.coords[:, 0]).tolist()
    tensors = (output.latent_dist.mean, output.latent_dist.logvar, output.coords[:, 1:])
    parts = (tensor.cpu().split(sizes) for tensor in tensors)
    return [dict(zip(("mean", "logvar", "coords"), sample)) for sample in zip(*parts)]


@torch.no_grad()
def encode_dense(vae: DenseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns `mean` and `logvar` `[C, r, r, r]` for each sample of a batch of occupancies."""
    posterior = vae.encode(batch["occupancy"].float()).latent_dist
    return [{"mean": mean, "logvar": logvar} for mean, logvar in zip(posterior.mean.cpu(), posterior.logvar.cpu())]


def encode(vae: SparseVAE | DenseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the tensors of `encode_sparse` or `encode_dense`, whichever fits the VAE."""
    if isinstance(vae, SparseVAE):
        return encode_sparse(vae, batch)
    return encode_dense(vae, batch)


def fingerprint(vae: SparseVAE | DenseVAE, *facts: Any) -> str:
    """Returns a digest of the encoder's weights and the configuration of a VAE, and of other facts, values of JSON.

    The decoder, which may be trained further, and the normalisation of the latents, which is known only when there are
    latents, are not part of it.
    """
    config = {name: value for name, value in vae.config.items() if name[0] != "_" and name not in NORMALIZATION}
    digest = hashlib.sha256(json.dumps([type(vae).__name__, config, facts], sort_keys=True).encode())
    for name, tensor in sorted(vae.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class LatentDataset(Dataset[dict[str, Tensor]]):
    """Posteriors of a split: `dataset[index]` gives `mean` and `logvar` and, of a sparse VAE, `coords`.

    They are read from the files of the cache one by one; memory holds their places and sizes alone.

    Args:
        records: The records of a cache, one for each sample.
    """

    def __init__(self, records: RecordReader):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.records.read(index, LATENTS)

    @property
    def sizes(self) -> np.ndarray:
        """Number of latents of each sample, `[N]` int64; 1 for those of a dense VAE."""
        return self.records.table["tokens"].to_numpy().astype(np.int64)

    def statistics(self) -> tuple[float, float]:
        """Returns mean and standard deviation of the values of all latents, drawn from their posteriors."""
        count, total, squares, variances = (float(pc.sum(self.records.table[name]).as_py()) for name in SUMS)
        average = total / count
        return average, math.sqrt(squares / count - average**2 + variances / count)


def latent_cache(
    vae: SparseVAE | DenseVAE,
    folder: Folder | str | Path,
    orientation: Orientation,
    resolution: int,
    loose_cells: float = 0.0,
) -> RecordCache:
    """Returns the cache of the latents that a VAE gives: a folder of its own for each VAE, orientation and resolution.

    Args:
        vae: The VAE.
        folder: Folder of the caches or its address.
        orientation: Orientation of the shapes that are encoded.
        resolution: Resolution of the SDFs, or of the occupancy grids.
        loose_cells: Share of `loosen_cells` of the shapes that are encoded.
    """
    facts = [orientation, resolution, *([loose_cells] if loose_cells else [])]
    digest = fingerprint(vae, *facts)
    name = f"{orientation.prefix}{resolution}-{digest[:DIGEST_DIGITS]}"
    columns = pa.schema([("tokens", pa.int64()), *((name, pa.float64()) for name in SUMS)])
    about: dict[str, Any] = {
        "vae": type(vae).__name__,
        "fingerprint": digest,
        "orientation": orientation,
        "resolution": resolution,
    }
    if loose_cells:
        about["loose_cells"] = loose_cells
    return RecordCache(Folder(folder) / name, [LATENTS], columns, about)


def latent_record(key: str, tensors: dict[str, Tensor]) -> Record:
    """Returns the record of the posterior of one sample, with the sums that the statistics of all are made of."""
    dtypes = {"mean": torch.float16, "logvar": torch.float16, "coords": torch.int16}
    stored = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    mean, variance = stored["mean"].double(), stored["logvar"].double().exp()
    values = (mean.numel(), mean.sum().item(), mean.square().sum().item(), variance.sum().item())
    tokens = len(mean) if "coords" in stored else 1
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    return Record(key, {LATENTS: encode_section(arrays)}, {"tokens": tokens, **dict(zip(SUMS, values))})


def cache_latents(
    vae: SparseVAE | DenseVAE,
    data: SparseSDFDataset,
    folder: Folder | str | Path,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
    orientation: Orientation = UNCHANGED,
    resolution: int | None = None,
    loose_cells: float = 0.0,
) -> LatentDataset:
    """Encodes the meshes of a split that `folder` lacks; all processes share the work, and the folder.

    Latents are known by the content of the field that they were made from, and by the VAE, its weights included. They
    are written as they come: what was encoded before a process was killed is not encoded again.

    Args:
        vae: The VAE, on the accelerator's device.
        data: The split.
        folder: Folder or address that receives a folder for each VAE, orientation and resolution.
        accelerator: The accelerator of the training, see `trainer.make_accelerator`.
        batch_size: Samples per forward pass.
        num_workers: Data-loading processes.
        orientation: Orientation of the shapes that are encoded.
        resolution: Resolution of the SDFs that are encoded; the first of the dataset if None.
        loose_cells: Share of `loosen_cells` of the shapes that a sparse VAE encodes, whose seed is that of the mesh.
    """
    resolution = next(iter(data.resolutions), 0) if resolution is None else resolution
    sparse = isinstance(vae, SparseVAE)
    keys = data.content(sdf_section(resolution) if sparse else OCCUPANCY)
    cache = latent_cache(vae, folder, orientation, resolution if sparse else data.dense_resolution, loose_cells)
    # Of all processes, which wait for each other there, whether they will encode or not.
    if sparse and share(bool(cache.missing(keys, 0, 1))):
        samples = min(2, batch_size)
        example = ModelExample("encoder", vae, partial(sparse_encoder, vae, samples), (samples,))
        compile_model_examples([example], accelerator)
    rows = cache.missing(keys, accelerator.process_index, accelerator.num_processes)
    if rows:
        dataset = BlockDataset(data, orientation, loose_cells) if sparse else OccupancyDataset(data, orientation)
        batches = [
            [(row, resolution) for row in rows[start : start + batch_size]]
            for start in range(0, len(rows), batch_size)
        ]
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=pack, num_workers=num_workers)
        bar = tqdm(loader, desc=f"Encoding {data.split or 'all'}", disable=not accelerator.is_main_process)

        def records() -> Iterator[Record]:
            for batch, batch_keys in zip(bar, batches):
                batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                with accelerator.autocast():
                    samples = encode(vae, batch)
                for (row, _), sample in zip(batch_keys, samples):
                    yield latent_record(keys[row].as_py(), sample)

        cache.add(records())
    accelerator.wait_for_everyone()
    return LatentDataset(cache.open(keys))


def save_with_statistics(
    vae: SparseVAE | DenseVAE,
    data: SparseSDFDataset,
    config: VAETrainingConfig,
    accelerator: Accelerator,
    loose_cells: float = 0.0,
) -> None:
    """Saves a trained VAE in OUTPUT_DIR/vae with the normalisation of its latents over the training split `data`.

    The latents, those of shapes loosened by `loose_cells`, stay in the cache of the configuration for the training of
    the transformer. A VAE whose encoder was not
    trained keeps the normalisation that it has.
    """
    if config.train_encoder:
        folder = data_folder(config, config.latents_dir or Path(config.output_dir) / "latents")
        sizes = (config.encode_batch_size, config.num_workers)
        latents = cache_latents(vae, data, folder, accelerator, *sizes, loose_cells=loose_cells)
        shift, deviation = latents.statistics()
        vae.register_to_config(shift_factor=shift, scaling_factor=1 / deviation)
    if accelerator.is_main_process:
        with complete_folder(Path(config.output_dir) / "vae") as partial:
            vae.save_pretrained(partial)
