"""Conditioning images of the diffusion transformers, prepared once and cached."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..pipelines.image_processor import IMAGENET_MEAN, IMAGENET_STD, Sparse3DImageProcessor
from .dataset import SparseSDFDataset
from .latents import LatentDataset
from .orientations import Orientation, facing
from .sampler import SampleKey, key_tensors


class _PreparedImages(Dataset[Tensor]):
    """All k images of a mesh as the image processor prepares them: `[k, 4, S, S]` uint8, RGB on white and mask."""

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
    """Prepares all images of a split, unless `folder` has them; all processes share the work.

    Args:
        data: The split.
        processor: The image processor of the pipeline.
        folder: Folder that receives images-SPLIT.npy, and images-SPLIT.json with what they were made from.
        split: Name of the split in the names of the files.
        accelerator: The accelerator of the training.
        num_workers: Data-loading processes.

    Returns:
        `[images, 4, S, S]` uint8, memory-mapped: the images of the first mesh, of the second, and so on.
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


class ConditionedLatentDataset(Dataset[dict[str, Tensor]]):
    """Latents with an image of each shape.

    `dataset[key]`, with a `SampleKey`, gives the tensors of [`LatentDataset`], `image` `[4, S, S]` uint8, the view
    that the seed of the key picks, and `resolution`.

    Args:
        latents: Latents of the split by resolution (0 in the dense stage) and orientation of the shapes. If there are
            mirrored ones, half of the seeds mean a mirrored shape and image; if there are turned ones, shapes face the
            camera of the image.
        images: Images of `cache_images`.
        data: The split.
    """

    def __init__(
        self, latents: dict[tuple[int, Orientation], LatentDataset], images: np.ndarray, data: SparseSDFDataset
    ):
        self.latents, self.images, self.data = latents, images, data
        self.mirror = any(orientation.mirrored for _, orientation in latents)
        self.turn = any(orientation.quarter_turns for _, orientation in latents)
        self.counts = [int(row["num_images"]) for row in data.rows]
        self.starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        index = key.row
        view, mirrored = key.seed // 2 % self.counts[index], key.seed % 2 == 1 and self.mirror
        image = torch.from_numpy(np.array(self.images[self.starts[index] + view]))
        quarter_turns = facing(self.data.azimuths(index)[view]) if self.turn else 0
        item = self.latents[key.resolution, Orientation(quarter_turns, mirrored)][index]
        return {
            **item,
            "image": image.flip(-1) if mirrored else image,
            "resolution": torch.tensor(key.resolution),
            **key_tensors(key),
        }

    def sizes(self, resolution: int) -> np.ndarray:
        """Returns the number of latents of each shape at a resolution, `[N]` int64, alike in all orientations."""
        latents = next(latents for (number, _), latents in self.latents.items() if number == resolution)
        return latents.sizes


def needed_orientations(data: SparseSDFDataset, face_camera: bool, mirror: bool) -> list[Orientation]:
    """Returns the orientations in which [`ConditionedLatentDataset`] needs the shapes of a split."""
    azimuths = [azimuth for index in range(len(data)) for azimuth in data.azimuths(index)]
    turns = {facing(azimuth) for azimuth in azimuths} if face_camera else {0}
    return [
        Orientation(turn, mirrored) for turn in sorted(turns) for mirrored in ((False, True) if mirror else (False,))
    ]


def normalize_images(images: Tensor, color_factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the input of the image encoder and the mask, from prepared images.

    Args:
        images: RGB on white and mask, `[B, 4, S, S]` uint8.
        color_factors: Factors of brightness, contrast and saturation of the foreground, `[B, 3]`.

    Returns:
        pixel_values `[B, 3, S, S]` float32 with ImageNet's mean and deviation, and mask `[B, 1, S, S]` of 0 and 1.
    """
    rgb, mask = images[:, :3].float() / 255, (images[:, 3:] > 127).float()
    if color_factors is not None:
        brightness, contrast, saturation = color_factors.T[:, :, None, None, None]
        jittered = rgb * brightness
        average = (jittered * mask).sum((1, 2, 3), keepdim=True) / (3 * mask.sum((1, 2, 3), keepdim=True)).clamp(min=1)
        jittered = average + (jittered - average) * contrast
        grey = jittered.mean(1, keepdim=True)
        jittered = (grey + (jittered - grey) * saturation).clamp(0, 1)
        rgb = torch.where(mask > 0, jittered, rgb)
    mean, std = (torch.tensor(values, device=rgb.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (rgb - mean) / std, mask
