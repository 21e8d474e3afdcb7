"""What the diffusion transformers are trained on: latents and conditioning images, prepared once and cached."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from config import VAETrainingConfig
from dataset import SparseSDFDataset, vae_targets
from orientations import UNCHANGED, Orientation, facing
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_sparse3d import DenseVAE, SparseVAE
from diffusers_sparse3d.ops.coordinates import subdivide_coords
from diffusers_sparse3d.pipelines.image_processor import IMAGENET_MEAN, IMAGENET_STD, Sparse3DImageProcessor


# From this probability on, the pipeline takes a cell as occupied.
OCCUPANCY_THRESHOLD = 0.1


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


@torch.no_grad()
def encode_sparse(vae: SparseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Mean, logvar `[m, C]` and coords `[m, 3]` for each sample of a batch of blocks."""
    coords, target, is_input, _ = expand_blocks(batch)
    output = vae.encode(target[is_input], coords[is_input], check_inputs=False)
    sizes = torch.bincount(output.coords[:, 0]).tolist()
    parts = (output.latent_dist.mean, output.latent_dist.logvar, output.coords[:, 1:])
    parts = (part.cpu().split(sizes) for part in parts)
    return [dict(zip(("mean", "logvar", "coords"), sample)) for sample in zip(*parts)]


