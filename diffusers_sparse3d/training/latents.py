"""Latents that the diffusion transformers are trained on, which the VAE encodes once, and their cache."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import DenseVAE, SparseVAE
from .batches import BlockDataset, OccupancyDataset, expand_blocks, pack
from .configuration import VAETrainingConfig
from .dataset import SparseSDFDataset
from .files import PARTIAL, complete_folder, sync
from .orientations import UNCHANGED, Orientation


# The pipeline takes cells of at least this probability as occupied.
OCCUPANCY_THRESHOLD = 0.1


@torch.no_grad()
def encode_sparse(vae: SparseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns `mean` and `logvar` `[m, C]` and `coords` `[m, 3]` for each sample of a batch of blocks."""
    coords, target, is_input, _ = expand_blocks(batch)
    output = vae.encode(target[is_input], coords[is_input], check_inputs=False)
    sizes = torch.bincount(output.coords[:, 0]).tolist()
    tensors = (output.latent_dist.mean, output.latent_dist.logvar, output.coords[:, 1:])
    parts = (tensor.cpu().split(sizes) for tensor in tensors)
    return [dict(zip(("mean", "logvar", "coords"), sample)) for sample in zip(*parts)]


@torch.no_grad()
def encode_dense(vae: DenseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns `mean` and `logvar` `[C, r, r, r]` for each sample of a batch of occupancies."""
    posterior = vae.encode(batch["occupancy"]).latent_dist
    return [{"mean": mean, "logvar": logvar} for mean, logvar in zip(posterior.mean.cpu(), posterior.logvar.cpu())]


def encode(vae: SparseVAE | DenseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the tensors of `encode_sparse` or `encode_dense`, whichever fits the VAE."""
    if isinstance(vae, SparseVAE):
        return encode_sparse(vae, batch)
    return encode_dense(vae, batch)


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """Returns a digest of the weights of a model and of other facts, values of JSON, that a cache depends on."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class LatentDataset(Dataset[dict[str, Tensor]]):
    """Posteriors of a split: `dataset[index]` gives `mean` and `logvar` and, of a sparse VAE, `coords`.

    Args:
        files: Files of `cache_latents`, in the order of the processes that wrote them.
    """

    def __init__(self, files: list[Path]):
        parts, sizes = [], []
        for path in files:
            with safe_open(path, "pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            sizes.append(parts[-1].pop("sizes"))
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # Process p of P encoded the samples p, p + P, p + 2P, ...
        starts = F.pad(torch.cat(sizes).cumsum(0), (1, 0))
        self.ranges = [(0, 0)] * sum(len(part) for part in sizes)
        position = 0
        for process, part in enumerate(sizes):
            for row in range(len(part)):
                self.ranges[process + row * len(files)] = (int(starts[position]), int(starts[position + 1]))
                position += 1

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self.ranges[index]
        item = {name: tensor[start:end] for name, tensor in self.tensors.items()}
        return item if "coords" in item else {name: tensor[0] for name, tensor in item.items()}

    @property
    def sizes(self) -> np.ndarray:
        """Number of latents of each sample, `[N]` int64; 1 for those of a dense VAE."""
        return np.array([end - start for start, end in self.ranges], dtype=np.int64)

    def statistics(self) -> tuple[float, float]:
        """Returns mean and standard deviation of the values of all latents, drawn from their posteriors."""
        mean, logvar = self.tensors["mean"], self.tensors["logvar"]
        average = mean.double().mean().item()
        variance = (mean.double() - average).square().mean() + logvar.double().exp().mean()
        return average, math.sqrt(variance.item())


def latent_files(folder: Path, split: str) -> list[Path]:
    """Cached files of a split, latents-SPLIT-PROCESS-of-PROCESSES, in the order of the processes."""
    files = folder.glob(f"latents-{split}-*.safetensors")
    return sorted(files, key=lambda path: int(path.stem.split("-of-")[0].rpartition("-")[2]))


def cache_latents(
    vae: SparseVAE | DenseVAE,
    data: SparseSDFDataset,
    folder: Path,
    split: str,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
    orientation: Orientation = UNCHANGED,
    resolution: int | None = None,
) -> LatentDataset:
    """Encodes a split, unless `folder` has its latents by the very same VAE; all processes share the work.

    Args:
        vae: The VAE, on the accelerator's device.
        data: The split.
        folder: Folder that receives latents-SPLIT-PROCESS-of-PROCESSES.safetensors; after the split, names have the
            resolution of the latents of a sparse VAE.
        split: Name of the split in the names of the files.
        accelerator: The accelerator of the training, see `trainer.make_accelerator`.
        batch_size: Samples per forward pass.
        num_workers: Data-loading processes.
        orientation: Orientation of the shapes that are encoded.
        resolution: Resolution of the SDFs that are encoded; the first of the dataset if None.
    """
    resolution = data.resolutions[0] if resolution is None else resolution
    sparse = isinstance(vae, SparseVAE)
    split = orientation.prefix + (f"{split}-{resolution}" if sparse else split)
    index, count = accelerator.process_index, accelerator.num_processes
    identity = fingerprint(vae, [row["id"] for row in data.rows], resolution, orientation)
    existing = latent_files(folder, split)
    complete = existing and len(existing) == int(existing[0].stem.split("-of-")[1])
    if not complete or any(_identity(path) != identity for path in existing):
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for path in existing:
                path.unlink()
        accelerator.wait_for_everyone()
        dataset = BlockDataset(data, orientation) if sparse else OccupancyDataset(data, orientation)
        rows = range(index, len(data), count)
        # A process without a sample of its own encodes one for the shapes of its empty file.
        keys = [(row, resolution) for row in rows or [0]]
        batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=pack, num_workers=num_workers)
        samples = []
        for batch in tqdm(loader, desc=f"Encoding {split}", disable=not accelerator.is_main_process):
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.autocast():
                samples += encode(vae, batch)
        join = torch.cat if sparse else torch.stack
        dtypes = {"mean": torch.float16, "logvar": torch.float16, "coords": torch.int16}
        tensors = {name: join([sample[name] for sample in samples]).to(dtypes[name]) for name in samples[0]}
        tensors["sizes"] = torch.tensor([sample["mean"].shape[0] if sparse else 1 for sample in samples])
        if not rows:
            tensors = {name: tensor[:0].clone() for name, tensor in tensors.items()}
        path = folder / f"latents-{split}-{index:02d}-of-{count:02d}.safetensors"
        partial = path.with_name(path.name + PARTIAL)
        save_file(tensors, partial, metadata={"identity": identity})
        sync(partial)
        partial.replace(path)
        accelerator.wait_for_everyone()
    return LatentDataset(latent_files(folder, split))


def save_with_statistics(
    vae: SparseVAE | DenseVAE, data: SparseSDFDataset, config: VAETrainingConfig, accelerator: Accelerator
) -> None:
    """Saves a trained VAE in OUTPUT_DIR/vae with the normalisation of its latents over the training split `data`.

    The latents stay in the cache of the configuration for the training of the transformer.
    """
    folder = Path(config.latents_dir or Path(config.output_dir) / "latents")
    latents = cache_latents(vae, data, folder, "train", accelerator, config.encode_batch_size, config.num_workers)
    shift, deviation = latents.statistics()
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / deviation)
    if accelerator.is_main_process:
        with complete_folder(Path(config.output_dir) / "vae") as partial:
            vae.save_pretrained(partial)


def _identity(path: Path) -> str | None:
    """Returns the digest that a cached file was written with."""
    with safe_open(path, "pt") as file:
        return file.metadata().get("identity")
