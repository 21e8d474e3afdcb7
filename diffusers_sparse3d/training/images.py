"""Conditioning images of the diffusion transformers, prepared once and cached."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.folder import Folder
from ..data.reader import RecordReader
from ..data.record_cache import RecordCache
from ..data.records import IMAGES, Record
from ..data.sections import content_hash, encode
from ..pipelines.image_processor import IMAGENET_MEAN, IMAGENET_STD, Sparse3DImageProcessor
from .batches import ReadTogether
from .cameras import PictureCameras
from .dataset import SparseSDFDataset
from .latents import LatentDataset
from .orientations import Orientation, facing
from .sampler import SampleKey, key_tensors


# Changed whenever prepared images of the same processor change.
VERSION = 1


class PreparedImages:
    """All images of a split as the image processor prepares them, read from a cache one by one.

    Args:
        records: The records of `cache_images`, one for each mesh.
    """

    def __init__(self, records: RecordReader):
        self.records = records

    def view(self, index: int, view: int) -> Tensor:
        """Returns image `view` of a mesh, `[4, S, S]` uint8: RGB on white, and the mask."""
        data = self.records.read(index, f"view_{view}")["png"].numpy().tobytes()
        return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


class _ImagePreparation(Dataset[list[bytes]]):
    """All images of a mesh as the image processor prepares them, as PNG files: RGB on white, and the mask as alpha."""

    def __init__(self, data: SparseSDFDataset, processor: Sparse3DImageProcessor):
        self.data, self.processor = data, processor

    def __getitem__(self, index: int) -> list[bytes]:
        pixel_values, mask = self.processor.preprocess(list(self.data.pictures(index)))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        prepared = torch.cat([pixel_values * std + mean, mask], dim=1).mul(255).round().byte()
        return [_png(image.permute(1, 2, 0).numpy()) for image in prepared]


def _png(pixels: np.ndarray) -> bytes:
    """Returns pixels `[S, S, 4]` uint8 as a PNG file, which has a tenth of their size."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def cache_images(
    data: SparseSDFDataset,
    processor: Sparse3DImageProcessor,
    folder: Folder | str | Path,
    accelerator: Accelerator,
    num_workers: int,
) -> PreparedImages:
    """Prepares the images of a split that `folder` lacks; all processes share the work, and the folder.

    Images are known by the content of the files that they were made from, and by the settings of the processor. They
    are written as they come.

    Args:
        data: The split.
        processor: The image processor of the pipeline.
        folder: Folder or address that receives a folder for each setting of the processor.
        accelerator: The accelerator of the training.
        num_workers: Data-loading processes.
    """
    facts = {"processor": vars(processor), "version": VERSION}
    place = Folder(folder) / f"images-{content_hash([json.dumps(facts, sort_keys=True)])[:16]}"
    sections = [f"view_{view}" for view in range(int(data.num_images.max()))]
    cache, keys = RecordCache(place, sections, pa.schema([]), facts), data.content(IMAGES)
    rows = cache.missing(keys, accelerator.process_index, accelerator.num_processes)
    if rows:
        loader = DataLoader(_ImagePreparation(data, processor), sampler=rows, batch_size=None, num_workers=num_workers)
        name = f"Preparing {data.split or 'all'} images"
        bar = tqdm(loader, desc=name, total=len(rows), disable=not accelerator.is_main_process)
        cache.add(_image_record(keys[row].as_py(), images) for images, row in zip(bar, rows))
    accelerator.wait_for_everyone()
    return PreparedImages(cache.open(keys))


def _image_record(key: str, images: list[bytes]) -> Record:
    parts = {f"view_{view}": {"png": np.frombuffer(image, np.uint8)} for view, image in enumerate(images)}
    return Record(key, {name: encode(tensors) for name, tensors in parts.items()})


class ConditionedLatentDataset(ReadTogether):
    """Latents with an image of each shape.

    `dataset[key]`, with a `SampleKey`, gives the tensors of [`LatentDataset`], `image` `[4, S, S]` uint8, the view
    that the seed of the key picks, and `resolution`.

    Args:
        latents: Latents of the split by resolution (0 in the dense stage) and orientation of the shapes. If there are
            mirrored ones, half of the seeds mean a mirrored shape and image; if there are turned ones, shapes face the
            camera of the image.
        images: Images of `cache_images`.
        data: The split.
        cameras: Cameras of the images; if given, items have `camera` `[6]` float32, too, NaN where it is not known.
    """

    def __init__(
        self,
        latents: dict[tuple[int, Orientation], LatentDataset],
        images: PreparedImages,
        data: SparseSDFDataset,
        cameras: PictureCameras | None = None,
    ):
        self.latents, self.images, self.data, self.cameras = latents, images, data, cameras
        self.mirror = any(orientation.mirrored for _, orientation in latents)
        self.turn = any(orientation.quarter_turns for _, orientation in latents)
        self.counts = data.num_images

    def __len__(self) -> int:
        return len(self.data)

    def folders(self) -> list[Folder]:
        return [self.images.records.folder, *(latents.records.folder for latents in self.latents.values())]

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        index = key.row
        view, mirrored = key.seed // 2 % int(self.counts[index]), key.seed % 2 == 1 and self.mirror
        image = self.images.view(index, view)
        quarter_turns = facing(self.data.azimuths(index)[view]) if self.turn else 0
        item = self.latents[key.resolution, Orientation(quarter_turns, mirrored)][index]
        if self.cameras is not None:
            item = {**item, "camera": self.cameras.get(index, view, quarter_turns, mirrored)}
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
    turns = {facing(azimuth) for azimuth in data.all_azimuths().tolist()} if face_camera else {0}
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