@torch.no_grad()
def encode_dense(vae: DenseVAE, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Mean and logvar `[C, r, r, r]` for each sample of a batch of occupancies."""
    posterior = vae.encode(batch["occupancy"]).latent_dist
    return [{"mean": mean, "logvar": logvar} for mean, logvar in zip(posterior.mean.cpu(), posterior.logvar.cpu())]


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """Identifies the weights of a model together with what else a cache depends on."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class LatentDataset(Dataset):
    """Posteriors of the latents of a split: `dataset[index]` gives mean and logvar, with the sparse VAE coords too.

    Args:
        files: written by `cache_latents`, in the order of the processes that wrote them.
    """

    def __init__(self, files: list[Path]):
        parts, sizes = [], []
        for path in files:
            with safe_open(path, "pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            sizes.append(parts[-1].pop("sizes"))
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # Process p encoded the samples p, p + P, p + 2P, ...
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

    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all latent values, posterior samples included."""
        mean, logvar = self.tensors["mean"], self.tensors["logvar"]
        average = mean.double().mean().item()
        variance = (mean.double() - average).square().mean() + logvar.double().exp().mean()
        return average, math.sqrt(variance.item())


def cache_latents(
    vae: SparseVAE | DenseVAE,
    data: SparseSDFDataset,
    folder: Path,
    split: str,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
    orientation: Orientation = UNCHANGED,
) -> LatentDataset:
    """Encodes a split, unless `folder` has its latents by the very same VAE; the processes share the work.

    Args:
        vae: on the accelerator's device.
        data: the split; its first resolution is encoded.
        folder: receives latents-SPLIT-PROCESS-of-PROCESSES.safetensors.
        split: for the names of the files.
        accelerator: see `trainer.make_accelerator`.
        batch_size: samples per forward pass.
        num_workers: data loading processes.
        orientation: what is done to the shapes before they are encoded.
    """
    split = orientation.prefix + split
    index, count = accelerator.process_index, accelerator.num_processes
    identity = fingerprint(vae, [row["id"] for row in data.rows], data.resolutions[0], orientation)
    existing = sorted(folder.glob(f"latents-{split}-*.safetensors"))
    complete = existing and len(existing) == int(existing[0].stem.split("-of-")[1])
    if not complete or any(_identity(path) != identity for path in existing):
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for path in existing:
                path.unlink()
        accelerator.wait_for_everyone()
        sparse = isinstance(vae, SparseVAE)
        dataset = BlockDataset(data, orientation) if sparse else OccupancyDataset(data, orientation)
        encode = encode_sparse if sparse else encode_dense
        keys = [(row, data.resolutions[0]) for row in range(index, len(data), count)]
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
        path = folder / f"latents-{split}-{index:02d}-of-{count:02d}.safetensors"
        save_file(tensors, path, metadata={"identity": identity})
        accelerator.wait_for_everyone()
    return LatentDataset(sorted(folder.glob(f"latents-{split}-*.safetensors")))


def save_with_statistics(
    vae: SparseVAE | DenseVAE, data: SparseSDFDataset, config: VAETrainingConfig, accelerator: Accelerator
) -> None:
    """Saves a trained VAE in OUTPUT_DIR/vae with the normalisation of its latents over the training split `data`.

    The latents stay in `config.latents_dir` for `train_dit.py`.
    """
    folder = Path(config.latents_dir or Path(config.output_dir) / "latents")
    latents = cache_latents(vae, data, folder, "train", accelerator, config.encode_batch_size, config.num_workers)
    shift, deviation = latents.statistics()
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / deviation)
    if accelerator.is_main_process:
        vae.save_pretrained(Path(config.output_dir) / "vae")


def _identity(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return file.metadata().get("identity")


class _PreparedImages(Dataset):
    """All images of a mesh as the image processor prepares them: `[k, 4, S, S]` uint8, RGB on white and mask."""

    def __init__(self, data: SparseSDFDataset, processor: Sparse3DImageProcessor):
        self.data, self.processor = data, processor

    def __getitem__(self, index: int) -> Tensor:
        views = range(int(self.data.rows[index]["num_images"]))
        pixel_values, mask = self.processor.preprocess([self.data.picture(index, view) for view in views])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return torch.cat([pixel_values * std + mean, mask], dim=1).mul(255).round().byte()


def cache_images(
    data: SparseSDFDataset,
    processor: Sparse3DImageProcessor,
    folder: Path,
    split: str,
    accelerator: Accelerator,
    num_workers: int,
) -> np.ndarray:
    """Prepares all images of a split, unless `folder` has them; the processes share the work.

    Returns:
        `[images, 4, S, S]` uint8, memory-mapped from OUTPUT/images-SPLIT.npy: those of the first mesh, of the second,
        and so on.
    """
    path, facts_path = folder / f"images-{split}.npy", folder / f"images-{split}.json"
    counts = [int(row["num_images"]) for row in data.rows]
    ends = np.cumsum(counts)
    size = processor.image_size
    facts = {"processor": vars(processor), "ids": [row["id"] for row in data.rows], "root": str(data.root.resolve())}
    if not facts_path.exists() or json.loads(facts_path.read_text()) != facts:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(int(ends[-1]), 4, size, size))
        accelerator.wait_for_everyone()
        images = np.load(path, mmap_mode="r+", allow_pickle=False)
        rows = list(range(accelerator.process_index, len(data), accelerator.num_processes))
        loader = DataLoader(_PreparedImages(data, processor), sampler=rows, batch_size=None, num_workers=num_workers)
        progress = tqdm(
            loader, desc=f"Preparing {split} images", total=len(rows), disable=not accelerator.is_main_process
        )
        for row, prepared in zip(rows, progress):
            images[ends[row] - counts[row] : ends[row]] = prepared.numpy()
        images.flush()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            facts_path.write_text(json.dumps(facts))
        accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r", allow_pickle=False)


class ConditionedLatentDataset(Dataset):
    """Latents with an image: `dataset[index, choice]` gives what [`LatentDataset`] does, and image `[4, S, S]` uint8,
    the view that the number `choice` picks.

    Args:
        latents: of the split, by the orientation of the shapes. If there are mirrored ones, half of the choices are a
            mirrored shape and image; if there are turned ones, shapes face the camera of the image.
        images: from `cache_images`.
        data: the split.
    """

    def __init__(self, latents: dict[Orientation, LatentDataset], images: np.ndarray, data: SparseSDFDataset):
        self.latents, self.images, self.data = latents, images, data
        self.mirror = any(orientation.mirrored for orientation in latents)
        self.turn = any(orientation.quarter_turns for orientation in latents)
        self.counts = [int(row["num_images"]) for row in data.rows]
        self.starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, choice = key
        view, mirrored = choice // 2 % self.counts[index], choice % 2 == 1 and self.mirror
        image = torch.from_numpy(np.array(self.images[self.starts[index] + view]))
        quarter_turns = facing(self.data.azimuths(index)[view]) if self.turn else 0
        item = self.latents[Orientation(quarter_turns, mirrored)][index]
        return {**item, "image": image.flip(-1) if mirrored else image}


def orientations(data: SparseSDFDataset, face_camera: bool, mirror: bool) -> list[Orientation]:
    """Those in which the shapes of a split are needed; see [`ConditionedLatentDataset`]."""
    azimuths = [azimuth for index in range(len(data)) for azimuth in data.azimuths(index)]
    turns = {facing(azimuth) for azimuth in azimuths} if face_camera else {0}
    return [
        Orientation(turn, mirrored) for turn in sorted(turns) for mirrored in ((False, True) if mirror else (False,))
    ]


def normalize_images(images: Tensor, color_jitter: float = 0.0) -> tuple[Tensor, Tensor]:
    """What the image encoder takes, from prepared images.

    Args:
        images: `[B, 4, S, S]` uint8, RGB on white and mask.
        color_jitter: brightness, contrast and saturation of the foreground are multiplied by random factors from
            [1 - color_jitter, 1 + color_jitter].

    Returns:
        pixel_values `[B, 3, S, S]` float32 with ImageNet's mean and deviation, and mask `[B, 1, S, S]` of 0 and 1.
    """
    rgb, mask = images[:, :3].float() / 255, (images[:, 3:] > 127).float()
    if color_jitter > 0:
        shape = (3, images.shape[0], 1, 1, 1)
        brightness, contrast, saturation = 1 + color_jitter * (2 * torch.rand(shape, device=images.device) - 1)
        jittered = rgb * brightness
        average = (jittered * mask).sum((1, 2, 3), keepdim=True) / (3 * mask.sum((1, 2, 3), keepdim=True)).clamp(min=1)
        jittered = average + (jittered - average) * contrast
        grey = jittered.mean(1, keepdim=True)
        jittered = (grey + (jittered - grey) * saturation).clamp(0, 1)
        rgb = torch.where(mask > 0, jittered, rgb)
    mean, std = (torch.tensor(values, device=rgb.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (rgb - mean) / std, mask
